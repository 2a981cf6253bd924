"""Products with frozen weights, packed once for the C library."""

from __future__ import annotations

import torch
from torch.nn import functional

from weft.kernels.native import FORMATS, Native


class PackedLinear:
    """y = x W^T + b; each number of y is summed in float32, in the same order whatever the other rows are.

    linear.c describes the layout. A float32 weight whose numbers are all bfloat16's, as those of most checkpoints are,
    is kept in bfloat16: the same products from half the bytes.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, native: Native) -> None:
        """weight: [d_out, d_in], float32 or bfloat16; bias: [d_out] of the same dtype; both are copied."""
        self.d_out, self.d_in = weight.shape
        self.dtype = weight.dtype
        self._linear = native.call.weft_linear
        self._threads = native.threads
        self._panel = native.panel
        self._packed, is_exact = _pack(weight, torch.bfloat16, native)
        if not is_exact:
            self._packed, _ = _pack(weight, torch.float32, native)
        self._formats = FORMATS[self._packed.dtype], FORMATS[weight.dtype]
        missing = -self.d_out % native.panel
        self._bias = None if bias is None else functional.pad(bias.float(), (0, missing))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., d_in] of the weight's dtype -> [..., d_out]. Raises ValueError for another x."""
        if x.dtype != self.dtype or x.shape[-1] != self.d_in:
            raise ValueError(f"a product of {self.d_in} {self.dtype} is not for {tuple(x.shape)} in {x.dtype}")
        rows = x.reshape(-1, self.d_in).float()
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        y = x.new_empty((*x.shape[:-1], self.d_out))
        self._linear(
            rows.data_ptr(),
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            y.data_ptr(),
            len(rows),
            self.d_in,
            self.d_out,
            rows.stride(0),
            self.d_out,
            *self._formats,
            self._threads,
        )
        return y

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it holds: the weight, and the bias, if there is one, both packed."""
        return (self._packed,) if self._bias is None else (self._packed, self._bias)

    @property
    def nbytes(self) -> int:
        """Memory that the weight takes."""
        return self._packed.nbytes

    def weight(self) -> torch.Tensor:
        """The weight as it was given, [d_out, d_in]."""
        by_panel = self._packed.permute(0, 2, 1) if self._packed.dim() == 3 else self._packed.permute(0, 3, 2, 1)
        return by_panel.reshape(-1, self.d_in)[: self.d_out].to(self.dtype)


def _pack(weight: torch.Tensor, dtype: torch.dtype, native: Native) -> tuple[torch.Tensor, bool]:
    """The weight in panels: [panels, d_in, PANEL], of halves [panels, d_in, PANEL / 2, 2].

    False where the dtype does not hold each of its numbers, and what was packed is of no use.
    """
    weight = weight.contiguous()
    columns = (native.panel,) if dtype == torch.float32 else (native.panel // 2, 2)
    packed = torch.zeros(-(-len(weight) // native.panel), weight.shape[1], *columns, dtype=dtype)
    formats = FORMATS[weight.dtype], FORMATS[dtype]
    is_exact = native.call.weft_pack(weight.data_ptr(), packed.data_ptr(), *weight.shape, *formats, native.threads)
    return packed, bool(is_exact)
