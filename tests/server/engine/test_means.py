"""What a device runs decode steps and adapters with."""

from __future__ import annotations

import pytest
import torch

from weft.errors import InvalidConfig
from weft.kernels.lora import has_triton
from weft.server.engine.means import backend_for, means_of

CPU = torch.device("cpu")


def test_nothing_is_captured_on_a_cpu() -> None:
    assert means_of(CPU, "torch") is None


def test_the_backend_that_is_asked_for_is_taken() -> None:
    assert backend_for(CPU, "reference", has_native=False) == "reference"
    assert backend_for(CPU, "auto", has_native=False) == "auto"


def test_triton_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = "does not run on cpu: use auto" if has_triton() else "is not installed"
    with pytest.raises(InvalidConfig, match=reason):
        backend_for(CPU, "triton", has_native=True)


def test_the_c_library_is_asked_for_where_there_is_one() -> None:
    assert backend_for(CPU, "cpu", has_native=True) == "cpu"
    with pytest.raises(InvalidConfig, match="the C library, which serves nothing here: it is for"):
        backend_for(CPU, "cpu", has_native=False)
