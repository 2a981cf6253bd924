"""The C library's files: one that is spoilt or left over is told of and not used, and the process lives on."""

from __future__ import annotations

import shutil
import subprocess
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from weft.kernels import native as native_module
from weft.kernels.native import find_native, is_usable, sources_digest

SOURCES = Path(native_module.__file__).resolve().parent / "c"


@pytest.fixture
def build(tmp_path: Path) -> Path:
    found = find_native(1)
    if found is None:
        pytest.skip("the C library was not built")
    return Path(shutil.copy(found.call._name, tmp_path / "_native.so"))


@pytest.mark.parametrize("size", [0, 10, 2000, 60_000])
def test_a_file_that_is_cut_off_is_not_loaded(build: Path, size: int, caplog: pytest.LogCaptureFixture) -> None:
    build.write_bytes(build.read_bytes()[:size])
    assert not is_usable(build)
    assert not is_usable(build)
    assert caplog.messages == ["_native.so is not used: it is not whole; build it again, or reinstall"]


def test_a_file_that_is_no_library_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "text.so"
    path.write_text("no library " * 100)
    assert not is_usable(path)
    assert "text.so is not used: " in caplog.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-DWEFT_SOURCES=1ull", *map(str, SOURCES.glob("*.c"))), "it was built from other sources"),
        ((str(SOURCES / "processor.c"),), "undefined symbol: weft_panel"),
    ],
)
def test_a_build_of_other_sources_is_not_used(
    build: Path, flags: tuple[str, ...], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no compiler")
    other = build.with_name("other.so")
    subprocess.run([compiler, "-w", "-fPIC", "-shared", "-pthread", *flags, "-o", other], check=True)
    assert is_usable(build)
    assert not is_usable(other)
    assert words in caplog.text


def test_another_file_among_the_sources_is_seen(tmp_path: Path) -> None:
    assert sources_digest(tmp_path) == 0
    shutil.copytree(SOURCES, tmp_path, dirs_exist_ok=True)
    assert sources_digest(tmp_path) == sources_digest(SOURCES)
    (tmp_path / "pool.c").write_text("")
    assert sources_digest(tmp_path) != sources_digest(SOURCES)


def test_a_spoilt_build_leaves_torch(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.write_bytes(build.read_bytes()[:2000])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: ModuleSpec(name, None, origin=str(build)))
    assert find_native(1) is None
