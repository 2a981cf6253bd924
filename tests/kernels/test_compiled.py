"""The Triton kernels, compiled for an H100 where there is none: no thread needs more registers than there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


REGISTERS, SHARED_BYTES = 65536, 227 * 1024
"""Of one of the processor's parts."""

MIN_PROGRAMS = 3
"""That one part runs at once: while one waits for memory, the others compute."""


@pytest.mark.slow
def test_no_kernel_spills(tmp_path: Path) -> None:
    program = Path(__file__).parents[1] / "support" / "compiled.py"
    settings = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, program], env=settings, capture_output=True, text=True, check=True)
    compiled = json.loads(run.stdout)
    assert {each["kernel"].split()[0] for each in compiled} == {"shrink", "expand", "attend_part", "combine"}
    for each in compiled:
        assert each["stack"] == each["spilled"] == 0, each
        assert each["registers"] * each["threads"] <= REGISTERS // MIN_PROGRAMS, each
        assert each["shared"] <= SHARED_BYTES // MIN_PROGRAMS, each
