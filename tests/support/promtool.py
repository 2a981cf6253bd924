"""Prometheus' own checker, where `make` or the machine has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
PROMTOOL = shutil.which("promtool", path=_PATH)

needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is neither beside Python nor on the PATH")


def promtool(*args: str, text: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Its answer to a command; text: on standard input."""
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *args], input=text, capture_output=True, check=False, timeout=60)
