"""The client in JavaScript, against a real server with the demo's adapters."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import served

from weft.demo import tasks
from weft.server.config import EngineConfig, ModelConfig, ServerConfig

ROOT = Path(__file__).parents[1]
DEMO_FOLDER = Path(tasks.__file__).parent
TASK = tasks.TASKS["upper"]
NODE, NPM = shutil.which("node"), shutil.which("npm")
OUT_OF_REACH = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ETIMEDOUT")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not on the PATH"),
]

Client = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    config = ServerConfig(
        ModelConfig(str(DEMO_FOLDER / "base")),
        EngineConfig(threads=1),
        adapters=DEMO_FOLDER / "adapters",
        port=0,
        metrics_port=0,
    )
    with served(config) as server:
        yield server.address


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Runs the client, installed in a copy of its surroundings."""
    root = tmp_path_factory.mktemp("node")
    folder = root / "examples" / "clients" / "node"
    shutil.copytree(ROOT / "protos", root / "protos")
    shutil.copytree(ROOT / "examples" / "clients" / "node", folder, ignore=shutil.ignore_patterns("node_modules"))
    installed = subprocess.run([NPM, "ci"], cwd=folder, check=False, capture_output=True, text=True, timeout=300)
    if any(code in installed.stderr for code in OUT_OF_REACH):
        pytest.skip("npm's registry is out of reach")
    assert installed.returncode == 0, installed.stderr

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [NODE, "client.mjs", *args], cwd=folder, check=False, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.mark.parametrize("options", [[], ["--stream"]], ids=["whole", "streamed"])
def test_it_prints_the_adapters_answer(client: Client, address: str, options: list[str]) -> None:
    (example,) = TASK.examples(tasks.HELD_OUT, 1, 0)
    ran = client(*options, address, tasks.prompt(example.text), TASK.name)
    assert (ran.returncode, ran.stdout) == (0, f"{example.answer}\n")
    assert ran.stderr.startswith("FINISH_REASON_STOP_TOKEN, ")


@pytest.mark.parametrize("options", [[], ["--stream"]], ids=["whole", "streamed"])
def test_without_an_adapter_the_base_answers(client: Client, address: str, options: list[str]) -> None:
    (example,) = TASK.examples(tasks.HELD_OUT, 1, 0)
    ran = client(*options, address, tasks.prompt(example.text))
    assert ran.returncode == 0
    assert ran.stdout != f"{example.answer}\n"


@pytest.mark.parametrize("options", [[], ["--stream"]], ids=["whole", "streamed"])
def test_a_refusal_is_one_line(client: Client, address: str, options: list[str]) -> None:
    ran = client(*options, address, "x=", "nobody")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("NOT_FOUND: adapter 'nobody'")
    assert ran.stderr.count("\n") == 1


def test_wrong_usage_is_told(client: Client) -> None:
    ran = client("127.0.0.1:1")
    assert (ran.returncode, ran.stderr.startswith("usage: ")) == (2, True)
