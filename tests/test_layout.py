"""The shape of the code: which way imports point, how it stands beside transformers, what a wheel holds."""

from __future__ import annotations

import ast
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "weft"
FOLDERS = {
    "weft/adapters": ROOT / "adapters",
    "weft/demo": ROOT / "examples" / "demo",
    "weft/kernels": ROOT / "kernels",
    "weft/making": ROOT / "making",
    "weft/server": ROOT / "server",
    "weft/v1": SOURCE / "v1",
}

# What each room may import besides itself and the bare `weft`; a room not listed here is a mistake.
ROOMS = {
    "weft": set[str](),
    "weft.errors": set[str](),
    "weft.v1": set[str](),
    "weft.demo": set[str](),
    "weft.kernels": {"weft.errors"},
    "weft.adapters": {"weft.errors", "weft.kernels"},
    "weft.making": {"weft.errors", "weft.kernels", "weft.adapters"},
    "weft.server.bench": {"weft.errors", "weft.v1"},
    "weft.server.config": {"weft.errors"},
    "weft.server.busiest": set[str](),
    "weft.server.vllm_metrics": set[str](),
    "weft.server.metrics": {"weft.server.busiest", "weft.server.vllm_metrics"},
    "weft.server.ports": {"weft.errors"},
    "weft.server.transport": set[str](),
    "weft.server.calls": set[str](),
    "weft.server.threads": set[str](),
    "weft.server.logs": {"weft.errors", "weft.server.calls"},
    "weft.server.tracing": {"weft.errors"},
}
ROOMS["weft.server.engine"] = {
    "weft.errors",
    "weft.kernels",
    "weft.adapters",
    "weft.server.config",
    "weft.server.metrics",
}
ROOMS["weft.server.api"] = ROOMS["weft.server.engine"] | {
    "weft.server.engine",
    "weft.server.calls",
    "weft.server.threads",
    "weft.v1",
}
ROOMS["weft.server.watching"] = ROOMS["weft.server.api"] | {"weft.server.api"}
ROOMS["weft.server.app"] = ROOMS["weft.server.watching"] | {
    "weft.server.watching",
    "weft.server.logs",
    "weft.server.ports",
    "weft.server.tracing",
    "weft.server.transport",
}
ROOMS["weft.server.cli"] = ROOMS["weft.server.app"] | {
    "weft.server.app",
    "weft.server.bench",
    "weft.making",
    "weft.demo",
}

WIRE = {"grpc", "grpc_health", "grpc_reflection", "grpc_status", "google"}
FORBIDDEN_LIBRARIES = {
    "weft.kernels": WIRE | {"transformers", "peft", "safetensors"},
    "weft.adapters": WIRE,
    "weft.making": WIRE,
    "weft.server.engine": WIRE,
}


def modules() -> dict[str, Path]:
    files = {"weft": SOURCE / "__init__.py", "weft.errors": SOURCE / "errors.py"}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = (*package.split("/"), *path.relative_to(folder).with_suffix("").parts)
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


def imports(module: str, path: Path) -> Iterator[str]:
    """Dotted names of all that the module imports, inside functions too; `from a import b` gives `a.b`."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def room_of(name: str) -> str | None:
    """The room that holds the dotted name; None for what isn't ours."""
    fitting = [room for room in ROOMS if name == room or name.startswith(f"{room}.")]
    return max(fitting, key=len, default=None)


MODULES = modules()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    room = room_of(module)
    assert room is not None
    assert room != "weft" or module == "weft", f"{module} lies in no room"
    allowed = ROOMS[room] | {room, "weft"}
    found = list(imports(module, MODULES[module]))
    assert [name for name in found if (room_of(name) or room) not in allowed] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_top_folders_are_imported_as_weft_only(module: str) -> None:
    found = imports(module, MODULES[module])
    assert [name for name in found if name.split(".")[0] in ("adapters", "demo", "kernels", "making", "server")] == []


@pytest.mark.parametrize("room", FORBIDDEN_LIBRARIES)
def test_a_room_knows_nothing_of_what_is_outside_it(room: str) -> None:
    found = {
        (module, name)
        for module, path in MODULES.items()
        for name in imports(module, path)
        if room_of(module) == room and name.split(".")[0] in FORBIDDEN_LIBRARIES[room]
    }
    assert found == set()


