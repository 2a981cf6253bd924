"""A safetensors file that is written tensor by tensor, so that no more than one of them is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from weft.adapters.content import is_finite
from weft.errors import InvalidConfig

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ENTRY_BYTES = 160
"""More than the header takes for a tensor beside its name."""


class TensorFile:
    """Use as a context manager. The header, which stands before the tensors and tells of all, is written last."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        """names: all that may come, for which room is left in the header."""
        self._room = -(-sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names) // 8) * 8 + _ENTRY_BYTES
        self._file = path.open("wb")
        self._file.seek(8 + self._room)
        self._entries: dict[str, object] = {}
        self._num_bytes = 0

    def put(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """dtype: to round to first. Raises OSError where it can't be written, InvalidConfig where that overflows."""
        data = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        if not is_finite(data):
            raise InvalidConfig(f"--dtype {str(data.dtype).removeprefix('torch.')} can't hold {name}: take another")
        self._file.write(data.view(-1).view(torch.uint8).numpy().data)
        end = self._num_bytes + data.nbytes
        entry = {"dtype": _DTYPES[data.dtype], "shape": list(data.shape), "data_offsets": [self._num_bytes, end]}
        self._entries[name] = entry
        self._num_bytes = end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}).encode()
                assert len(header) <= self._room, "every tensor was announced"
                self._file.seek(0)
                self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
