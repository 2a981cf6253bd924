"""The end of a real process, and the start after one that had none: no request and no adapter is lost."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from processes import Process, serving_process
from tiny import make_adapter, make_model, save_tokenizer
from web import Held, serving

from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc, inference_pb2, inference_pb2_grpc

NUM_IN_FLIGHT = 200
CONTEXT = 1 << 16
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

pytestmark = pytest.mark.slow

Start = Callable[..., AbstractContextManager[Process]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and the adapters `one` and `two`."""
    root = tmp_path_factory.mktemp("drain")
    model = make_model("llama", root / "base", max_position_embeddings=CONTEXT)
    save_tokenizer(root / "base")
    for seed, name in enumerate(("one", "two")):
        make_adapter(model, root / name, seed=seed, target_modules=["q_proj"])
    return root


@pytest.fixture
def start(root: Path, tmp_path: Path) -> Start:
    """Starts a server that has loaded, over one state however often."""

    @contextmanager
    def start(*options: str) -> Iterator[Process]:
        fixed = ("--model", str(root / "base"), "--kv-tokens", str(2 * CONTEXT), "--source-root", str(root))
        state = ("--state", str(tmp_path / "state.db"), "--cache", str(tmp_path / "cache"))
        with serving_process(*fixed, *state, *options) as server:
            server.read_until("serving ")
            yield server

    return start


def stream(channel: grpc.Channel, num_tokens: int) -> Any:
    stopping = {"max_tokens": num_tokens, "ignore_eos": True}
    request = inference_pb2.StreamGenerateRequest(text="hello", stopping=stopping)
    return inference_pb2_grpc.InferenceServiceStub(channel).StreamGenerate(request)


def ended_with(call: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as raised:
        list(call)
    return raised.value


def retry_after_s(error: Any) -> float:
    """Of the RetryInfo that comes with it."""
    info = details_pb2.RetryInfo()
    status = rpc_status.from_call(error)
    assert status is not None
    assert any(detail.Unpack(info) for detail in status.details)
    return info.retry_delay.ToTimedelta().total_seconds()


def adapters(channel: grpc.Channel) -> adapter_pb2_grpc.AdapterServiceStub:
    return adapter_pb2_grpc.AdapterServiceStub(channel)


def creation(name: str, source: str, *, wait: bool = True) -> pb2.CreateAdapterRequest:
    return pb2.CreateAdapterRequest(adapter=pb2.Adapter(name=name, source=source), wait=wait)


class TestDrain:
    def test_none_of_200_in_flight_is_lost_and_new_ones_are_sent_elsewhere(self, start: Start) -> None:
        num_tokens = 50
        with (
            start("--max-running-requests", str(NUM_IN_FLIGHT)) as server,
            grpc.insecure_channel(server.address) as channel,
        ):
            health: Any = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
            assert next(watch).status == SERVING
            calls = [stream(channel, num_tokens) for _ in range(NUM_IN_FLIGHT)]
            firsts = [next(call) for call in calls]
            server.signal(signal.SIGTERM)
            assert next(watch).status == NOT_SERVING
            late = ended_with(stream(channel, num_tokens))
            answers = [[first, *call] for first, call in zip(firsts, calls, strict=True)]
            exit_code, error = server.end()
        assert late.code() is grpc.StatusCode.UNAVAILABLE
        assert retry_after_s(late) > 0
        assert [sum(len(message.tokens) for message in answer) for answer in answers] == [num_tokens] * NUM_IN_FLIGHT
        assert {answer[-1].finish_reason for answer in answers} == {inference_pb2.FINISH_REASON_MAX_TOKENS}
        assert exit_code == 0
        assert "Traceback" not in error

    def test_what_has_not_ended_by_the_grace_is_answered(self, start: Start) -> None:
        with start("--drain-grace-seconds", "0.1") as server, grpc.insecure_channel(server.address) as channel:
            calls = [stream(channel, CONTEXT - 8) for _ in range(20)]
            for call in calls:
                next(call)
            server.signal(signal.SIGTERM)
            errors = [ended_with(call) for call in calls]
            exit_code, error = server.end()
        assert {error.code() for error in errors} == {grpc.StatusCode.UNAVAILABLE}
        assert all(retry_after_s(error) > 0 for error in errors)
        assert exit_code == 0
        assert "20 requests did not finish within 0.1 s" in error


class TestKilled:
    def test_the_next_start_has_the_adapters_that_there_were(self, start: Start, root: Path) -> None:
        with serving() as web:
            for name in ("one", "two"):
                web.hold(root / name, f"/{name}")
            creating, updating = Held(), Held()
            web.held = {"/one/adapter_config.json": creating, "/two/adapter_config.json": updating}
            with (
                start("--source-root", web.url) as server,
                grpc.insecure_channel(server.address) as channel,
            ):
                stub: Any = adapters(channel)
                kept = stub.CreateAdapter(creation("kept", f"file:{root / 'one'}")).adapter
                creation_under_way = stub.CreateAdapter.future(creation("torn", f"{web.url}/one"))
                change = pb2.UpdateAdapterRequest(adapter=pb2.Adapter(name="kept", source=f"{web.url}/two"))
                update_under_way = stub.UpdateAdapter.future(change)
                assert creating.reached.wait(60)
                assert updating.reached.wait(60)
                started = stub.CreateAdapter(creation("started", f"{web.url}/one", wait=False)).adapter
                assert started.state == pb2.ADAPTER_STATE_LOADING
                server.signal(signal.SIGKILL)
                for call in (creation_under_way, update_under_way):
                    assert call.exception(60).code() is grpc.StatusCode.UNAVAILABLE
                server.end()
            creating.set()
            updating.set()
            with (
                start("--source-root", web.url) as server,
                grpc.insecure_channel(server.address) as channel,
            ):
                stub = adapters(channel)
                listed = {adapter.name: adapter for adapter in stub.ListAdapters(pb2.ListAdaptersRequest()).adapters}
                assert set(listed) == {"kept", "started"}, "what was answered is there, what was not is not"
                assert (listed["kept"].source, listed["kept"].digest) == (kept.source, kept.digest)
                torn = stub.CreateAdapter(creation("torn", f"{web.url}/one")).adapter
                assert torn.digest == kept.digest, "nothing half downloaded is in the way"
