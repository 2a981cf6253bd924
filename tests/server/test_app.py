"""The server as a whole: its ports, its start with whatever adapters are there, its health, and its end."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import signal
import socket
import threading
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import Process, serving_process
from tiny import make_adapter, make_model, save_tokenizer
from web import serving

from weft.adapters.records import AdapterState
from weft.errors import AddressUnavailable, InvalidConfig, InvalidModel, Unavailable
from weft.server.app import MAX_MESSAGE_BYTES, SERVICES, Server, _serve_until_lost, running_server
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.server.engine.frontend import _Cancel
from weft.server.ports import MetricsHandler
from weft.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CONTEXT = 1 << 16
ENDLESS = {"max_tokens": CONTEXT - 8, "ignore_eos": True}
"""More tokens than the tiny model makes in any test's time."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`; `adapters` with a good one, four that can't be served, and two things that are no adapters."""
    root = tmp_path_factory.mktemp("app")
    model = make_model("llama", root / "base", max_position_embeddings=CONTEXT)
    save_tokenizer(root / "base")
    folders = root / "adapters"
    make_adapter(model, folders / "good", target_modules=["q_proj"])
    stranger = make_model("llama", root / "stranger", hidden_size=32, num_hidden_layers=1)
    make_adapter(stranger, folders / "stranger", target_modules=["q_proj"])
    shutil.copytree(folders / "good", folders / "a bad name")
    shutil.copytree(folders / "good", folders / "torn")
    (folders / "torn" / "adapter_config.json").write_text("{")
    shutil.copytree(folders / "good", folders / "bare")
    (folders / "bare" / "adapter_config.json").unlink()
    (folders / "notes").mkdir()
    (folders / "README.md").write_text("not an adapter")
    return root


@pytest.fixture
def config(root: Path) -> ServerConfig:
    return ServerConfig(
        model=ModelConfig(str(root / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(max_batch_tokens=64, max_running_requests=8, kv_tokens=2 * CONTEXT, adapter_pages=16),
        port=0,
        metrics_port=0,
        drain_grace_s=0.0,
    )


def inference(channel: Any) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel)


def prompt(**stopping: Any) -> Any:
    return inference_pb2.StreamGenerateRequest(text="hello", stopping=stopping)


async def statuses(channel: grpc.aio.Channel) -> set[int]:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    names = ("", *SERVICES)
    return {(await stub.Check(health_pb2.HealthCheckRequest(service=name))).status for name in names}


async def refusal(answer: Callable[[], Awaitable[object]]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await answer()
    return raised.value


async def read_all(call: Any) -> list[Any]:
    return [message async for message in call]


class TestStart:
    def test_adapters_that_cannot_be_served_do_not_stop_it(
        self, config: ServerConfig, root: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def main() -> None:
            async with (
                running_server(replace(config, adapters=root / "adapters")) as server,
                grpc.aio.insecure_channel(server.address) as channel,
            ):
                stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
                listed = (await stub.ListAdapters(adapter_pb2.ListAdaptersRequest())).adapters
                states = {a.name: adapter_pb2.AdapterState.Name(a.state).removeprefix("ADAPTER_STATE_") for a in listed}
                assert states == {"good": "DEVICE", "stranger": "FAILED", "torn": "FAILED", "bare": "FAILED"}
                assert all(bool(adapter.error) == (adapter.name != "good") for adapter in listed)
                assert "adapters loaded: 1, failed: 4; " in server.startup_line
                request = inference_pb2.GenerateRequest(text="hello", adapter_id="good", stopping={"max_tokens": 1})
                assert (await inference(channel).Generate(request)).adapters[0].adapter_id == "good"

        asyncio.run(main())
        warnings = [record.getMessage() for record in caplog.records if record.name == "weft.server.api.loading"]
        assert len(warnings) == 4
        for name in ("a bad name", "bare", "stranger", "torn"):
            (warning,) = (text for text in warnings if f"/{name}" in text)
            assert "\n" not in warning

    def test_a_link_that_leads_out_is_logged_with_what_to_do(
        self, config: ServerConfig, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        target = root / "adapters" / "good"
        (tmp_path / "linked").symlink_to(target)

        async def main() -> str:
            async with running_server(replace(config, adapters=tmp_path)) as server:
                assert server._loaded is not None
                assert server._loaded.frontend._store.list() == []
                return server.startup_line

        assert "adapters loaded: 0, failed: 1; " in asyncio.run(main())
        (warning,) = (record.getMessage() for record in caplog.records if record.name == "weft.server.watching")
        assert warning == (
            f"{tmp_path}/linked was not loaded: it leads to {target}; add that with --source-root {target}"
        )

    def test_health_and_refusals_follow_the_state(self, config: ServerConfig) -> None:
        async def main() -> None:
            server = Server(config)
            await server.open()
            async with grpc.aio.insecure_channel(server.address) as channel:
                stub = inference(channel)
                assert await statuses(channel) == {NOT_SERVING}
                early = await refusal(lambda: read_all(stub.StreamGenerate(prompt())))
                assert early.code() is grpc.StatusCode.UNAVAILABLE
                assert "loading" in str(early.details())
                await server.load()
                assert await statuses(channel) == {SERVING}
                assert await read_all(stub.StreamGenerate(prompt(max_tokens=1)))
                await server.drain()
                assert await statuses(channel) == {NOT_SERVING}
                late = await refusal(lambda: read_all(stub.StreamGenerate(prompt())))
                assert late.code() is grpc.StatusCode.UNAVAILABLE
                assert "draining" in str(late.details())
                adapters: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
                adapter = {"name": "late", "source": "file:/late"}
                created = await refusal(
                    lambda: adapters.CreateAdapter(adapter_pb2.CreateAdapterRequest(adapter=adapter, wait=True))
                )
                assert created.code() is grpc.StatusCode.UNAVAILABLE
                assert "draining" in str(created.details())
            await server.close()

        asyncio.run(main())

    def test_metrics_are_served_on_their_own_port(self, config: ServerConfig) -> None:
        async def main() -> tuple[str, str]:
            async with running_server(config) as server:
                url = f"http://{server.metrics_address}/metrics"
                with await asyncio.to_thread(urllib.request.urlopen, url) as response:
                    assert "weft_build_info{" in response.read().decode()
                return server.address, server.metrics_address

        for address in asyncio.run(main()):
            host, _, port = address.rpartition(":")
            socket.create_server((host, int(port))).close()  # given back

    def test_metrics_may_have_an_address_of_their_own(self, config: ServerConfig) -> None:
        async def main() -> tuple[str, str]:
            server = Server(replace(config, metrics_host="127.0.0.2"))
            await server.open()
            url = f"http://{server.metrics_address}/metrics"
            with await asyncio.to_thread(urllib.request.urlopen, url) as response:
                assert "weft_ready 0.0" in response.read().decode()
            await server.close()
            return server.address, server.metrics_address

        assert [address.rpartition(":")[0] for address in asyncio.run(main())] == ["127.0.0.1", "127.0.0.2"]

    def test_an_address_for_metrics_that_is_none_is_named(self, config: ServerConfig) -> None:
        with pytest.raises(AddressUnavailable, match=r"--metrics-host is '192\.0\.2\.1'; can't listen there"):
            asyncio.run(enter(replace(config, metrics_host="192.0.2.1")))

    def test_a_scraper_that_says_nothing_is_let_go(
        self, config: ServerConfig, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(MetricsHandler, "timeout", 0.05)

        async def main() -> bytes:
            server = Server(config)
            await server.open()
            host, _, port = server.metrics_address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            said = await asyncio.wait_for(reader.read(), 60)
            writer.close()
            await server.close()
            return said

        assert asyncio.run(main()) == b""
        assert capfd.readouterr().err == ""

    def test_a_prompt_may_be_as_long_as_the_configuration_says(self, config: ServerConfig) -> None:
        longest = MAX_MESSAGE_BYTES + 1
        messages = [{"role": "user", "content": "x" * longest}]

        async def main() -> grpc.aio.AioRpcError:
            async with (
                running_server(replace(config, max_prompt_bytes=longest)) as server,
                grpc.aio.insecure_channel(server.address) as channel,
            ):
                request = inference_pb2.TokenizeRequest(chat=inference_pb2.ChatPrompt(messages=messages))
                return await refusal(lambda: inference(channel).Tokenize(request))

        refused = asyncio.run(main())
        assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT, (
            "it reached the check of the template, not gRPC's limit"
        )
        assert "chat template" in str(refused.details())

    def test_a_model_that_is_none_gives_the_ports_back(self, config: ServerConfig, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        broken = replace(config, model=ModelConfig(str(tmp_path)), port=port)
        with pytest.raises(InvalidModel, match=re.escape(str(tmp_path))):
            asyncio.run(enter(broken))
        socket.create_server(("127.0.0.1", port)).close()

    @pytest.mark.parametrize(("field", "option"), [("port", "--port"), ("metrics_port", "--metrics-port")])
    def test_a_taken_port_is_named(self, config: ServerConfig, field: str, option: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            refused = f"{option} is {port}; can't listen on 127.0.0.1:{port} (Address already in use)"
            with pytest.raises(AddressUnavailable, match=re.escape(refused)):
                asyncio.run(enter(replace(config, **{field: port})))

    def test_one_port_for_both_is_named(self, config: ServerConfig) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        with pytest.raises(AddressUnavailable, match=f"--metrics-port is {port}; .*in use"):
            asyncio.run(enter(replace(config, port=port, metrics_port=port)))

    @pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1"])
    def test_a_host_that_is_not_here_is_named(self, config: ServerConfig, host: str) -> None:
        with pytest.raises(AddressUnavailable, match=f"--host is '{host}'; can't listen there"):
            asyncio.run(enter(replace(config, host=host, allow_anonymous=True)))


class TestState:
    def test_what_was_created_over_the_api_is_there_after_a_restart(
        self, config: ServerConfig, root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folders = tmp_path / "adapters"
        for name in ("good", "other", "gone"):
            shutil.copytree(root / "adapters" / "good", folders / name)
        kept = replace(config, source_roots=(root, folders), state=tmp_path / "state.db", adapters=folders)

        async def run(config: ServerConfig, *calls: Callable[[Any], Awaitable[object]]) -> dict[str, Any]:
            async with (
                running_server(config) as server,
                grpc.aio.insecure_channel(server.address) as channel,
            ):
                stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
                for call in calls:
                    await call(stub)
                listed = (await stub.ListAdapters(adapter_pb2.ListAdaptersRequest())).adapters
                return {adapter.name: adapter for adapter in listed}

        def create(name: str, source: Path, *, wait: bool, **fields: Any) -> Callable[[Any], Awaitable[object]]:
            adapter = {"name": name, "source": f"file:{source}", **fields}
            return lambda stub: stub.CreateAdapter(adapter_pb2.CreateAdapterRequest(adapter=adapter, wait=wait))

        def delete(name: str) -> Callable[[Any], Awaitable[object]]:
            return lambda stub: stub.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=name))

        good = root / "adapters" / "good"
        first = asyncio.run(
            run(
                kept,
                create("mine", good, wait=True, labels={"k": "v"}, pinned=True),
                create("later", good, wait=False),
                create("torn", root / "adapters" / "torn", wait=False),
                create("brief", good, wait=True),
                delete("brief"),
            )
        )
        assert set(first) == {"good", "other", "gone", "mine", "later", "torn"}
        shutil.rmtree(folders / "gone")
        second = asyncio.run(run(replace(kept, source_roots=(root,))))
        assert set(second) == {"good", "other", "mine", "later", "torn"}
        assert (dict(second["mine"].labels), second["mine"].pinned) == ({"k": "v"}, True)
        assert second["mine"].digest == first["mine"].digest
        assert second["torn"].state == adapter_pb2.ADAPTER_STATE_FAILED
        assert "adapter_config.json" in second["torn"].error
        narrow = asyncio.run(run(replace(kept, source_roots=(), adapters=None)))
        assert {adapter.state for adapter in narrow.values()} == {adapter_pb2.ADAPTER_STATE_FAILED}
        assert "--source-root" in narrow["mine"].error, "it stays, and says why it is not served"
        assert set(narrow) == {"mine", "later", "torn"}

    def test_no_start_waits_for_another_machine(self, config: ServerConfig, root: Path, tmp_path: Path) -> None:
        async def main(url: str, may_come: threading.Event) -> None:
            async with running_server(remote) as server, grpc.aio.insecure_channel(server.address) as channel:
                stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
                for name, source in (("far", f"{url}/loras/good"), ("near", f"file:{root / 'adapters' / 'good'}")):
                    request = adapter_pb2.CreateAdapterRequest(adapter={"name": name, "source": source}, wait=True)
                    await stub.CreateAdapter(request)
            may_come.clear()
            async with running_server(remote) as server, grpc.aio.insecure_channel(server.address) as channel:
                stub = adapter_pb2_grpc.AdapterServiceStub(channel)
                assert await statuses(channel) == {SERVING}
                assert "adapters loaded: 1, failed: 0, loading: 1; " in server.startup_line
                watch = stub.WatchAdapters(adapter_pb2.WatchAdaptersRequest())
                far = [message.adapter.state async for message in until_listed(watch) if message.adapter.name == "far"]
                assert far == [adapter_pb2.ADAPTER_STATE_LOADING]
                may_come.set()
                async for message in watch:
                    if message.adapter.state == adapter_pb2.ADAPTER_STATE_DEVICE:
                        assert message.adapter.name == "far"
                        break

        async def until_listed(watch: Any) -> AsyncIterator[Any]:
            async for message in watch:
                if message.kind == adapter_pb2.ADAPTER_EVENT_KIND_LISTED:
                    return
                yield message

        with serving() as web:
            web.hold(root / "adapters" / "good", "/loras/good")
            may_come = web.held["/loras/good/adapter_config.json"] = threading.Event()
            may_come.set()
            remote = replace(
                config,
                source_roots=(root, web.url),
                cache=tmp_path / "cache",
                state=tmp_path / "state.db",
            )
            asyncio.run(main(web.url, may_come))

    def test_a_state_that_is_none_stops_the_start(self, config: ServerConfig, tmp_path: Path) -> None:
        (tmp_path / "state.db").write_text("not a database" * 1000)
        with pytest.raises(InvalidConfig, match=r"--state is .*not a database.*: move it away"):
            asyncio.run(enter(replace(config, state=tmp_path / "state.db")))


class TestEnd:
    def test_requests_past_the_grace_are_answered(self, config: ServerConfig) -> None:
        async def main() -> grpc.aio.AioRpcError:
            async with running_server(config) as server:
                channel = grpc.aio.insecure_channel(server.address)
                call = inference(channel).StreamGenerate(prompt(**ENDLESS))
                assert await anext(aiter(call))
            async with channel:
                return await refusal(lambda: read_all(call))

        ended = asyncio.run(main())
        assert ended.code() is grpc.StatusCode.UNAVAILABLE
        assert "stopping" in str(ended.details())

    def test_a_load_in_the_background_is_waited_for(self, config: ServerConfig, root: Path) -> None:
        async def main() -> AdapterState:
            async with running_server(replace(config, source_roots=(root,), drain_grace_s=60.0)) as server:
                async with grpc.aio.insecure_channel(server.address) as channel:
                    stub: Any = adapter_pb2_grpc.AdapterServiceStub(channel)
                    adapter = {"name": "later", "source": f"file:{root / 'adapters' / 'good'}"}
                    await stub.CreateAdapter(adapter_pb2.CreateAdapterRequest(adapter=adapter))
                assert server._loaded is not None
                store = server._loaded.frontend._store
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return store.get("later").state

        assert asyncio.run(main()) is AdapterState.DEVICE

    def test_losing_the_engine_answers_everybody_and_fails_the_server(self, config: ServerConfig) -> None:
        async def main() -> None:
            server = Server(config)
            await server.open()
            serving = asyncio.create_task(_serve_until_lost(server))
            async with grpc.aio.insecure_channel(server.address) as channel:
                health: Any = health_pb2_grpc.HealthStub(channel)
                watch = aiter(health.Watch(health_pb2.HealthCheckRequest()))
                while (await anext(watch)).status != SERVING:
                    pass
                call = inference(channel).StreamGenerate(prompt(**ENDLESS))
                assert await anext(aiter(call))
                assert server._loaded is not None
                unhashable: Any = []
                server._loaded.frontend._inbox.put(_Cancel(unhashable))
                with pytest.raises(Unavailable, match="the engine stopped unexpectedly"):
                    await serving
                assert (await anext(watch)).status == NOT_SERVING
                for stream in (call, inference(channel).StreamGenerate(prompt())):
                    ended = await refusal(lambda stream=stream: read_all(stream))  # type: ignore[misc]
                    assert ended.code() is grpc.StatusCode.UNAVAILABLE
                    assert "the engine stopped unexpectedly" in str(ended.details())
            await server.drain()
            await server.close()

        asyncio.run(main())


@contextmanager
def process(root: Path, *options: str) -> Iterator[Process]:
    with serving_process("--model", str(root / "base"), "--kv-tokens", str(2 * CONTEXT), *options) as served:
        yield served


class TestLog:
    def test_as_json_every_line_is_an_object_and_a_requests_names_it(self, root: Path) -> None:
        lines = []
        with process(root, "--log-format", "json") as server, grpc.insecure_channel(server.address) as channel:
            lines.append(server.read_until("serving "))
            request = inference_pb2.GenerateRequest(text="hello", request_id="r-1", stopping={"max_tokens": 2})
            inference(channel).Generate(request)
            lines.append(server.read_until("weft.access"))
            server.signal(signal.SIGTERM)
            exit_code, error = server.end()
        assert exit_code == 0
        _, access, *others = [json.loads(line) for line in (*lines, *error.splitlines())]
        assert access["request_id"] == "r-1"
        assert (access["level"], access["code"], access["completion_tokens"]) == ("INFO", "OK", 2)
        assert "SIGTERM: draining" in [line["message"] for line in others]


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_request_in_flight_finishes(self, root: Path, number: signal.Signals) -> None:
        with process(root) as server, grpc.insecure_channel(server.address) as channel:
            server.read_until("serving ")
            health: Any = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == SERVING
            call = inference(channel).StreamGenerate(prompt(max_tokens=500, ignore_eos=True))
            messages = [next(call)]
            server.signal(number)
            assert next(watch).status == NOT_SERVING
            with pytest.raises(grpc.RpcError) as refused:
                list(inference(channel).StreamGenerate(prompt(max_tokens=500)))
            messages += call
            exit_code, error = server.end()
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert messages[-1].finish_reason == inference_pb2.FINISH_REASON_MAX_TOKENS
        assert sum(len(message.tokens) for message in messages) == 500
        assert exit_code == 0
        assert "Traceback" not in error

    def test_a_second_one_ends_it_at_once(self, root: Path) -> None:
        with process(root, "--drain-grace-seconds", "3600") as server, grpc.insecure_channel(server.address) as channel:
            server.read_until("serving ")
            call = inference(channel).StreamGenerate(prompt(**ENDLESS))
            next(call)
            server.signal(signal.SIGTERM)
            server.read_until("SIGTERM: draining")
            server.signal(signal.SIGTERM)
            exit_code, error = server.end()
        assert exit_code == 128 + signal.SIGTERM
        assert "SIGTERM again: stopping at once" in error

    def test_one_while_loading_ends_it(self, root: Path) -> None:
        with process(root) as server:
            server.signal(signal.SIGTERM)
            exit_code, error = server.end()
        assert exit_code == 0
        assert error.count("\n") <= 2, "says that it stops, and nothing of how"


async def enter(config: ServerConfig) -> None:
    async with running_server(config):
        pytest.fail("it started")
