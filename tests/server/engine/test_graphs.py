"""Decode steps from buffers of fixed places give what steps run as they come give. Here, replaying is running again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from harness import Harness
from tiny import linear_names, make_adapter, make_model, save_tokenizer

from weft.server.engine.decode_attention import attend_gathered, attend_in_place
from weft.server.engine.graphs import Means, Run, replay_nothing, sizes_up_to
from weft.server.engine.request import Request, Sampling, Stopping

MAX_ROWS = 12


class Counting:
    """Captures nothing, and counts what it was asked for and how often that was run."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0
        self.most_rows = 0

    def __call__(self, run: Run) -> Run:
        self.captured += 1

        def replay() -> torch.Tensor:
            self.replayed += 1
            made = run()
            self.most_rows = max(self.most_rows, len(made))
            return made

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


def test_one_captured_step_serves_any_adapters(tmp_path: Path) -> None:
    """Mixed ranks, base rows and a mix of two, by the GPU's kernel; which rows there are changes from step to step."""
    pytest.importorskip("triton")
    from weft.kernels.triton_lora import DeviceWork

    model = make_model("llama", tmp_path / "base", num_hidden_layers=1)
    save_tokenizer(tmp_path / "base")
    adapters = {
        f"r{rank}": make_adapter(model, tmp_path / f"r{rank}", rank, r=rank, target_modules=linear_names("llama"))
        for rank in (4, 12)
    }
    requests = make_requests([None, "r4", "r12", "r4"], max_tokens=5)
    requests.append(replace(requests[0], request_id="mix", adapters=(("r4", 0.5), ("r12", -1.0))))
    options = {"speculative_tokens": 0, "adapter_probe": False}
    expected = serve(tmp_path / "base", adapters, None, requests, lora_backend="torch", **options)
    capture = Counting()
    means = Means(capture, attend_gathered, DeviceWork)
    assert serve(tmp_path / "base", adapters, means, requests, lora_backend="triton", **options) == expected
    assert capture.replayed > 2


def test_guesses_are_rows_of_a_captured_step(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    save_tokenizer(tmp_path)
    requests = [
        Request(f"r{i}", tuple([5, 6, 7, 8 + i] * 5), (), Sampling(seed=i), Stopping(max_tokens=14, ignore_eos=True))
        for i in range(3)
    ]
    capture = Counting()
    expected = serve(tmp_path, {}, None, requests, speculative_tokens=0)
    assert serve(tmp_path, {}, Means(capture, attend_gathered, None), requests, speculative_tokens=4) == expected
    assert capture.most_rows > len(requests)


def test_attention_in_place_gives_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    make_model("mistral", tmp_path, num_hidden_layers=1)
    save_tokenizer(tmp_path)
    requests = make_requests([None] * 3, max_tokens=5)
    expected = serve(tmp_path, {}, None, requests, speculative_tokens=0)
    means = Means(replay_nothing, attend_in_place, None)
    assert serve(tmp_path, {}, means, requests, speculative_tokens=0) == expected


def test_a_model_that_cannot_be_captured_is_run_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Run) -> Run:
        raise RuntimeError("operation not permitted when stream is capturing")

    make_model("llama", tmp_path)
    save_tokenizer(tmp_path)
    requests = make_requests([None] * 2)
    expected = serve(tmp_path, {}, None, requests)
    assert serve(tmp_path, {}, Means(refuse, attend_gathered, None), requests) == expected
    (record,) = [each for each in caplog.records if "captured" in each.message]
    assert "not permitted" in record.message


def test_steps_that_cannot_be_captured_are_run_as_they_come(tmp_path: Path) -> None:
    """Here, more rows than there is room for, and adapters where their kernel has no work list."""
    model = make_model("llama", tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    adapters = {"a": make_adapter(model, tmp_path / "a", 1, r=4, target_modules=linear_names("llama"))}
    capture = Counting()
    means = Means(capture, attend_gathered, None)
    requests = make_requests(["a", "a"])
    expected = serve(tmp_path / "base", adapters, None, requests)
    assert serve(tmp_path / "base", adapters, means, requests) == expected
    many = make_requests([None] * (MAX_ROWS + 1), max_tokens=MAX_ROWS + 3)
    assert serve(tmp_path / "base", {}, means, many) == serve(tmp_path / "base", {}, None, many)


def test_all_sizes_are_captured_at_the_start(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    save_tokenizer(tmp_path)
    capture = Counting()
    runner = Harness(tmp_path).engine._model.capture(Means(capture, attend_gathered, None), MAX_ROWS, 16)
    runner.warm_up()
    assert capture.captured == len(runner.sizes)
    assert not capture.replayed


def test_sizes_cover_every_number_of_rows_and_pad_by_little() -> None:
    for most in (1, 5, 8, 9, 64, 100):
        sizes = sizes_up_to(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        for rows in range(1, most + 1):
            padded = next(size for size in sizes if size >= rows)
            assert padded - rows <= max(3, rows // 4)
