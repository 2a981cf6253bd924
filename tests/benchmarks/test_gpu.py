"""The GPU benchmark on a CPU: its own checks hold, and it runs through. What it times means nothing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from gpu import POPULARITIES, popularity

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.parametrize("kind", POPULARITIES)
@pytest.mark.parametrize("batch", [1, 8, 32, 128])
def test_popularities_are_punicas(kind: str, batch: int) -> None:
    counts = Counter(popularity(kind, batch))
    assert sum(counts.values()) == batch
    assert set(counts) == set(range(len(counts)))
    expected = {"identical": 1, "distinct": batch, "uniform": -(-(batch**0.5) // 1)}
    if kind == "skewed":
        assert sorted(counts.values(), reverse=True) == [counts[i] for i in range(len(counts))]
        assert batch < 32 or counts[0] > batch / 4
    else:
        assert len(counts) == expected[kind]


@pytest.mark.slow
def test_it_runs_through(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text("Before.\n<!-- gpu: begin -->\n<!-- gpu: end -->\nAfter.\n")
    made = tmp_path / "gpu.json"
    command = [sys.executable, PROGRAM, "--device", "cpu", "--shape", "tiny"]
    subprocess.run(
        [*command, "--json", made, "--report", document],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        capture_output=True,
    )
    result = json.loads(made.read_text())
    assert all(check["right"] for check in result["checks"])
    assert all(row["repeats"] for row in result["steps"])
    assert result["graphs"]["tokens_that_agree"] == result["graphs"]["rows"]
    assert all(row["same_tokens"] for row in result["ahead"])
    assert all(row["parts"] and row["largest_relative_error"] < 1e-5 for row in result["compiled"])
    text = document.read_text()
    assert text.startswith("Before.\n")
    assert "| 2 | 12 | distinct, 2 |" in text


def test_a_machine_without_a_gpu_is_told_in_one_line() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([sys.executable, PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("gpu.py: error: no GPU here: --device cpu")


def test_kernels_that_nothing_interprets_are_told_in_one_line() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, PROGRAM, "--device", "cpu", "--shape", "tiny"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "set TRITON_INTERPRET=1" in ran.stderr.splitlines()[-1]
