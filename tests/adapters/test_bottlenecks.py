"""Folders of bottleneck adapters, as Weft has them: served, or refused with every reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import linear_base
from safetensors.torch import save_file

from weft.adapters.base import Base
from weft.adapters.content import digest_of
from weft.adapters.folder import load_folder
from weft.errors import InvalidAdapter

D = 8
MODULES = ("layers.0.o", "layers.0.down", "layers.1.o", "layers.1.down")
FIELDS = {
    "weft_type": "bottleneck",
    "non_linearity": "relu",
    "reads": "sum",
    "target_modules": ["down"],
    "exclude_modules": [],
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base() -> Base:
    shapes = dict.fromkeys((*MODULES, "layers.0.q"), (D, D))
    return replace(linear_base(shapes), residuals=dict.fromkeys(MODULES, "norm"))


def write(folder: Path, fields: dict[str, Any] | None = None, change: Callable[[Tensors], object] = dict) -> Path:
    tensors: Tensors = {}
    for layer in range(2):
        shapes = {"down.weight": (3, D), "down.bias": (3,), "up.weight": (D, 3), "up.bias": (D,)}
        tensors |= {f"layers.{layer}.down.{part}": torch.ones(shape) for part, shape in shapes.items()}
    change(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(FIELDS | (fields or {})))
    return folder


def test_what_is_right_is_read(base: Base, tmp_path: Path) -> None:
    weights = load_folder(write(tmp_path), "here", base)
    assert weights.touched == ("layers.0.down", "layers.1.down")
    assert weights.ranks == (3,)
    assert weights.num_bytes == 4 * 2 * (3 * D + 3 + D * 3 + D)


@pytest.mark.parametrize("fields", [{"non_linearity": "gelu"}, {"reads": "output"}])
def test_the_digest_is_of_all_that_is_computed(base: Base, tmp_path: Path, fields: dict[str, str]) -> None:
    plain = load_folder(write(tmp_path / "plain"), "here", base)
    other = load_folder(write(tmp_path / "other", fields), "here", base)
    assert digest_of(plain) == plain.digest != other.digest


def test_a_layer_may_be_left_out_by_name(base: Base, tmp_path: Path) -> None:
    def without_first(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("layers.0.")]:
            del tensors[name]

    folder = write(tmp_path, {"exclude_modules": ["layers.0.down"]}, without_first)
    assert load_folder(folder, "here", base).touched == ("layers.1.down",)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weft_type": "prefix"}, "weft_type: is 'prefix'; must be 'bottleneck'"),
        ({"non_linearity": "swish"}, "non_linearity: is 'swish'; must be one of silu, "),
        ({"non_linearity": None}, "non_linearity: is None; must be one of"),
        ({"reads": "all"}, "reads: is 'all'; must be one of output, residual, sum"),
        ({"reads": ["sum"]}, "reads: is ['sum']; must be one of"),
        ({"target_modules": "down"}, "target_modules: is 'down'; must be a list of module names"),
        ({"exclude_modules": None}, "exclude_modules: is None; must be a list"),
        ({"scale": 2}, "'scale': is not a field of a bottleneck adapter"),
        ({"target_modules": ["down", "q"]}, "layers.0.q: does not end a sub-layer of this base"),
        ({"target_modules": ["down", "o"]}, "layers.0.o.down.weight: is targeted and not in the file"),
        ({"target_modules": ["own"]}, "layers.0.down.down.bias: is nothing that is targeted"),
        ({"exclude_modules": ["layers.0.down"]}, "layers.0.down.up.bias: is nothing that is targeted"),
        ({"exclude_modules": ["layers.2.down"]}, "layers.2.down: does not end a sub-layer of this base"),
    ],
)
def test_a_field_that_can_not_be_served_is_named(
    base: Base, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        load_folder(write(tmp_path, fields), "here", base)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("down.weight", torch.ones(3, D + 1), "has shape [3, 9]; this base and the other parts need [3, 8]"),
        ("down.weight", torch.ones(()), "has shape []"),
        ("down.weight", torch.ones(0, D), "has shape [0, 8]"),
        ("up.weight", torch.ones(D, 4), "has shape [8, 4]; this base and the other parts need [8, 3]"),
        ("up.bias", torch.ones(D, dtype=torch.int32), "is int32, no float type"),
        ("up.bias", torch.full((D,), torch.nan), "holds NaN or infinite values"),
        ("up.weight", torch.ones(D, 5 * D), "larger than anything that an adapter of this base and config can hold"),
    ],
)
def test_a_tensor_that_can_not_be_served_is_named(
    base: Base, tmp_path: Path, name: str, tensor: torch.Tensor, words: str
) -> None:
    folder = write(tmp_path, change=lambda tensors: tensors.update({f"layers.1.down.{name}": tensor}))
    with pytest.raises(InvalidAdapter) as caught:
        load_folder(folder, "here", base)
    assert f"layers.1.down.{name}: " in str(caught.value)
    assert words in str(caught.value)


def test_a_deeper_base_than_it_was_made_for_is_refused(base: Base, tmp_path: Path) -> None:
    deeper = replace(
        linear_base(dict.fromkeys((*MODULES, "layers.2.down"), (D, D))),
        residuals={
            **base.residuals,
            "layers.2.down": "norm",
        },
    )
    with pytest.raises(InvalidAdapter, match=r"layers\.2\.down\.up\.weight: is targeted and not in the file"):
        load_folder(write(tmp_path), "here", deeper)
