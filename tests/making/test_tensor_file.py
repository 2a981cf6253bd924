"""A safetensors file written tensor by tensor is one like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from weft.adapters.weights_file import read_tensors
from weft.errors import InvalidConfig
from weft.making.tensor_file import TensorFile

dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
tensors = st.builds(lambda shape, dtype: torch.randn(shape).to(dtype), st.lists(st.integers(0, 4), max_size=3), dtypes)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20), tensors))
def test_it_is_read_as_it_was_written(tmp_path: Path, written: dict[str, torch.Tensor]) -> None:
    """By safetensors, and by what reads adapters to be served; also where not all came that might."""
    path = tmp_path / "file.safetensors"
    with TensorFile(path, [*written, "and one that does not come"]) as file:
        for name, tensor in written.items():
            file.put(name, tensor)
    for found in (load_file(path), read_tensors(path, "it", 1 << 20)):
        assert found.keys() == written.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
        assert all(found[name].dtype == tensor.dtype for name, tensor in written.items())


def test_what_a_type_cannot_hold_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidConfig, match="--dtype float16 can't hold big: take another"),
        TensorFile(tmp_path / "file", ["big"]) as file,
    ):
        file.put("big", torch.tensor([1e6]), torch.float16)
