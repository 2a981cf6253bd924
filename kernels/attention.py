"""Attention over a paged KV cache on the CPU, by the C library: blocks are read where they lie."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from weft.kernels.native import FORMATS, Native

_POINTER, _INT64, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int

DTYPES = frozenset({torch.float32, torch.bfloat16})
"""Of caches that the library attends over; sums run in float32."""


@dataclass(frozen=True, slots=True)
class Run:
    """Rows [first_row, first_row + num_rows) of a step: the last of the first `context` tokens of one sequence.

    blocks: where these tokens are in the cache; more of them do no harm.
    """

    first_row: int
    num_rows: int
    context: int
    blocks: Sequence[int]


class _Job(ctypes.Structure):
    """As attention.c has it."""

    _fields_ = (
        *((name, _POINTER) for name in ("query", "key", "value", "out", "keys", "values")),
        *((name, _POINTER) for name in ("slots", "runs", "table", "sinks")),
        *((f"{name}_{of}", _INT64) for name in ("query", "key", "value") for of in ("head", "row")),
        *((name, _INT64) for name in ("rows", "num_runs", "heads", "kv_heads", "d", "d_v", "block_tokens", "window")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
        *((name, _INT) for name in ("both_sides", "format", "threads")),
    )


class PagedAttention:
    """One step's rows and where their contexts are; a call attends for one layer.

    What a row and head come to depends on their query and on what they see alone: it is the same to the bit however the
    prompt is cut into chunks, and whatever is beside it.
    """

    def __init__(self, native: Native, runs: Iterable[Run], slots: torch.Tensor, block_tokens: int) -> None:
        """runs: of all rows. slots: int64 [T], where the new keys and values go."""
        costly_first = sorted(runs, key=lambda run: -run.num_rows * run.context)
        table = array("q")
        placed = array("q")
        for run in costly_first:
            placed.extend((run.first_row, run.num_rows, run.context, len(table)))
            table.extend(run.blocks)
        self._kept = (slots, placed, table)
        self._attend = native.call.weft_attend
        self._job = _Job(
            slots=slots.data_ptr(),
            runs=placed.buffer_info()[0],
            table=table.buffer_info()[0],
            rows=len(slots),
            num_runs=len(costly_first),
            block_tokens=block_tokens,
            threads=native.threads,
        )

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        causal: bool = True,
    ) -> torch.Tensor:
        """Write the rows' keys and values into the cache; softmax(scale q k^T) v of each row over what it sees.

        query: [heads, T, d], key: [kv_heads, T, d], value: [kv_heads, T, d_v]; keys, values: the cache, [slots,
        kv_heads, d or d_v], dense, of the same dtype. window: how many tokens a row sees, itself and those before it.
        softcap: c, of c tanh(score / c). sinks: [heads], scores that take weight and give nothing. causal: False where
        a row sees as many tokens after it as before it; each run is a whole sequence then. Returns [T, heads, d_v].
        Raises ValueError where dtypes differ.
        """
        if any(tensor.dtype != query.dtype for tensor in (key, value, keys, values)):
            raise ValueError(f"a query in {query.dtype} is not for a cache in {keys.dtype}")
        query, key, value = map(_by_number, (query, key, value))
        sinks = None if sinks is None else sinks.float().contiguous()
        heads, rows, d = query.shape
        out = query.new_empty(rows, heads, value.shape[2])
        job = self._job
        job.query, job.key, job.value, job.out = (tensor.data_ptr() for tensor in (query, key, value, out))
        job.keys, job.values = keys.data_ptr(), values.data_ptr()
        job.query_head, job.query_row, _ = query.stride()
        job.key_head, job.key_row, _ = key.stride()
        job.value_head, job.value_row, _ = value.stride()
        job.heads, job.kv_heads, job.d, job.d_v = heads, len(key), d, value.shape[2]
        job.scale, job.softcap, job.window = scale, softcap or 0.0, window or 0
        job.sinks = None if sinks is None else sinks.data_ptr()
        job.both_sides = not causal
        job.format = FORMATS[query.dtype]
        self._attend(ctypes.byref(job))
        return out


def _by_number(tensor: torch.Tensor) -> torch.Tensor:
    """With the numbers of each row and head beside each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
