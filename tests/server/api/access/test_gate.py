"""Who is let in: keys, tokens and certificates over real TLS, and what each refusal says."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from certificates import make_ca, make_certificate
from google.protobuf.descriptor import ServiceDescriptor
from google.rpc import error_details_pb2 as details_pb2
from guarded import CALLERS, Guarded, Stubs
from house import ENDLESS, generate, refusal, stream
from prometheus_client import generate_latest

from weft.server.api.access.gate import ANY_ROLE, ROLE_OF
from weft.server.api.callers import Role
from weft.v1 import adapter_pb2, inference_pb2, server_pb2

CODE = grpc.StatusCode
ONE = {"text": "x", "stopping": {"max_tokens": 1}}
SERVICES = [
    service
    for module in (inference_pb2, adapter_pb2, server_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]


def whoami(guard: Guarded, stubs: Stubs) -> str:
    """Whom the server takes a caller for."""
    call = stubs.inference.StreamGenerate(stream(text="x", stopping={"max_tokens": ENDLESS, "ignore_eos": True}))
    try:
        next(call)
        assert guard.server._loaded is not None
        (request,) = guard.server._loaded.frontend._streams
        return request.caller
    finally:
        call.cancel()
        with pytest.raises(grpc.RpcError):
            list(call)


class TestKeys:
    def test_a_key_says_who_calls(self, guard: Guarded) -> None:
        with guard.calling("asker") as asker:
            assert whoami(guard, asker) == "asker"

    def test_it_may_be_sent_under_another_name(self, guard: Guarded) -> None:
        with guard.calling("", ("x-api-key", guard.keys["asker"])) as asker:
            assert whoami(guard, asker) == "asker"

    @pytest.mark.parametrize(
        ("metadata", "words"),
        [
            ([("authorization", "Bearer weft_unknown")], "the key is not known here"),
            ([("x-api-key", "weft_unknown")], "the key is not known here"),
            ([("authorization", "Basic dXNlcjpzZWNyZXQ=")], "authorization is not of the form that is taken"),
            ([("authorization", "Bearer")], "authorization holds no key and no token"),
            ([("authorization", "Bearer " + "x" * 7500)], "authorization holds no key and no token"),
            ([("x-api-key", "secret1"), ("authorization", "Bearer secret2")], "there are several credentials"),
            ([("authorization", "Bearer secret1")] * 2, "there are several credentials"),
            ([], "the client certificate names nobody who may call, and there is no key"),
        ],
    )
    def test_each_fault_has_its_words(self, guard: Guarded, metadata: list[tuple[str, str]], words: str) -> None:
        with guard.calling("", *metadata) as stubs:
            refused = refusal(lambda: stubs.info.GetServerInfo(server_pb2.GetServerInfoRequest()))
        assert refused.code is CODE.UNAUTHENTICATED
        assert refused.reason == "UNAUTHENTICATED"
        assert words in refused.message
        assert not any(secret in str(refused.status) for secret in ("secret", "unknown", "dXNlcjp", "xxxx"))

    def test_a_wrong_key_is_not_made_good_by_a_certificate(self, guard: Guarded) -> None:
        with guard.calling("", ("x-api-key", "weft_unknown"), certificate="client-a") as stubs:
            refused = refusal(lambda: stubs.inference.Generate(generate(**ONE)))
        assert refused.code is CODE.UNAUTHENTICATED

    def test_refusals_are_counted(self, guard: Guarded) -> None:
        def count() -> float:
            return (
                guard.server._registry.get_sample_value("weft_refused_requests_total", {"code": "unauthenticated"})
                or 0.0
            )

        before = count()
        with guard.calling() as stubs:
            refusal(lambda: stubs.inference.Generate(generate(**ONE)))
        assert count() == before + 1


class TestCertificates:
    def test_a_certificate_says_who_calls(self, guard: Guarded) -> None:
        with guard.calling(certificate="client-a") as shown:
            assert whoami(guard, shown) == "shown"

    def test_without_one_there_is_no_connection(self, guard: Guarded) -> None:
        credentials = grpc.ssl_channel_credentials(guard.ca.certificate_pem)
        with grpc.secure_channel(guard.server.address, credentials) as channel:
            refused = refusal(lambda: Stubs(channel).info.GetServerInfo(server_pb2.GetServerInfoRequest()))
        assert refused.code is CODE.UNAVAILABLE

    def test_one_of_another_authority_is_refused(self, guard: Guarded) -> None:
        shown = make_certificate(make_ca(), "client-a")
        credentials = grpc.ssl_channel_credentials(guard.ca.certificate_pem, shown.key_pem, shown.certificate_pem)
        with grpc.secure_channel(guard.server.address, credentials) as channel:
            refused = refusal(lambda: Stubs(channel).info.GetServerInfo(server_pb2.GetServerInfoRequest()))
        assert refused.code is CODE.UNAVAILABLE


class TestTokens:
    def test_a_token_says_who_calls(self, guard: Guarded) -> None:
        for subject in ("asker", "somebody@else"):
            token = guard.issuer.token(subject)
            with guard.calling("", ("authorization", f"bearer {token}")) as stubs:
                assert whoami(guard, stubs) == subject

    def test_a_bad_one_is_told_and_not_repeated(self, guard: Guarded) -> None:
        token = guard.issuer.token(aud="other")
        with guard.calling("", ("authorization", f"Bearer {token}")) as stubs:
            refused = refusal(lambda: stubs.inference.Generate(generate(**ONE)))
        assert refused.code is CODE.UNAUTHENTICATED
        assert refused.message == "the token is for another audience"
        assert not any(part in str(refused.status) for part in token.split("."))


class TestRoles:
    def test_every_method_has_a_role(self) -> None:
        methods = {f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods}
        assert methods == {*ROLE_OF, *ANY_ROLE}

    @pytest.mark.parametrize("service", SERVICES, ids=lambda service: service.name)
    @pytest.mark.parametrize(
        ("caller", "roles"),
        [("asker", {Role.INFER}), ("reader", {Role.READ}), ("team-a", {Role.INFER, Role.READ, Role.ADMIN})],
    )
    def test_a_method_takes_its_role(
        self, guard: Guarded, service: ServiceDescriptor, caller: str, roles: set[Role]
    ) -> None:
        """What is asked for is wrong: it matters only whether that is looked at."""
        wrong = b"\xff\xff" if service.name == "ServerService" else b"\x9a\x7d\x01x"
        with guard.calling(caller) as stubs:
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                refused = refusal(lambda path=path: stubs.channel.unary_unary(path)(wrong))  # type: ignore[misc]
                allowed = path in ANY_ROLE or ROLE_OF[path] in roles
                assert (refused.code is CODE.PERMISSION_DENIED) == (not allowed), path

    def test_the_refusal_names_role_and_method(self, guard: Guarded) -> None:
        with guard.calling("asker") as asker:
            refused = refusal(lambda: asker.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="x")))
        assert refused.message == "caller 'asker' does not have the role 'admin', which DeleteAdapter takes"
        assert refused.reason == "PERMISSION_DENIED"


class TestFairness:
    NAMED = ("x-gateway-inference-fairness-id", "their-user")

    def test_the_header_counts_for_gateways_alone(self, guard: Guarded) -> None:
        with guard.calling("asker", self.NAMED) as asker:
            assert whoami(guard, asker) == "asker"
        with guard.calling("gateway", self.NAMED) as gateway:
            assert whoami(guard, gateway) == "gateway/their-user"
        with guard.calling("gateway") as gateway:
            assert whoami(guard, gateway) == "gateway"

    def test_prefixes_are_not_shared_between_callers(self, guard: Guarded) -> None:
        def cached(caller: str, *metadata: tuple[str, str]) -> int:
            prompt = {"text": "a prompt of more tokens than one block of the cache holds" * 3}
            with guard.calling(caller, *metadata) as stubs:
                answer = stubs.inference.Generate(generate(**prompt, stopping={"max_tokens": 1}))
            return int(answer.usage.cached_prompt_tokens)

        assert cached("asker") == 0
        assert cached("asker") > 0
        assert cached("gateway") == 0
        assert cached("gateway", self.NAMED) == 0
        assert cached("gateway", self.NAMED) > 0


class TestQuotas:
    def test_a_request_over_the_quota_is_told_when_to_come_again(self, guard: Guarded) -> None:
        with guard.calling("rare") as rare:
            rare.inference.Generate(generate(**ONE))
            refused = refusal(lambda: rare.inference.Generate(generate(**ONE)))
        assert refused.code is CODE.RESOURCE_EXHAUSTED
        assert refused.reason == "QUOTA_EXCEEDED"
        assert 0 < refused.detail(details_pb2.RetryInfo).retry_delay.ToMilliseconds() <= 60_000
        (violation,) = refused.detail(details_pb2.QuotaFailure).violations
        assert violation.subject == "caller:rare"
        assert violation.description == "at most 1 requests a minute are allowed (requests_per_minute)"
        count = guard.server._registry.get_sample_value("weft_quota_refusals_total", {"limit": "requests_per_minute"})
        assert count == 1

    def test_prompts_and_answers_use_tokens_up(self, guard: Guarded) -> None:
        with guard.calling("brief") as brief:
            brief.inference.Generate(generate(text="a longer prompt", stopping={"max_tokens": 40, "ignore_eos": True}))
            refused = refusal(lambda: brief.inference.Generate(generate(**ONE)))
            scored = inference_pb2.ScoreRequest(text="x", continuations=["y"])
            assert refusal(lambda: brief.inference.Score(scored)).reason == "QUOTA_EXCEEDED"
            embedded = inference_pb2.EmbedRequest(text="x")
            assert refusal(lambda: brief.inference.Embed(embedded)).reason == "QUOTA_EXCEEDED"
            brief.inference.Tokenize(inference_pb2.TokenizeRequest(text="x"))
        assert "at most 1 tokens a minute" in refused.message

    def test_requests_at_once_are_bounded_until_one_ends(self, guard: Guarded) -> None:
        with guard.calling("single") as single:
            call = single.inference.StreamGenerate(
                stream(text="x", stopping={"max_tokens": ENDLESS, "ignore_eos": True})
            )
            next(call)
            refused = refusal(lambda: single.inference.Generate(generate(**ONE)))
            assert "at most 1 requests at once" in refused.message
            call.cancel()
            with pytest.raises(grpc.RpcError):
                list(call)
            while answers(lambda: single.inference.Generate(generate(**ONE))) is CODE.RESOURCE_EXHAUSTED:
                pass


def answers(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        code: Any = error
        assert isinstance(code.code(), grpc.StatusCode)
        return code.code()  # type: ignore[no-any-return]
    return CODE.OK


class TestReload:
    @pytest.fixture(autouse=True)
    def as_it_was(self, guard: Guarded) -> Iterator[None]:
        yield
        guard.rewrite()
        guard.catch_up()

    def test_a_key_that_is_taken_back_is_refused(self, guard: Guarded) -> None:
        with guard.calling("asker") as asker:
            asker.inference.Generate(generate(**ONE))
            guard.rewrite("asker")
            guard.catch_up()
            refused = refusal(lambda: asker.inference.Generate(generate(**ONE)))
        assert refused.message == "the key is not known here"

    def test_a_bad_file_is_logged_and_the_old_one_stays(self, guard: Guarded, caplog: pytest.LogCaptureFixture) -> None:
        guard.access.write_text("[callers.asker]\nrole = []\n")
        with caplog.at_level(logging.WARNING):
            guard.catch_up()
        assert "callers.asker.role is no key; did you mean 'roles'?; what was read before stays" in caplog.text
        with guard.calling("asker") as asker:
            asker.inference.Generate(generate(**ONE))
        count = guard.server._registry.get_sample_value("weft_reloads_total", {"what": "access", "outcome": "failed"})
        assert count
        assert count >= 1

    def test_keys_of_tokens_are_read_again(self, guard: Guarded) -> None:
        keys = guard.folder / "keys.json"
        before = keys.read_bytes()
        with guard.calling("", ("authorization", f"Bearer {guard.issuer.token('asker')}")) as stubs:
            stubs.inference.Generate(generate(**ONE))
            keys.write_bytes(json.dumps({"keys": guard.issuer.keys[1:]}).encode())
            guard.catch_up()
            refused = refusal(lambda: stubs.inference.Generate(generate(**ONE)))
            assert refused.message == "the token is signed with a key that is not known here"
            keys.write_bytes(before)
            guard.catch_up()
            stubs.inference.Generate(generate(**ONE))

    def test_watches_end_when_rights_may_have_changed(self, guard: Guarded) -> None:
        with guard.calling("reader") as reader:
            watch = reader.adapters.WatchAdapters(adapter_pb2.WatchAdaptersRequest())
            next(watch)
            guard.rewrite("reader")
            guard.catch_up()
            refused = refusal(lambda: list(watch))
            assert refused.code is CODE.UNAVAILABLE
            assert "has changed: watch again" in refused.message

    def test_a_new_certificate_serves_new_connections_and_a_bad_one_none(
        self, guard: Guarded, caplog: pytest.LogCaptureFixture
    ) -> None:
        info = server_pb2.GetServerInfoRequest()
        cert, key, new_ca = guard.folder / "server.crt", guard.folder / "server.key", make_ca("new")
        before = cert.read_bytes(), key.read_bytes()
        make_certificate(new_ca, "server").write(guard.folder, "server")
        with guard.calling("asker") as old:
            old.info.GetServerInfo(info)
            guard.catch_up()
            old.info.GetServerInfo(info)
        with guard.calling("asker") as stubs:
            assert refusal(lambda: stubs.info.GetServerInfo(info)).code is CODE.UNAVAILABLE
        with guard.calling("asker", ca=new_ca) as stubs:
            stubs.info.GetServerInfo(info)
        cert.write_text("-----BEGIN CERTIFICATE-----\nhalf of it")
        with caplog.at_level(logging.WARNING):
            guard.catch_up()
        assert "holds no certificate in PEM (-----BEGIN CERTIFICATE-----); what was read before stays" in caplog.text
        with guard.calling("asker", ca=new_ca) as stubs:
            stubs.info.GetServerInfo(info)
        cert.write_bytes(before[0])
        key.write_bytes(before[1])
        guard.catch_up()
        with guard.calling("asker") as stubs:
            stubs.info.GetServerInfo(info)


def test_no_secret_is_in_any_log_metric_or_error(guard: Guarded, caplog: pytest.LogCaptureFixture) -> None:
    token, expired = guard.issuer.token(), guard.issuer.token(exp=1)
    wrong = "weft_" + "w" * 43
    told: list[str] = []
    with caplog.at_level(logging.DEBUG):
        for secret in (*guard.keys.values(), token, expired, wrong):
            with guard.calling("", ("authorization", f"Bearer {secret}")) as stubs:
                for ask in (
                    lambda stubs=stubs: stubs.inference.Generate(generate(**ONE)),
                    lambda stubs=stubs: stubs.adapters.GetAdapter(adapter_pb2.GetAdapterRequest(name="team-b/none")),
                    lambda stubs=stubs: stubs.adapters.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name="none")),
                ):
                    try:
                        ask()
                    except grpc.RpcError as error:
                        told.append(str(error))
        guard.rewrite()
        guard.catch_up()
    assert caplog.records
    assert told
    everything = "\n".join([caplog.text, *told, generate_latest(guard.server._registry).decode()])
    secrets = [*guard.keys.values(), wrong, *token.split("."), *expired.split(".")[1:]]
    assert len(secrets) == len(CALLERS) + 6
    assert [secret for secret in secrets if secret in everything] == []
