"""The server as a whole: two ports, one engine, from loading to draining."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar, cast
from wsgiref.simple_server import WSGIServer

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection
from opentelemetry.trace import TracerProvider
from prometheus_client import CollectorRegistry, ProcessCollector

from weft.adapters.locations import is_remote
from weft.adapters.state import Recorder, State
from weft.adapters.store import AdapterStore, Reservation
from weft.errors import Unavailable
from weft.server.api.access.access import Access
from weft.server.api.access.rights import Rights
from weft.server.api.adapters import AdapterServicer
from weft.server.api.edge import Edge
from weft.server.api.health import Health
from weft.server.api.inference import InferenceServicer
from weft.server.api.loading import AdapterLoader
from weft.server.api.prompts import Prompts
from weft.server.api.server_info import ServerServicer
from weft.server.api.translation import RequestLimits
from weft.server.config import ServerConfig, is_loopback
from weft.server.engine.constraint_cache import ConstraintCache
from weft.server.engine.frontend import Frontend
from weft.server.engine.load import EngineInfo, LoadedEngine, load_engine
from weft.server.engine.queue_limits import QueueLimits
from weft.server.logs import log_loop_error
from weft.server.metrics import AdapterSnapshot, Metrics
from weft.server.ports import check_free, join_address, serve_metrics, unavailable
from weft.server.threads import full_pool
from weft.server.tracing import open_tracing
from weft.server.transport import grpc_options
from weft.server.watching import AdapterFolders
from weft.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc, server_pb2, server_pb2_grpc

_log = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_MESSAGE_BYTES = 16 << 20
"""Of a request, or twice the longest prompt if that is more: a prompt too long is refused in words, not by gRPC."""

_LOAD_THREAD = "weft-load-at-start"

NUM_THREADS = 6
"""For what would hold up the event loop: tokenizing, compiling constraints, looking at files."""

CLOSING_GRACE_S = 1.0
"""How long answers that are complete may take to reach their clients once the engine has stopped."""

SERVICES = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
    server_pb2.DESCRIPTOR.services_by_name["ServerService"].full_name,
)


@dataclass(frozen=True, slots=True)
class _Watch:
    """Folders, and the task that watches them."""

    folders: AdapterFolders
    task: asyncio.Task[None]

    @classmethod
    def of(cls, folders: AdapterFolders) -> _Watch:
        return cls(folders, asyncio.create_task(folders.watch(), name="watch the adapters"))

    async def end(self, grace_s: float) -> None:
        """Wait for what it is doing for up to `grace_s`."""
        self.folders.stop()
        await asyncio.wait({self.task}, timeout=grace_s)
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What there is once the model is loaded."""

    info: EngineInfo
    frontend: Frontend
    loader: AdapterLoader
    num_adapters: int
    num_failed_adapters: int
    num_loading_adapters: int
    watcher: asyncio.Task[None]
    folders: _Watch | None


