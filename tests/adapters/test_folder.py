"""PEFT folders: read as they are, or refused with every reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bases import linear_base
from safetensors.torch import load_file, save_file
from tiny import make_adapter, make_model

from weft.adapters import patterns
from weft.adapters.content import LoraWeights
from weft.adapters.folder import load_folder
from weft.errors import InvalidAdapter

D = 64
Q = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"
Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    model = make_model("llama", folder / "base")
    return make_adapter(model, folder / "adapter", r=8, target_modules=["q_proj"])


@pytest.fixture
def adapter(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def shapes(layers: int = 3, d_out: int = D) -> Shapes:
    return {f"model.layers.{i}.self_attn.q_proj": (D, d_out) for i in range(layers)}


def load(folder: Path, on: Shapes | None = None) -> LoraWeights:
    return load_folder(folder, "test", linear_base(on or shapes()))


def refusal(folder: Path, on: Shapes | None = None) -> str:
    with pytest.raises(InvalidAdapter) as error:
        load(folder, on)
    return str(error.value)


def edit(folder: Path, change: Callable[[Tensors], object]) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def test_a_good_folder_is_read_whole(adapter: Path) -> None:
    weights = load(adapter)
    assert set(weights.modules) == set(shapes())
    assert (weights.ranks, weights.default_scale) == ((8,), 2.0)
    assert torch.equal(weights.modules[Q].a, load_file(adapter / "adapter_model.safetensors")[A])


def test_the_digest_is_of_what_the_adapter_computes(adapter: Path) -> None:
    first = load(adapter).digest
    assert first.startswith("sha256:")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.5}))
    assert load(adapter).digest == first
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 17}))
    assert load(adapter).digest != first
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    edit(adapter, lambda tensors: tensors[A].view(-1)[3].add_(1e-3))
    assert load(adapter).digest != first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(A), f"{Q}: has no lora_A"),
        (lambda t: t.pop(B), f"{Q}: has no lora_B"),
        (lambda t: (t.pop(A), t.pop(B)), f"{Q}: is targeted by adapter_config.json, but the file holds no tensors"),
        (lambda t: t.update({A: t[B], B: t[A]}), "has shape [64, 8]; this base and its config need [8, 64]"),
        (lambda t: t.update({A: torch.zeros(4, D)}), "has shape [4, 64]; this base and its config need [8, 64]"),
        (lambda t: t.update({A: torch.zeros(8, D, dtype=torch.int8)}), "is int8; must be one of float32"),
        (lambda t: t.update({A: torch.zeros(8, D).to(torch.float8_e5m2)}), "is float8_e5m2; must be one of"),
        (lambda t: t[A].fill_(float("nan")), "holds NaN or infinite values"),
        (lambda t: t[B].view(-1)[0].fill_(float("inf")), "holds NaN or infinite values"),
        (lambda t: t.update({A.replace("q_proj", "k_proj"): t[A].clone()}), "is not a module of this base"),
        (lambda t: t.update({A.replace("lora_A", "lora_embedding_A"): t[A].clone()}), "is nothing that adapter_config"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)}), "lm_head.weight: has a name that does not begin"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2, 2)}), "is nothing that adapter_config"),
        (lambda t: t.update({A.replace("lora_A", "base_layer.lora_A"): t[A].clone()}), f"{Q}: is not a module"),
        (lambda t: t.clear(), "holds no tensors for it"),
    ],
)
def test_wrong_tensors_are_refused_by_name(adapter: Path, change: Callable[[Tensors], object], words: str) -> None:
    assert words in refusal(edit(adapter, change))


def test_an_adapter_for_another_base_is_refused(adapter: Path) -> None:
    assert "need [32, 8]" in refusal(adapter, shapes(d_out=32))
    assert "model.layers.2.self_attn.q_proj: is not a module of this base" in refusal(adapter, shapes(layers=2))
    assert "model.layers.3.self_attn.q_proj: is targeted" in refusal(adapter, shapes(layers=4))


def test_a_pattern_that_takes_too_long_is_refused(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": r"(.+)+q_proj"}))
    monkeypatch.setattr(patterns, "MATCH_TIMEOUT_S", 0.0)
    assert "takes too long to match" in refusal(adapter)


def test_many_problems_are_cut_short_with_their_number(adapter: Path) -> None:
    assert "has 31 more problems" in refusal(adapter, shapes(layers=54))


def test_a_pickle_is_not_read(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin, a pickle" in refusal(adapter)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "has 0 bytes, too few"),
        (7, "has 7 bytes, too few"),
        (8, "claims a header of"),
        (100, "claims a header of"),
        (-1, "lies outside the 12,287 bytes of data"),
    ],
)
def test_a_truncated_file_is_refused(adapter: Path, keep: int, words: str) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert words in refusal(adapter)


def test_a_header_that_claims_too_much_is_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "claims a header of 1,152,921,504,606,846,976 bytes" in refusal(adapter)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in refusal(tmp_path / "nothing")
