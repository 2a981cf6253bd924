"""Sequence classifiers: an adapter with a head and labels of its own, or every reason why it is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import linear_base
from safetensors.torch import load_file, save_file
from tiny import make_classifier, make_model

from weft.adapters.base import Base, BaseModule, ModuleKind
from weft.adapters.classes import Classes, ProblemType, to_classes
from weft.adapters.content import LoraWeights
from weft.adapters.folder import load_folder
from weft.adapters.heads import MAX_LABELS
from weft.adapters.pages import PageConfig, PagePool
from weft.adapters.report import module_reports
from weft.errors import InvalidAdapter

D = 64
LABELS = ("negative", "neutral", "positive")
SCORE = "base_model.model.score.weight"
Tensors = dict[str, torch.Tensor]


def base() -> Base:
    linear = linear_base({f"model.layers.{i}.self_attn.q_proj": (D, D) for i in range(3)})
    shape = (260, D)
    table = BaseModule(ModuleKind.EMBEDDING, *shape, {"weight": shape}, lambda key: torch.zeros(shape), lambda _: len)
    return replace(linear, modules={**linear.modules, "model.embed_tokens": table}, embedding="model.embed_tokens")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifiers")
    make_model("llama", folder / "base")
    return make_classifier(folder / "base", folder / "adapter", LABELS, target_modules=["q_proj"])


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def load(folder: Path) -> LoraWeights:
    return load_folder(folder, "test", base())


def edit(folder: Path, change: Callable[[Tensors], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_head_and_its_labels_are_part_of_the_adapter(adapter: Path) -> None:
    weights = load(adapter)
    assert weights.head is not None
    assert weights.head.classes == Classes(LABELS, ProblemType.SINGLE_LABEL, pad_token_id=0)
    assert torch.equal(weights.head.weight, load_file(adapter / "adapter_model.safetensors")[SCORE])
    (head,) = [part for part in module_reports(weights, base(), []) if part.name == "score"]
    assert head.kind == "own head: single_label_classification of 3: negative, neutral, positive"
    assert head.num_bytes == 3 * D * 4


def test_both_count_for_its_identity(adapter: Path) -> None:
    digests = {load(adapter).digest}
    configure(adapter, id2label={"0": "bad", "1": "neutral", "2": "good"})
    digests.add(load(adapter).digest)
    configure(adapter, problem_type="multi_label_classification")
    digests.add(load(adapter).digest)
    edit(adapter, lambda tensors: tensors[SCORE].mul_(2))
    digests.add(load(adapter).digest)
    configure(adapter, torch_dtype="float16", label2id={"x": 1})
    digests.add(load(adapter).digest)
    assert len(digests) == 4


def test_it_takes_its_place_in_host_memory_and_on_the_device(adapter: Path) -> None:
    pool = PagePool(base(), PageConfig(8, torch.bfloat16, torch.device("cpu")))
    host = pool.prepare(load(adapter), "test")
    rows = sum(half.nbytes for halves in host.rows.values() for half in halves)
    assert host.num_bytes == rows + 3 * D * 4
    assert host.num_pages == host.num_row_pages + 1
    assert host.modules[-1] == "score"
    head = pool.write(pool.allocate(host), host).head
    assert head is not None
    assert head.weight.dtype is torch.float32


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Classes(("LABEL_0", "LABEL_1", "LABEL_2"), ProblemType.SINGLE_LABEL)),
        ({"num_labels": 3}, Classes(("LABEL_0", "LABEL_1", "LABEL_2"), ProblemType.SINGLE_LABEL)),
        (
            {"id2label": {"2": "c", "0": "a", "1": "b"}, "problem_type": "multi_label_classification"},
            Classes(("a", "b", "c"), ProblemType.MULTI_LABEL),
        ),
        (
            {"id2label": {"0": "x", "1": "y", "2": "z"}, "problem_type": "regression"},
            Classes(("x", "y", "z"), ProblemType.REGRESSION),
        ),
    ],
)
def test_the_config_says_what_the_outputs_are(adapter: Path, fields: dict[str, Any], expected: Classes) -> None:
    (adapter / "config.json").write_text(json.dumps(fields))
    head = load(adapter).head
    assert head is not None
    assert head.classes == expected


def test_without_a_config_labels_are_those_of_transformers_and_one_output_is_a_regression(adapter: Path) -> None:
    (adapter / "config.json").unlink()
    head = load(adapter).head
    assert head is not None
    assert head.classes.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    edit(adapter, lambda tensors: tensors.update({SCORE: tensors[SCORE][:1].clone()}))
    head = load(adapter).head
    assert head is not None
    assert head.classes == Classes(("LABEL_0",), ProblemType.REGRESSION)


def test_what_pads_is_the_bases_unless_the_config_says_something_else(adapter: Path) -> None:
    def pads(**fields: Any) -> tuple[int | None, str]:
        (adapter / "config.json").write_text(json.dumps(fields))
        weights = load_folder(adapter, "test", replace(base(), pad_token_id=3))
        assert weights.head is not None
        return weights.head.classes.pad_token_id, weights.digest

    cases = [pads(), pads(pad_token_id=7), pads(pad_token_id=None)]
    assert [pad for pad, _ in cases] == [3, 7, None]
    assert len({digest for _, digest in cases}) == 3


def test_as_many_labels_as_a_head_may_have_are_told_apart_at_once() -> None:
    labels = tuple(f"{index:x}" for index in range(MAX_LABELS))
    raw = {"id2label": {str(index): label for index, label in enumerate(labels)}}
    assert to_classes(raw, "test", MAX_LABELS).labels == labels


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pad_token_id": "<pad>"}, "config.json: pad_token_id: is '<pad>'; must be a token id"),
        ({"num_labels": 2}, "config.json: num_labels: is 2; the head has 3 outputs"),
        ({"num_labels": True}, "config.json: num_labels: is True"),
        ({"id2label": {"0": "a", "1": "b"}}, "id2label: has 2 keys; must name the head's 3 outputs, from 0 to 2"),
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "must name the head's 3 outputs"),
        ({"id2label": ["a", "b", "c"]}, "must name the head's 3 outputs"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "names several outputs 'a': give each its own label"),
        ({"id2label": {"0": "a", "1": "b", "2": 7}}, "holds 7, which is no label"),
        ({"id2label": {"0": "a", "1": "b", "2": "two\nlines"}}, "which is no label"),
        ({"problem_type": "ranking"}, "problem_type: is 'ranking'; must be one of single_label_classification"),
        ({"problem_type": ["regression"]}, "problem_type: is ['regression']; must be one of"),
    ],
)
def test_labels_that_cannot_be_the_heads_are_refused(adapter: Path, fields: dict[str, Any], words: str) -> None:
    configure(adapter, **fields)
    with pytest.raises(InvalidAdapter) as error:
        load(adapter)
    assert words in str(error.value)


@pytest.mark.parametrize("content", ["[]", "{", '{"id2label": 1, "id2label": 2}', " " * (1 << 20) + "{}"])
def test_a_config_that_is_no_object_is_refused(adapter: Path, content: str) -> None:
    (adapter / "config.json").write_text(content)
    with pytest.raises(InvalidAdapter, match=r"config\.json: (can't be read as JSON|must hold|is larger than)"):
        load(adapter)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(SCORE), "the file holds neither of score and classifier"),
        (lambda t: t.update({SCORE.replace("score", "classifier"): t[SCORE].clone()}), "the file holds both of score"),
        (
            lambda t: t.update({SCORE: t[SCORE][:, :5].clone()}),
            "score.weight: has shape [3, 5]; this base needs [3,",
        ),
        (lambda t: t.update({SCORE: t[SCORE][:0].clone()}), "score.weight: has 0 labels"),
        (lambda t: t.update({SCORE: t[SCORE][0].clone()}), "score: must be one linear module"),
        (lambda t: t.update({SCORE.replace("weight", "bias"): torch.zeros(2)}), "score.bias: has shape [2]"),
        (lambda t: t.update({SCORE.replace("weight", "dense"): torch.zeros(2)}), "score.dense: is nothing"),
        (lambda t: t[SCORE].fill_(float("nan")), "score.weight: holds NaN"),
        (lambda t: t.update({SCORE: t[SCORE].long()}), "score.weight: is torch.int64"),
        (
            lambda t: t.update({SCORE.replace("score", "score.dense"): torch.zeros(D, D)}),
            "score.dense: is not a module of this base",
        ),
    ],
)
def test_a_head_of_another_kind_is_refused(adapter: Path, change: Callable[[Tensors], object], words: str) -> None:
    edit(adapter, change)
    with pytest.raises(InvalidAdapter) as error:
        load(adapter)
    assert words in str(error.value)


def test_a_head_in_an_adapter_that_is_no_classifier_is_refused(adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": "CAUSAL_LM"}))
    with pytest.raises(InvalidAdapter, match="score: is not a module of this base"):
        load(adapter)
