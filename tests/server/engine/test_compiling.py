"""--compile: the same numbers by PyTorch's compiler, each part once for any number of rows, and nothing unproven."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path

import pytest
import torch
from harness import Harness
from tiny import linear_names, make_adapter, make_model, save_tokenizer
from torch._dynamo.utils import counters

from weft.errors import InvalidConfig
from weft.kernels import pointwise_compiled as compiled
from weft.kernels.pointwise_compiled import CompiledPointwise
from weft.server.engine.decode_attention import attend_gathered
from weft.server.engine.graphs import Means, replay_nothing
from weft.server.engine.request import Pooling, Request, Sampling, Stopping

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # the compiler's own use of it
]

NAMES = (None, "r4", "r12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compiling")
    model = make_model("llama", root / "base", num_hidden_layers=2)
    save_tokenizer(root / "base")
    for rank in (4, 12):
        make_adapter(model, root / f"r{rank}", rank, r=rank, target_modules=linear_names("llama"))
    return root


def start(folder: Path, **engine: object) -> Harness:
    adapters = {name: folder / name for name in NAMES if name}
    return Harness(folder / "base", adapters, adapter_probe=False, speculative_tokens=0, **engine)


@pytest.fixture(scope="module")
def served(folder: Path) -> Harness:
    return start(folder, compile=True)


def ask(count: int) -> list[Request]:
    return [
        Request(
            f"r{i}",
            tuple(range(3 + i, 9 + 3 * i)),
            ((name, 1.0),) if (name := NAMES[i % 3]) else (),
            Sampling(),
            Stopping(max_tokens=6 + i, ignore_eos=True),
        )
        for i in range(count)
    ]


def test_mixed_rows_give_the_same_tokens_and_logits(folder: Path, served: Harness) -> None:
    plain = start(folder, compile=False)
    ours, theirs = (torch.cat(harness.logits(ask(5), 4)) for harness in (served, plain))
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5
    for count in (1, 2, 9):
        arrivals = [i % 3 for i in range(count)]
        expected = [answer.ids for answer in plain.run(ask(count), arrivals)]
        assert [answer.ids for answer in served.run(ask(count), arrivals)] == expected
    pooled = Request(
        "pooled", tuple(range(3, 40)), (("r4", 1.0),), stopping=Stopping(max_tokens=0), pooling=Pooling.MEAN
    )
    vector, plain_vector = (harness.run([pooled])[0].vector for harness in (served, plain))
    assert vector is not None
    assert plain_vector is not None
    assert (vector - plain_vector).norm() / plain_vector.norm() <= 1e-5


def test_nothing_is_compiled_after_the_start(served: Harness) -> None:
    """Whatever the number of rows, on the thread of an engine and in captured steps."""
    num_compiled = counters["stats"]["unique_graphs"]
    assert num_compiled
    served.engine._model.capture(Means(replay_nothing, attend_gathered, None), 16, 40).warm_up()
    for count in (1, 2, 5, 11):
        thread = threading.Thread(target=served.run, args=(ask(count),))
        thread.start()
        thread.join()
    assert counters["stats"]["unique_graphs"] == num_compiled


def test_the_log_says_what_was_compiled(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        start(folder, compile=True)
    (record,) = [record for record in caplog.records if "--compile" in record.message]
    assert "5 norms, 2 rotary embeddings, 2 activations run compiled; compiling took" in record.message


def test_what_gives_other_numbers_compiled_runs_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def miscompile(pointwise: CompiledPointwise) -> None:
        pointwise._functions = {compiled._norm: lambda *args: compiled._norm(*args) * 1.01}

    monkeypatch.setattr(CompiledPointwise, "compile", miscompile)
    harness = start(folder, compile=True)
    assert harness.engine._model.fusion is not None
    assert not harness.engine._model.fusion.fused
    assert "gives other numbers compiled, so nothing runs compiled" in caplog.text


def test_where_nothing_can_be_compiled_it_is_told_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: CompiledPointwise, device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(CompiledPointwise, "check", fail)
    with pytest.raises(
        InvalidConfig, match=r"--compile .* fails on cpu \(.*Failed to find C compiler.*\): install a C\+\+"
    ):
        start(folder, compile=True)
