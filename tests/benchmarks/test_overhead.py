"""The parts of a step that are timed are there, and are those of one step."""

from __future__ import annotations

import sys
from pathlib import Path

from tiny import make_model, save_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from overhead import measure_overhead


def test_every_part_of_every_step_is_timed(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path)
    save_tokenizer(tmp_path)
    overhead = measure_overhead(tmp_path, model.config.vocab_size, num_running=3, steps=4)
    assert {part: len(samples.values) for part, samples in overhead.parts.items()} == dict.fromkeys(
        ("schedule", "build", "forward", "sample", "commit", "step"), 4
    )
    assert 0 < overhead.rest < 1
