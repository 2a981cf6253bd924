"""A server for the commands that talk to one, and the commands."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Ran, Run
from serving import served
from tiny import make_adapter, make_model, save_tokenizer

from weft.server.app import Server
from weft.server.cli import main
from weft.server.config import EngineConfig, ModelConfig, ServerConfig

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run(*args: str) -> Ran:
        capfd.readouterr()
        exit_code = main(args)
        captured = capfd.readouterr()
        return Ran(exit_code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`; `adapters/one` and `two`, and one that is broken."""
    folders = tmp_path_factory.mktemp("cli")
    model = make_model("llama", folders / "base")
    save_tokenizer(folders / "base", CHAT_TEMPLATE)
    for seed, name in enumerate(("one", "two")):
        make_adapter(model, folders / "adapters" / name, seed=seed, target_modules=["q_proj", "v_proj"])
    (folders / "adapters" / "broken").mkdir()
    shutil.copy(folders / "adapters" / "one" / "adapter_config.json", folders / "adapters" / "broken")
    return folders


@pytest.fixture(scope="session")
def server(folders: Path) -> Iterator[Server]:
    """One with these adapters."""
    config = ServerConfig(
        model=ModelConfig(str(folders / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(max_batch_tokens=64, max_running_requests=8, kv_tokens=4096, adapter_pages=16),
        port=0,
        metrics_port=0,
        adapters=folders / "adapters",
    )
    with served(config) as server:
        yield server


@pytest.fixture(scope="session")
def address(server: Server) -> str:
    return server.address