class Server:
    """One server from its ports to its end: `open`, `load`, `drain`, `close`, each once and in this order."""

    def __init__(self, config: ServerConfig, tracer_provider: TracerProvider | None = None) -> None:
        """tracer_provider: in place of the one that the configuration and OpenTelemetry's own variables ask for.

        Raises InvalidConfig where a file that says who may call does not hold what it should.
        """
        self._config = config
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._metrics = Metrics(self._registry, config.metrics_adapters, config.model.path)
        self._tracing = open_tracing(config.otlp_endpoint, version("weft"), tracer_provider)
        self._health = Health(SERVICES, lambda is_ready: self._metrics.set_ready(is_ready=is_ready))
        self._access = Access(config, self._metrics, time.monotonic)
        self._edge = Edge(self._metrics.refused, self._access.gate, self._tracing.tracer, config.stall_s or None)
        self._access_watch: asyncio.Task[None] | None = None
        self._grpc: grpc.aio.Server | None = None
        self._probes: grpc.aio.Server | None = None
        self._http: tuple[WSGIServer, threading.Thread] | None = None
        self._state: State | None = None
        self._loaded: _Loaded | None = None
        self.address = ""
        self.metrics_address = ""
        self.health_address = ""

    async def open(self) -> None:
        """Listen. Health says NOT_SERVING, and every other RPC is refused until `load` is done.

        Raises AddressUnavailable.
        """
        config = self._config
        check_free("--port", config.host, config.port)
        metrics_host = config.host if config.metrics_host is None else config.metrics_host
        host_option = "--host" if config.metrics_host is None else "--metrics-host"
        check_free("--metrics-port", metrics_host, config.metrics_port, host_option)
        max_bytes = max(MAX_MESSAGE_BYTES, 2 * config.max_prompt_bytes)
        self._grpc = grpc.aio.server(options=grpc_options(max_bytes))
        await self._health.loading()
        self._health.add_to(self._grpc)
        self._grpc.add_generic_rpc_handlers((self._edge,))
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        try:
            port = self._listen(self._grpc)
        except RuntimeError as error:
            raise unavailable("--port", config.host, config.port, "") from error
        self.address = join_address(config.host, port)
        self._http = serve_metrics(self._registry, metrics_host, config.metrics_port)
        self.metrics_address = join_address(metrics_host, self._http[0].server_port)
        self._access_watch = asyncio.create_task(self._access.watch(), name="watch who may call")
        await self._grpc.start()
        if config.health_port is not None:
            await self._open_probes(config.host, config.health_port)

    async def load(self) -> None:
        """Load the model and the adapters, and start to serve. Raises InvalidModel, InvalidConfig."""
        config = self._config
        state = self._state = State(config.state) if config.state is not None else None
        loaded = await _in_daemon_thread(lambda: load_engine(config, self._metrics))
        info, store, engine = loaded.info, loaded.store, config.engine
        self._metrics.set_build_info(version("weft"), info.model, info.dtype, info.device)
        self._metrics.set_cache_config(engine.block_tokens, info.kv_tokens // engine.block_tokens)
        self._metrics.set_limits(engine.max_running_requests, engine.max_queued_requests)
        self._metrics.watch_adapters(lambda: _snapshot(store))
        recorder = Recorder(store, state) if state is not None else None
        loader = AdapterLoader(store, self._metrics, recorder, tracer=self._tracing.tracer)
        folders = None
        if config.adapters is not None:
            folders = AdapterFolders(config.adapters, config.all_source_roots, store, loader)
        outcomes, rest = await _in_daemon_thread(lambda: self._load_adapters(loader, state, folders))
        limits = QueueLimits(
            engine.max_running_requests,
            engine.max_queued_requests,
            engine.max_queued_tokens,
            engine.max_queued_per_adapter,
            engine.max_queue_ms / 1000,
        )
        frontend = Frontend(loaded.engine, store, limits)
        frontend.start()
        self._loaded = _Loaded(
            info=info,
            frontend=frontend,
            loader=loader,
            num_adapters=sum(outcomes),
            num_failed_adapters=len(outcomes) - sum(outcomes),
            num_loading_adapters=len(rest),
            watcher=asyncio.create_task(self._watch(frontend), name="watch the engine"),
            folders=_Watch.of(folders) if folders is not None and config.watch else None,
        )
        self._add_services(loaded, frontend, loader)
        await self._health.serving()
        for reservation in rest:
            loader.restore(reservation)

    async def until_lost(self) -> None:
        """Wait for the loaded engine to stop by itself, which it never should."""
        assert self._loaded is not None, "nothing is loaded yet"
        await self._loaded.frontend.lost.wait()

    async def drain(self) -> None:
        """Refuse new requests and let those in flight finish, as long as the configuration says."""
        await self._health.draining()
        if self._loaded is not None:
            grace_s, loaded = self._config.drain_grace_s, self._loaded
            ends = [loaded.folders.end(grace_s)] if loaded.folders is not None else []
            await asyncio.gather(loaded.frontend.drain(grace_s), loaded.loader.drain(grace_s), *ends)

    async def close(self) -> None:
        """Give the ports back. Requests still in flight are cancelled."""
        if self._access_watch is not None:
            await _cancelled(self._access_watch)
        if self._grpc is not None:
            await self._grpc.stop(CLOSING_GRACE_S)
        if self._probes is not None:
            await self._probes.stop(0.0)
        if self._loaded is not None:
            await _cancelled(self._loaded.watcher)
            await asyncio.to_thread(self._loaded.loader.close)
        if self._state is not None:
            self._state.close()
        if self._http is not None:
            httpd, thread = self._http
            await asyncio.to_thread(httpd.shutdown)
            httpd.server_close()
            thread.join()
        await asyncio.to_thread(self._tracing.close)

    @property
    def is_loading_adapters(self) -> bool:
        """Whether loads go on that outlasted the drain."""
        return self._loaded is not None and self._loaded.loader.is_loading

    @property
    def startup_line(self) -> str:
        """What is served, and where; once loaded."""
        assert self._loaded is not None, "nothing is loaded yet"
        num_loading = self._loaded.num_loading_adapters
        loading = f", loading: {num_loading}" if num_loading else ""
        return (
            f"{self._loaded.info.startup_line}; adapters loaded: {self._loaded.num_adapters}, "
            f"failed: {self._loaded.num_failed_adapters}{loading}; gRPC on {self.address}{self._guarded}, "
            f"metrics on http://{self.metrics_address}/metrics"
        )

    async def _open_probes(self, host: str, port: int) -> None:
        """Health alone on a port of its own: the kubelet's probes speak neither TLS nor authentication."""
        check_free("--health-port", host, port)
        self._probes = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._health.add_to(self._probes)
        try:
            port = self._probes.add_insecure_port(join_address(host, port))
        except RuntimeError as error:
            raise unavailable("--health-port", host, port, "") from error
        self.health_address = join_address(host, port)
        await self._probes.start()

    @property
    def _guarded(self) -> str:
        """What of TLS and credentials there is, in words."""
        config = self._config
        tls = "mutual TLS" if config.tls_client_ca is not None else "TLS" if config.tls_cert is not None else ""
        callers = f"callers by {config.access}" if config.access is not None else ""
        return "".join(f", {words}" for words in (tls, callers) if words)

    def _listen(self, server: grpc.aio.Server) -> int:
        config, credentials = self._config, self._access.credentials
        address = join_address(config.host, config.port)
        if config.access is not None and credentials is None and not is_loopback(config.host):
            _log.warning("--access without --tls-cert: keys and tokens come over the network as they are")
        return server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)

    def _load_adapters(
        self, loader: AdapterLoader, state: State | None, folders: AdapterFolders | None
    ) -> tuple[list[bool], list[Reservation]]:
        """Load what the state has kept, and then the folders whose names are free.

        Whether each was loaded, and those of other machines, which no start waits for: they have their names only.
        """
        kept = state.all() if state is not None else []
        rest = [loader.reserve_now(new) for new in kept if is_remote(new.source)]
        restored = [loader.load_now(new, restored=True) for new in kept if not is_remote(new.source)]
        outcomes = restored + (folders.load_all() if folders is not None else [])
        return outcomes, [reservation for reservation in rest if reservation is not None]

    def _add_services(self, loaded: LoadedEngine, frontend: Frontend, loader: AdapterLoader) -> None:
        config = self._config
        prompts = Prompts(loaded.tokenizer)
        limits = RequestLimits(
            vocab_size=loaded.info.vocab_size,
            context_length=loaded.info.context_length,
            max_prompt_bytes=config.max_prompt_bytes,
            max_requests=config.engine.max_requests,
            has_chat_template=prompts.has_chat_template,
            abilities=loaded.info.abilities,
        )
        constraints = ConstraintCache(loaded.compiler)
        clock = loaded.engine.clock
        rights = Rights(loaded.store.labels_of)
        inference = InferenceServicer(
            frontend, prompts, constraints, limits, clock, config.max_request_s, rights, self._tracing.tracer
        )
        adapters = AdapterServicer(loaded.store, loader, rights)
        self._access.when_changed(adapters.watchers.begin_anew)
        edge = cast("Any", self._edge)  # takes handlers as a server does
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, edge)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(adapters, edge)
        server_info = ServerServicer(version("weft"), config, loaded.info)
        server_pb2_grpc.add_ServerServiceServicer_to_server(server_info, edge)

    async def _watch(self, frontend: Frontend) -> None:
        await frontend.lost.wait()
        self._metrics.engine_lost()
        await self._health.lost()


