"""How a device runs decode steps: what there is on this machine."""

from __future__ import annotations

import os

import torch

from weft.errors import InvalidConfig
from weft.kernels.lora import has_triton
from weft.server.engine.decode_attention import attend_in_place
from weft.server.engine.graphs import CudaCapture, Means


def means_of(device: torch.device, lora_backend: str) -> Means | None:
    """None where decode steps are not captured: without CUDA, or without Triton, which attends in place."""
    if device.type != "cuda" or not has_triton():
        return None
    from weft.kernels.triton_lora import DeviceWork  # noqa: PLC0415 - Triton is not everywhere

    return Means(CudaCapture(device), attend_in_place, DeviceWork if lora_backend == "triton" else None)


def backend_for(device: torch.device, wanted: str, *, has_native: bool) -> str:
    """The name of the LoRA backend: the one that is wanted, or the fastest there is for the device.

    has_native: whether the model computes with the C library. Raises InvalidConfig for one that this machine has not.
    """
    if wanted == "triton" and not has_triton():
        raise InvalidConfig("--lora-backend is triton, which is not installed: pip install 'weft[cuda]'")
    if wanted == "triton" and device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        raise InvalidConfig(f"--lora-backend is triton, which does not run on {device}: use auto")
    if wanted == "cpu" and not has_native:
        raise InvalidConfig(
            "--lora-backend is cpu, the C library, which serves nothing here: it is for float32 and bfloat16 on a CPU, "
            "once it was built; use auto"
        )
    if wanted == "auto" and device.type == "cuda" and has_triton():
        return "triton"  # until there is a table of a GPU
    return wanted
