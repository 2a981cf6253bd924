"""The Dockerfile: what is in the image, and as whom it runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from manifests import FOLDER

from weft.server.config import ServerConfig

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def copy_context(to: Path) -> None:
    """What .dockerignore lets through: everything is left out but the lines that begin with `!`."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[0] == "*"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "_native_*.so")
    for line in lines:
        if line.startswith("!"):
            source, target = ROOT / line[1:], to / line[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True, ignore=ignored)
            else:
                shutil.copy(source, target)


@pytest.mark.slow
def test_the_wheel_that_is_built_in_it_holds_the_c_library(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="builds without the network")
    source = tmp_path / "source"
    source.mkdir()
    copy_context(source)
    program = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert [name for name in wheel.namelist() if name.startswith("weft/kernels/_native_")]


def test_every_target_runs_as_the_number_that_the_manifests_want() -> None:
    users = re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)
    assert users == ["1000:1000"] * len(re.findall(r"^FROM base AS ", DOCKERFILE, re.MULTILINE))
    manifest = (FOLDER / "base" / "deployment.yaml").read_text()
    assert "runAsUser: 1000" in manifest
    assert "runAsGroup: 1000" in manifest


def test_it_names_the_ports_that_there_are() -> None:
    (exposed,) = re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)
    default = {field.name: field.default for field in ServerConfig.__dataclass_fields__.values()}
    assert exposed.split()[:2] == [str(default["port"]), str(default["metrics_port"])]
    assert f"health-port = {exposed.split()[2]}" in (FOLDER / "base" / "weft.toml").read_text()
