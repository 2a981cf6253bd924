"""`weft classify` and `weft embed` against a server of this process."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import served
from tiny import make_classifier, make_model, save_tokenizer

from weft.server.cli import main
from weft.server.config import EngineConfig, ModelConfig, ServerConfig

LABELS = ("negative", "neutral", "positive")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("cli-classify")
    make_model("llama", root / "base", num_hidden_layers=1)
    save_tokenizer(root / "base")
    for name, labels, problem_type in (
        ("mood", LABELS, None),
        ("topics", LABELS, "multi_label_classification"),
        ("stars", ("stars",), None),
    ):
        folder = root / "adapters" / name
        make_classifier(root / "base", folder, labels, target_modules=["q_proj"], problem_type=problem_type)
    config = ServerConfig(
        model=ModelConfig(str(root / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(max_batch_tokens=64, max_running_requests=4, kv_tokens=512, adapter_pages=16),
        adapters=root / "adapters",
        port=0,
        metrics_port=0,
    )
    with served(config) as server:
        yield server.address


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(args)
    return code, *capsys.readouterr()


def test_each_label_is_printed_with_its_score(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(capsys, "classify", "good morning", "--adapter", "mood", "--address", address)
    rows = [line.split() for line in output.splitlines()]
    assert code == 0
    assert rows[0] == ["label", "score", "logit"]
    assert [row[0] for row in rows[1:]] == [*LABELS]
    assert sum(float(row[1]) for row in rows[1:]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("adapter", ["mood", "topics", "stars"])
def test_lines_of_standard_input_are_labelled_one_by_one(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo words\n"))
    code, output, _ = run(capsys, "classify", "-", "--adapter", adapter, "--address", address)
    lines = [line.split("\t") for line in output.splitlines()]
    assert code == 0
    assert [text for _, text in lines] == ["one", "two words"]
    known = {"mood": LABELS, "topics": LABELS, "stars": ("stars",)}[adapter]
    for told, _ in lines:
        pairs = [each.split() for each in told.split(", ") if each]
        assert all(label in known for label, _ in pairs)
        if adapter == "topics":
            assert all(float(score) > 0.5 for _, score in pairs)
        else:
            assert len(pairs) == 1


def test_what_is_left_out_is_said(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("classify", "a" * 9, "--adapter", "mood", "--address", address)
    code, _, errors = run(capsys, *args, "--truncate", "4")
    assert (code, errors) == (0, "6 tokens at the end were left out\n")
    code, output, _ = run(capsys, *args, "--truncate", "4", "--json")
    assert code == 0
    assert json.loads(output)["truncated_tokens"] == 6
    assert run(capsys, *args, "--truncate")[0] == 0


def test_a_vector_is_printed_as_json(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output, _ = run(capsys, "embed", "good morning", "--address", address, "--pooling", "mean")
    vector = json.loads(output)
    assert code == 0
    assert len(vector) == 64
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-5)
    monkeypatch.setattr("sys.stdin", io.StringIO("good morning\nother\n"))
    code, output, _ = run(capsys, "embed", "-", "--address", address, "--pooling", "mean", "--adapter", "mood", "--raw")
    assert code == 0
    assert len(output.splitlines()) == 2


def test_what_goes_wrong_is_one_line(address: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, errors = run(capsys, "classify", "x", "--adapter", "nobody", "--address", address)
    assert code == 1
    assert "nobody" in errors
    code, _, errors = run(capsys, "embed", "x", "--pooling", "cls", "--address", address)
    assert code == 1
    assert "this base serves POOLING_LAST, POOLING_MEAN" in errors
    code, _, errors = run(capsys, "classify", "x", "--address", address)
    assert code == 1
    assert "the base has no classification head: name an adapter that has one" in errors
