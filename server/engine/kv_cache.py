"""The tensors of the KV cache; who holds which block: `kv_blocks.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from weft.kernels.site import lazy_zeros
from weft.server.engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class KvShape:
    """Heads and head sizes of one layer's keys and values."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def numbers(self) -> int:
        """Numbers stored for one token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


class KvCache:
    """Keys and values of every layer: [slots, kv_heads, d], zero-filled, addressed by slot.

    There is one block more than asked for, from spare_slot on: rows that are only there to fill up a step write there.
    in_turn: layers of one shape use one place in turn, where nothing is kept from step to step.
    """

    def __init__(
        self,
        shapes: Mapping[int, KvShape],
        num_blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        in_turn: bool = False,
    ) -> None:
        slots = (num_blocks + 1) * block_tokens
        self.spare_slot = slots - block_tokens
        self.dtype = dtype
        self.device = device
        self.block_tokens = block_tokens
        places = {shape if in_turn else layer: shape for layer, shape in shapes.items()}
        made = {
            place: (
                lazy_zeros(slots, shape.kv_heads, shape.key_dim, dtype=dtype, device=device),
                lazy_zeros(slots, shape.kv_heads, shape.value_dim, dtype=dtype, device=device),
            )
            for place, shape in places.items()
        }
        self.layers = {layer: made[shape if in_turn else layer] for layer, shape in shapes.items()}

    def scrub(self, blocks: list[int]) -> None:
        """Zero blocks whose content was never seen to be finite: masked out is not enough, since 0 * NaN is NaN."""
        index = to_device(torch.tensor(blocks), self.device)
        for tensors in self.layers.values():
            for tensor in tensors:
                self._by_block(tensor).index_fill_(0, index, 0)

    def read(self, tensor: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Gather blocks: int64 [..., m] -> [..., m * block_tokens, kv_heads, d]."""
        gathered = self._by_block(tensor).index_select(0, blocks.flatten())
        return gathered.view(*blocks.shape[:-1], -1, *tensor.shape[1:])

    def _by_block(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, self.block_tokens, *tensor.shape[1:])
