"""Run as a program: compiles the GPU's kernels for an H100 as they would be launched, without a GPU.

Prints, as JSON, what each came to: registers a thread, and bytes a thread that did not fit in them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from weft.kernels import triton_attention, triton_lora
from weft.kernels.site import SiteGroup
from weft.kernels.work_list import Room

LLAMA_3_8B = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CPU = torch.device("cpu")


class NoDriver:
    """Knows what to compile for, and nothing else."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Compiling:
    """In the place of a launch."""

    def __init__(self) -> None:
        self.name = ""
        self.made: list[dict[str, Any]] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        made = kernel.warmup(*arguments, grid=grid, **constants)
        self.made.append(
            {
                "kernel": f"{kernel.__name__} {self.name}",
                **usage(made.asm["cubin"]),
                "shared": made.metadata.shared,
                "threads": 32 * made.metadata.num_warps,
            }
        )


def usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", said)
    assert found is not None, said
    return {"registers": int(found[1]), "stack": int(found[2]), "spilled": int(found[3])}


def main() -> None:
    triton.runtime.driver.set_active(NoDriver())  # type: ignore[no-untyped-call]
    launch = Compiling()
    room = Room(entries=64, tiles=64, sites=224)
    for name, (d_in, d_outs) in LLAMA_3_8B.items():
        for dtype in DTYPES if name in ("qkv", "down") else DTYPES[:1]:
            launch.name = f"{name} {dtype}"
            group = SiteGroup(0, d_in, d_outs, 2, dtype, CPU)
            work = triton_lora.DeviceWork(room, CPU)
            triton_lora.shrink(torch.zeros(4, d_in, dtype=dtype), group, work, launch)
            triton_lora.expand(torch.zeros(4, sum(d_outs), dtype=dtype), group, work, launch)
    launch.name = "qkv torch.int8"
    group = SiteGroup(0, *LLAMA_3_8B["qkv"], 2, torch.int8, CPU)
    work = triton_lora.DeviceWork(room, CPU)
    triton_lora.shrink(torch.zeros(4, group.d_in, dtype=torch.bfloat16), group, work, launch)
    triton_lora.expand(torch.zeros(4, group.d_out, dtype=torch.bfloat16), group, work, launch)
    for dtype, dim in (
        (torch.bfloat16, 128),
        (torch.float16, 64),
        (torch.bfloat16, 256),
        (torch.float32, 128),
        (torch.float32, 64),
    ):
        launch.name = f"{dim} {dtype}"
        query, cache = torch.zeros(32, 4, dim, dtype=dtype), torch.zeros(64, 8, dim, dtype=dtype)
        tables, contexts = torch.zeros(8, 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
        triton_attention.attend_paged(query, cache, cache, tables, contexts, 16, scaling=0.1, launch=launch)
    sys.stdout.write(json.dumps(launch.made))


if __name__ == "__main__":
    main()