def test_an_arrow_that_runs_back_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text("def f():\n    from weft.server import engine\n    from ..adapters import store\n")
    found = list(imports("weft.kernels.late", path))
    assert found == ["weft.server.engine", "weft.adapters.store"]
    assert [room_of(name) in ROOMS["weft.kernels"] for name in found] == [False, False]


@pytest.mark.slow
def test_transformers_takes_no_folder_for_the_hubs_kernels() -> None:
    """A top-level package called `kernels` would be probed, imported and believed in."""
    program = """
import importlib.metadata, sys
import transformers
from transformers.utils.import_utils import is_kernels_available
try:
    importlib.metadata.version("kernels")
except importlib.metadata.PackageNotFoundError:
    assert "kernels" not in sys.modules
    assert not is_kernels_available()
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def build(tmp_path: Path, hook: str, environment: Mapping[str, str] | None = None) -> Path:
    """What setuptools makes of the sources by `build_wheel` or `build_sdist`."""
    pytest.importorskip("setuptools", reason="builds without the network")
    source = tmp_path / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "_native_*.so")
    for name in ("adapters", "examples", "kernels", "making", "server", "src"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, source)
    shutil.copy(ROOT / "LICENSE", source)

    program = f"from setuptools import build_meta; build_meta.{hook}({str(tmp_path)!r})"
    everything = {**os.environ, **(environment or {})}
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True, env=everything)
    return next(tmp_path.glob("weft-*"))


@pytest.mark.slow
def test_a_wheel_holds_real_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tmp_path, "build_wheel")) as wheel:
        held = {info.filename: wheel.read(info) for info in wheel.infolist()}
    wanted = {"weft/__init__.py": SOURCE / "__init__.py", "weft/py.typed": SOURCE / "py.typed"}
    for package, folder in FOLDERS.items():
        kept = [*folder.rglob("*.py"), *folder.glob("*.pyi")]
        if package == "weft/demo":
            kept += [path for part in ("base", "adapters") for path in (folder / part).rglob("*")]
        wanted |= {f"{package}/{path.relative_to(folder)}": path for path in kept if path.is_file()}
    assert {name: held.get(name) for name in wanted} == {name: path.read_bytes() for name, path in wanted.items()}
    libraries = [name for name in held if name.startswith("weft/kernels/_native_")]
    assert len(libraries) == (3 if platform.machine() in ("x86_64", "AMD64") else 1)
    assert not [name for name in held if name.endswith((".c", ".h"))]


@pytest.mark.slow
def test_without_a_compiler_a_wheel_is_built_all_the_same(tmp_path: Path) -> None:
    with zipfile.ZipFile(build(tmp_path, "build_wheel", {"CC": "no-such-compiler"})) as wheel:
        names = wheel.namelist()
    assert "weft/kernels/native.py" in names
    assert not [name for name in names if "_native_" in name]


@pytest.mark.slow
def test_a_source_distribution_can_build_the_library(tmp_path: Path) -> None:
    with tarfile.open(build(tmp_path, "build_sdist")) as sources:
        names = {name.partition("/")[2] for name in sources.getnames()}
    assert {f"kernels/c/{path.name}" for path in (ROOT / "kernels" / "c").iterdir()} <= names
    assert "setup.py" in names


WALL_CLOCK = {
    ("adapters/recall.py", "time_ns"),  # beside the times of files
    ("server/api/access/tls.py", "now"),  # a certificate's end is a time of day
    ("server/api/access/tokens.py", "time"),  # so is a token's
    ("server/api/spans.py", "time_ns"),  # traces are told in it
    ("server/engine/load.py", "time"),  # when adapters were created and used, to be shown
    ("server/metrics.py", "time"),  # a sample's value, as vLLM has it
}
"""Where the time of day is asked for: it may jump, so it decides only whether files are new and credentials hold."""


def test_nothing_is_decided_by_a_clock_that_may_jump() -> None:
    asked = set()
    for folder in ("adapters", "kernels", "making", "server"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    name = (node.value.id, node.attr)
                    is_wall = name in {("time", "time"), ("time", "time_ns")} or name[0] in {"datetime", "date"}
                    if is_wall and node.attr in {"time", "time_ns", "now", "utcnow", "today"}:
                        asked.add((str(path.relative_to(ROOT)), node.attr))
    assert asked == WALL_CLOCK
