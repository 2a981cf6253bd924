"""Bases that can't be trained on are refused in a line, and nothing is left; a classifier's old head is no obstacle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from encoders import make_encoder
from safetensors.torch import load_file, save_file
from training_runs import judged, losses, make_base, recipe, shouted, trained, write_rows
from transformers import AutoModelForMaskedLM

from weft.errors import InvalidModel
from weft.making.training import train

WEIGHTS = "model.safetensors"
LACKING = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", shouted(8))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [*judged(11), {"text": "neither", "label": "so-so"}]
    return write_rows(tmp_path_factory.mktemp("data") / "texts.jsonl", rows)


def without_a_tensor(base: Path) -> None:
    tensors = load_file(base / WEIGHTS)
    del tensors[LACKING]
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})


def with_another_size(base: Path) -> None:
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "intermediate_size": 128}))


def cut_off(base: Path) -> None:
    with (base / WEIGHTS).open("r+b") as file:
        file.truncate(5000)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_a_tensor, f"lacks {LACKING}, or has them in other shapes"),
        (with_another_size, "can't be loaded to generate"),
        (cut_off, "can't be loaded to generate"),
        (lambda base: (base / "config.json").write_text("[]"), "can't be had"),
        (lambda base: (base / "tokenizer.json").write_text("{}"), "has no tokenizer that loads"),
        (shutil.rmtree, "is not a folder: name a Hugging Face model folder"),
    ],
    ids=["a tensor lacks", "another size", "cut off", "no config", "no tokenizer", "not there"],
)
def test_a_base_that_is_not_whole_is_refused(
    sound: Path, prompts: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    base = shutil.copytree(sound, tmp_path / "base")
    spoil(base)
    with pytest.raises(InvalidModel, match=message):
        train(recipe(base, prompts, tmp_path / "made"), "weft train")
    assert {path.name for path in tmp_path.iterdir()} <= {"base"}


def test_an_encoder_generates_nothing(prompts: Path, tmp_path: Path) -> None:
    """transformers would load it, with tokens that see what they are to predict."""
    make_encoder("bert", tmp_path / "base")
    with pytest.raises(InvalidModel, match="is an encoder, which generates nothing: give texts with labels"):
        train(recipe(tmp_path / "base", prompts, tmp_path / "made"), "weft train")


def test_an_encoder_without_its_pooler_is_refused(texts: Path, tmp_path: Path) -> None:
    """It would be drawn at random, and be another where the adapter is loaded."""
    make_encoder("bert", tmp_path / "base", AutoModelForMaskedLM)
    with pytest.raises(InvalidModel, match=r"lacks bert.pooler.dense.bias, bert.pooler.dense.weight"):
        train(recipe(tmp_path / "base", texts, tmp_path / "made"), "weft train")


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_a_classifier_may_have_had_other_labels(texts: Path, tmp_path: Path, kind: str) -> None:
    make_encoder(kind, tmp_path / "base")  # of two
    made = trained(tmp_path / "base", texts, tmp_path / "made", loop={"max_steps": 1})
    assert json.loads((made / "config.json").read_text())["id2label"] == {"0": "bad", "1": "nice", "2": "so-so"}


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_a_classifiers_loss_is_the_mean_of_all_batches_of_a_step(texts: Path, tmp_path: Path, kind: str) -> None:
    """transformers' own sequence classifiers do not divide by what the Trainer counts."""
    base = tmp_path / "base"
    if kind == "llama":
        make_base(base)
    else:
        make_encoder(kind, base)
    loops = [{"batch_size": 8 // count, "accumulate": count, "max_steps": 1, "clip": 0.0} for count in (1, 2)]
    once, twice = (trained(base, texts, tmp_path / f"in-{loop['accumulate']}", loop=loop) for loop in loops)
    assert losses(twice)[0] == pytest.approx(losses(once)[0], abs=1e-5)
    assert losses(twice, "grad_norm")[0] == pytest.approx(losses(once, "grad_norm")[0], rel=1e-4)
