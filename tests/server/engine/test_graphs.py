"""Decode steps from buffers of fixed places give what steps run as they come give. Here, replaying is running again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Harness
from tiny import make_model, save_tokenizer

from weft.server.engine.decode_attention import attend_gathered
from weft.server.engine.graphs import Means, Run, sizes_up_to
from weft.server.engine.request import Request, Sampling, Stopping

MAX_ROWS = 12


class Counting:
    """Captures nothing, and counts what it was asked for and how often that was run."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0

    def __call__(self, run: Run) -> Run:
        self.captured += 1

        def replay() -> torch.Tensor:
            self.replayed += 1
            return run()

        return replay


def serve(
    base: Path, adapters: dict[str, Path], means: Means | None, requests: list[Request], **engine: object
) -> list[list[int]]:
    harness = Harness(base, adapters, **engine)
    if means is not None:
        harness.engine._model.capture(means, MAX_ROWS, 16)
    return [answer.ids for answer in harness.run(requests, [i % 3 for i in range(len(requests))])]


def make_requests(names: list[str | None], max_tokens: int = 12) -> list[Request]:
    return [
        Request(
            f"r{i}",
            tuple(range(3 + i, 9 + 3 * i)),
            ((name, 1.0),) if name else (),
            Sampling(temperature=float(i % 2), seed=i),
            Stopping(max_tokens=max_tokens - i, ignore_eos=True),
        )
        for i, name in enumerate(names)
    ]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_padded_steps_give_the_tokens_of_steps_run_as_they_come(kind: str, tmp_path: Path) -> None:
    make_model(kind, tmp_path)
    save_tokenizer(tmp_path)
    capture = Counting()
    requests = make_requests([None] * 10)
    expected = serve(tmp_path, {}, None, requests, speculative_tokens=0)
    assert serve(tmp_path, {}, Means(capture, attend_gathered, None), requests, speculative_tokens=0) == expected
    assert capture.replayed > capture.captured >= 2, "steps of several sizes were replayed"


def test_sizes_cover_every_number_of_rows_and_pad_by_little() -> None:
    for most in (1, 5, 8, 9, 64, 100):
        sizes = sizes_up_to(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        for rows in range(1, most + 1):
            padded = next(size for size in sizes if size >= rows)
            assert padded - rows <= max(3, rows // 4)
