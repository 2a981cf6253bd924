"""Tensors are what safetensors says they are, in memory of their own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weft.adapters.weights_file import read_tensors
from weft.errors import InvalidAdapter

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float8_e5m2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Tensors of every type and of odd sizes, so that some begin at odd bytes."""
    tensors = {f"t{i}": torch.arange(i * i).remainder(2).view(i, i).to(dtype) for i, dtype in enumerate(DTYPES)}
    save_file({**tensors, "scalar": torch.tensor(3.5)}, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_they_are_read_as_safetensors_reads_them(path: Path) -> None:
    ours, theirs = read_tensors(path, "test", most=1 << 10), load_file(path)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_they_stay_when_the_file_is_cut_short(path: Path) -> None:
    tensors = read_tensors(path, "test", most=1 << 10)
    os.truncate(path, 0)
    assert tensors["t1"].sum() == 0
    assert tensors["scalar"] == 3.5


def test_a_tensor_larger_than_any_use_is_not_read(path: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"t6: has shape \[6, 6\], larger than anything"):
        read_tensors(path, "test", most=35)
