"""One server with a tiny random Llama for all tests of the API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import grpc
import pytest
from house import ADAPTER_PAGES, CHAT_TEMPLATE, ENDLESS, MAX_PROMPT_BYTES, MAX_QUEUED, MAX_REQUEST_S, MAX_RUNNING, House
from tiny import make_adapter, make_model, save_tokenizer
from transformers import AutoTokenizer

from weft.server.app import Server, running_server
from weft.server.config import EngineConfig, ModelConfig, ServerConfig


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` with a tokenizer and a chat template; `adapters/one`, `two` and `three`, `huge`, and broken ones."""
    root = tmp_path_factory.mktemp("api")
    model = make_model("llama", root / "base", max_position_embeddings=65536)
    save_tokenizer(root / "base", CHAT_TEMPLATE)
    folders = root / "adapters"
    for seed, name in enumerate(("one", "two", "three")):
        make_adapter(model, folders / name, seed=seed, target_modules=["q_proj", "v_proj", "down_proj"])
    make_adapter(model, folders / "huge", r=8 * (ADAPTER_PAGES + 1), target_modules=["q_proj"])
    stranger = make_model("llama", root / "stranger", hidden_size=32, num_hidden_layers=1)
    make_adapter(stranger, folders / "stranger", target_modules=["q_proj", "k_proj"])
    (folders / "empty").mkdir()
    return root


@pytest.fixture(scope="session")
def house(root: Path) -> Iterator[House]:
    config = ServerConfig(
        model=ModelConfig(str(root / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(
            max_batch_tokens=64,
            max_running_requests=MAX_RUNNING,
            max_queued_requests=MAX_QUEUED,
            max_queued_tokens=1 << 20,
            max_queued_per_adapter=64,
            kv_tokens=(MAX_RUNNING + 1) * ENDLESS,
            adapter_pages=ADAPTER_PAGES,
        ),
        port=0,
        metrics_port=0,
        source_roots=(root / "adapters",),
        drain_grace_s=0.0,
        max_request_s=MAX_REQUEST_S,
        max_prompt_bytes=MAX_PROMPT_BYTES,
    )
    loop = asyncio.new_event_loop()
    started: Future[Server] = Future()
    over = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(_serve(config, started, over),))
    thread.start()
    try:
        server = started.result(120)
        tokenizer = AutoTokenizer.from_pretrained(root / "base")
        with grpc.insecure_channel(server.address) as channel:
            house = House(channel, server, loop, root, tokenizer)
            for name in ("one", "two"):
                house.create(name, name)
            yield house
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


@pytest.fixture
def leaves_nothing_behind(house: House) -> Iterator[None]:
    """Deletes what the test has created, and audits."""
    names = {info.name for info in house.store.list()}
    yield
    for info in house.store.list():
        if info.name not in names:
            house.delete(info.name)
    house.audit()


async def _serve(config: ServerConfig, started: Future[Server], over: asyncio.Event) -> None:
    try:
        async with running_server(config) as server:
            started.set_result(server)
            await over.wait()
    except BaseException as error:
        if not started.done():
            started.set_exception(error)
        raise