@asynccontextmanager
async def running_server(config: ServerConfig) -> AsyncIterator[Server]:
    """A server that serves; drained and closed at the end of the block."""
    async with _listening_server(config) as server:
        await server.load()
        yield server


async def serve(config: ServerConfig) -> None:
    """Serve until SIGTERM or SIGINT comes, then drain; a second signal ends the process at once.

    A signal that comes while the model loads ends the process, with exit code 0.

    Raises AddressUnavailable, InvalidConfig, InvalidModel, and Unavailable when the engine stopped by itself.
    """
    stop = asyncio.Event()
    asyncio.get_running_loop().set_exception_handler(log_loop_error)
    asyncio.get_running_loop().set_default_executor(full_pool(NUM_THREADS, "weft-work"))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, stop)
    failure: Unavailable | None = None
    async with _listening_server(config) as server:
        _log.info("listening on %s, loading %s", server.address, config.model.path)
        try:
            await _first_of(_serve_until_lost(server), stop.wait())
        except Unavailable as error:
            failure = error
    if server.is_loading_adapters or any(thread.name == _LOAD_THREAD for thread in threading.enumerate()):
        _log.info("stopped while loading")
        if failure is not None:
            _log.critical("%s", failure)
        # PyTorch aborts an interpreter that is taken down while it loads, which would first wait for its threads, too.
        os._exit(0 if failure is None else 1)
    if failure is not None:
        raise failure


async def _serve_until_lost(server: Server) -> None:
    await server.load()
    _log.info("serving %s", server.startup_line)
    await server.until_lost()
    raise Unavailable("the engine stopped unexpectedly; the log says how")


def _on_signal(number: signal.Signals, stop: asyncio.Event) -> None:
    if stop.is_set():
        _log.warning("%s again: stopping at once", number.name)
        os._exit(128 + number)  # whatever is still running is not to be waited for
    _log.info("%s: draining", number.name)
    stop.set()


@asynccontextmanager
async def _listening_server(config: ServerConfig) -> AsyncIterator[Server]:
    async with AsyncExitStack() as stack:
        server = Server(config)
        stack.push_async_callback(server.close)
        await server.open()
        stack.push_async_callback(server.drain)
        yield server


async def _first_of(*works: Coroutine[Any, Any, object]) -> None:
    """Run all until one ends, and cancel the others. Raises what that one raised."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _cancelled(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def _in_daemon_thread(work: Callable[[], Result]) -> Result:
    """As asyncio.to_thread, but the thread holds up neither its caller's cancellation nor the end of the process."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            future.set_exception(error)

    threading.Thread(target=run, name=_LOAD_THREAD, daemon=True).start()
    return await asyncio.wrap_future(future)


def _snapshot(store: AdapterStore) -> AdapterSnapshot:
    used, total = store.num_pages
    return AdapterSnapshot({state.value: number for state, number in store.num_in_state().items()}, used, total)
