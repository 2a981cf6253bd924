"""Tokens: each way in which one can be wrong, and the keys that they are signed with."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import jwt
import pytest
import web
from cryptography.hazmat.primitives import serialization
from issuer import AUDIENCE, ISSUER, Issuer

from weft.errors import InvalidConfig, Unauthenticated, Unavailable
from weft.server.api.access import jwks
from weft.server.api.access.access_file import ALGORITHMS, TokenRules
from weft.server.api.access.jwks import FetchedKeys, FileKeys, KeySet, UnusableKeys, fetch_jwks, read_jwks
from weft.server.api.access.tokens import Tokens
from weft.server.api.callers import Caller, Role

RULES = TokenRules(Path("unused"), ISSUER, AUDIENCE, ("RS256", "ES256"), "sub", "")
NOW = int(time.time())


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


def caller_of(name: str, roles: frozenset[Role] | None = None) -> Caller | None:
    return Caller(name, roles=frozenset(Role) if roles is None else roles) if name.startswith("team-") else None


def tokens(issuer: Issuer, rules: TokenRules = RULES, now: Callable[[], float] = time.time) -> Tokens:
    return Tokens(rules, FileKeys(KeySet(issuer.jwks)), caller_of, now)


def refused(tokens: Tokens, token: str) -> str:
    with pytest.raises(Unauthenticated) as raised:
        asyncio.run(tokens.caller(token))
    said = str(raised.value)
    assert not any(part and part in said for part in token.split(".")), "a token must never be repeated"
    return said


def encoded(part: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()


@pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
def test_a_good_token_names_its_caller(issuer: Issuer, algorithm: str) -> None:
    token = issuer.token("team-a", algorithm=algorithm)
    assert asyncio.run(tokens(issuer).caller(token)).name == "team-a"


BAD: dict[str, Callable[[Issuer], str]] = {
    "the token has expired": lambda issuer: issuer.token(exp=NOW - 60),
    "the token is not valid yet": lambda issuer: issuer.token(nbf=NOW + 3600),
    "the token is for another audience": lambda issuer: issuer.token(aud="other"),
    "the token is from another issuer": lambda issuer: issuer.token(iss="https://other.example"),
    "the token has no exp": lambda issuer: issuer.token(without="exp"),
    "the token has no aud": lambda issuer: issuer.token(without="aud"),
    "the token has no iss": lambda issuer: issuer.token(without="iss"),
    "the token has no sub": lambda issuer: issuer.token(without="sub"),
    "the token has a signature that does not hold": lambda issuer: Issuer().token(kid="rsa"),
    "the token is signed with a key that is not known here": lambda issuer: issuer.token(kid="other"),
    "the token is signed by an algorithm that is not accepted": lambda issuer: issuer.token(algorithm="PS256"),
    "the token is malformed": lambda issuer: "eyJub25l.eyJub25l.bm9uZQ",
    "the token's sub names nobody who may call": lambda issuer: issuer.token("stranger"),
    "the token's sub is no name: 1 to 256 printable characters": lambda issuer: issuer.token("team-\n"),
}


@pytest.mark.parametrize("reason", BAD)
def test_each_fault_has_its_words(issuer: Issuer, reason: str) -> None:
    assert refused(tokens(issuer), BAD[reason](issuer)) == reason


def test_a_token_without_a_signature_is_refused(issuer: Issuer) -> None:
    claims = jwt.decode(issuer.token(), options={"verify_signature": False})
    for algorithm in ("none", "None", "NONE"):
        token = f"{encoded({'alg': algorithm, 'typ': 'JWT'})}.{encoded(claims)}."
        assert refused(tokens(issuer), token) == "the token is signed by an algorithm that is not accepted"


def test_a_public_key_is_no_secret_to_sign_with(issuer: Issuer) -> None:
    public = issuer.rsa.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    claims = jwt.decode(issuer.token(), options={"verify_signature": False})
    signed = f"{encoded({'alg': 'HS256', 'kid': 'rsa'})}.{encoded(claims)}"
    mac = base64.urlsafe_b64encode(hmac.digest(public, signed.encode(), hashlib.sha256)).rstrip(b"=").decode()
    assert refused(tokens(issuer), f"{signed}.{mac}") == "the token is signed by an algorithm that is not accepted"
    assert not {algorithm for algorithm in ALGORITHMS if algorithm.startswith("HS") or algorithm == "none"}


def test_a_token_that_is_nested_beyond_reason_is_malformed(issuer: Issuer) -> None:
    deep = base64.urlsafe_b64encode(b"[" * 3000).decode()
    assert refused(tokens(issuer), f"{deep}.{deep}.{deep}") == "the token is malformed"


def test_a_changed_claim_breaks_the_signature(issuer: Issuer) -> None:
    header, body, signature = issuer.token("team-a").split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "=="))
    forged = f"{header}.{encoded({**claims, 'sub': 'team-b'})}.{signature}"
    assert refused(tokens(issuer), forged) == "the token has a signature that does not hold"


def test_a_known_token_is_refused_once_it_has_expired(issuer: Issuer) -> None:
    now_s = float(NOW)
    known = tokens(issuer, now=lambda: now_s)
    longer = issuer.token(exp=NOW + 3600)
    first = asyncio.run(known.caller(longer))
    assert asyncio.run(known.caller(longer)) is first, "it need not be checked again"
    now_s += 3601
    assert asyncio.run(known.caller(longer)) is not first, "it is checked again, by the clock of this machine"


def test_a_caller_knows_how_long_its_token_holds(issuer: Issuer) -> None:
    now_s = float(NOW)
    left_s = asyncio.run(tokens(issuer, now=lambda: now_s).caller(issuer.token(exp=NOW + 3600))).left_s
    assert left_s is not None
    assert left_s() == 3610, "clocks may differ by ten seconds"
    now_s += 3000
    assert left_s() == 610


def test_a_time_beyond_all_floats_is_one(issuer: Issuer) -> None:
    assert asyncio.run(tokens(issuer).caller(issuer.token(exp=10**400))).name == "team-a"


def test_roles_are_those_that_both_the_token_and_the_file_give(issuer: Issuer) -> None:
    claiming = tokens(issuer, replace(RULES, roles_claim="roles"))
    for claimed in (["read", "admin", "else"], "read admin else"):
        caller = asyncio.run(claiming.caller(issuer.token(roles=claimed)))
        assert caller.roles == {Role.READ, Role.ADMIN}
    for claimed in (7, None, {}):
        assert asyncio.run(claiming.caller(issuer.token(roles=claimed))).roles == set()
    assert asyncio.run(claiming.caller(issuer.token())).roles == set()


def test_another_claim_can_name_the_caller(issuer: Issuer) -> None:
    by_client = tokens(issuer, replace(RULES, caller_claim="client_id"))
    assert asyncio.run(by_client.caller(issuer.token(client_id="team-b"))).name == "team-b"
    assert refused(by_client, issuer.token(client_id=7)).startswith("the token's client_id is no name")


class TestKeySet:
    def test_a_key_serves_what_its_kind_and_its_own_words_allow(self, issuer: Issuer) -> None:
        rsa, ec = issuer.keys
        keys = KeySet(json.dumps({"keys": [rsa, {**rsa, "kid": "only", "alg": "PS512"}, ec]}).encode())
        assert keys.find("rsa", "RS256") is not None
        assert keys.find("rsa", "ES256") is None
        assert keys.find("only", "PS512") is not None
        assert keys.find("only", "RS256") is None
        assert keys.find("ec", "ES256") is not None
        assert keys.find("ec", "ES384") is None

    def test_without_an_id_the_only_key_there_is_serves(self, issuer: Issuer) -> None:
        rsa, _ = issuer.keys
        assert KeySet(issuer.jwks).find(None, "RS256") is not None
        both = json.dumps({"keys": [rsa, {**rsa, "kid": "other"}]}).encode()
        assert KeySet(both).find(None, "RS256") is None

    @pytest.mark.parametrize(
        "change", [{"use": "enc"}, {"key_ops": ["sign"]}, {"kty": "oct", "k": "c2VjcmV0"}, {"n": "!"}, {"kty": 7}]
    )
    def test_keys_for_other_uses_and_secrets_are_left_out(self, issuer: Issuer, change: dict[str, object]) -> None:
        rsa, ec = issuer.keys
        assert KeySet(json.dumps({"keys": [{**rsa, **change}, ec]}).encode()).find("rsa", "RS256") is None
        with pytest.raises(UnusableKeys, match="holds no public key"):
            KeySet(json.dumps({"keys": [{**rsa, **change}]}).encode())

    @pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"keys": 7}', b"\xff", b"null"])
    def test_what_is_no_key_set_is_refused(self, document: bytes) -> None:
        with pytest.raises(UnusableKeys, match="is no JWKS"):
            KeySet(document)

    def test_a_file_is_named_with_what_is_wrong_with_it(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.json"
        with pytest.raises(InvalidConfig, match=r"keys\.json can't be read: No such file"):
            read_jwks(path)
        path.write_text("{}")
        with pytest.raises(InvalidConfig, match=r"keys\.json is no JWKS"):
            read_jwks(path)


class Far:
    """An issuer far away, whose document can change, and the clock."""

    def __init__(self, document: bytes) -> None:
        self.document: bytes | None = document
        self.now_s = 0.0
        self.num_fetched = 0
        self.counted: list[tuple[str, str]] = []
        self.begun, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.keys = FetchedKeys(
            "https://far", lambda what, how: self.counted.append((what, how)), self.fetch, lambda: self.now_s
        )

    def fetch(self, url: str) -> bytes:
        self.num_fetched += 1
        self.begun.set()
        assert self.gate.wait(60)
        if self.document is None:
            raise UnusableKeys("at far can't be had")
        return self.document


class TestFetchedKeys:
    def test_an_unknown_key_is_looked_for_again_but_not_often(self, issuer: Issuer) -> None:
        async def main() -> None:
            far = Far(issuer.jwks)
            assert await far.keys.find("rsa", "RS256") is not None
            for _ in range(10):
                assert await far.keys.find("new", "RS256") is None
            assert far.num_fetched == 1
            rsa, _ = issuer.keys
            far.document = json.dumps({"keys": [{**rsa, "kid": "new"}]}).encode()
            far.now_s += jwks.MIN_BETWEEN_S
            assert await far.keys.find("new", "RS256") is not None
            assert await far.keys.find("rsa", "RS256") is None, "the issuer has taken it back"
            assert far.num_fetched == 2
            assert far.counted == [("jwks", "ok")] * 2

        asyncio.run(main())

    def test_they_are_fetched_again_when_they_are_old(self, issuer: Issuer) -> None:
        async def main() -> None:
            far = Far(issuer.jwks)
            far.keys.keep_fresh()
            await far.keys.find("rsa", "RS256")
            far.keys.keep_fresh()
            far.now_s += jwks.FRESH_S
            far.document = None
            far.keys.keep_fresh()
            assert await far.keys.find("rsa", "RS256") is not None, "what was fetched before stays"
            assert far.keys._fetching is not None
            await far.keys._fetching
            assert far.counted == [("jwks", "ok"), ("jwks", "failed")]

        asyncio.run(main())

    def test_a_known_token_ends_with_the_key_that_signed_it(self, issuer: Issuer) -> None:
        async def main() -> None:
            far = Far(issuer.jwks)
            known, token = Tokens(RULES, far.keys, caller_of), issuer.token()
            first = await known.caller(token)
            assert await known.caller(token) is first
            far.document = json.dumps({"keys": issuer.keys[1:]}).encode()
            far.now_s += jwks.FRESH_S
            far.keys.keep_fresh()
            assert far.keys._fetching is not None
            await far.keys._fetching
            with pytest.raises(Unauthenticated, match="a key that is not known here"):
                await known.caller(token)

        asyncio.run(main())

    def test_where_they_were_never_to_be_had_tokens_can_wait(
        self, issuer: Issuer, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def main() -> None:
            far = Far(issuer.jwks)
            far.document = None
            for _ in range(3):
                with pytest.raises(Unavailable, match="try again"):
                    await far.keys.find("rsa", "RS256")
            assert far.num_fetched == 1
            far.document = issuer.jwks
            far.now_s += jwks.MIN_BETWEEN_S
            assert await far.keys.find("rsa", "RS256") is not None

        with caplog.at_level(logging.WARNING):
            asyncio.run(main())
        assert caplog.messages == ["jwt.jwks at far can't be had"]

    def test_many_tokens_wait_for_one_fetch_and_the_event_loop_for_none(self, issuer: Issuer) -> None:
        async def main() -> None:
            far = Far(issuer.jwks)
            far.gate.clear()
            waiting = [asyncio.create_task(far.keys.find("rsa", "RS256")) for _ in range(20)]
            assert await asyncio.to_thread(far.begun.wait, 60)
            assert not any(task.done() for task in waiting)
            waiting[0].cancel()
            far.gate.set()
            found = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(found[0], asyncio.CancelledError)
            assert all(not isinstance(key, BaseException) and key is not None for key in found[1:])
            assert far.num_fetched == 1

        asyncio.run(main())


class TestFetch:
    def test_what_the_issuer_serves_comes_back(self, issuer: Issuer) -> None:
        with web.serving() as far:
            far.files["/keys"] = issuer.jwks
            assert fetch_jwks(f"{far.url}/keys") == issuer.jwks

    def test_a_status_a_redirect_and_no_server_are_told_without_the_path(self) -> None:
        with web.serving() as far:
            far.redirects["/moved"] = "/keys"
            for path, words in (("none?secret", "HTTP status 404"), ("moved?secret", "HTTP status 302")):
                with pytest.raises(UnusableKeys, match=words) as raised:
                    fetch_jwks(f"{far.url}/{path}")
                assert "secret" not in str(raised.value)
        with pytest.raises(UnusableKeys, match="can't be had: ConnectError"):
            fetch_jwks(f"{far.url}/keys")

    def test_a_document_without_an_end_is_cut_off(self) -> None:
        with web.serving() as far:
            far.endless.add("/keys")
            far.files["/keys"] = b""
            with pytest.raises(UnusableKeys, match="has more than"):
                fetch_jwks(f"{far.url}/keys")

    def test_one_that_comes_byte_by_byte_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jwks, "FETCH_S", 0.2)
        over = threading.Event()

        def drip(listener: socket.socket) -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nx-header: ")
                while not over.wait(0.01):
                    connection.sendall(b"a")

        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=drip, args=(listener,))
            thread.start()
            with pytest.raises(UnusableKeys, match=r"at 127\.0\.0\.1 took more than 0\.2 s"):
                fetch_jwks(f"http://127.0.0.1:{listener.getsockname()[1]}/")
            over.set()
            thread.join()
