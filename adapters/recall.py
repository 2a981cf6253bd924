"""Reading known content again, without validating it again: files that have not changed hold what they held.

A file is taken to be unchanged when device, inode, size, mtime and ctime are those of a read that was validated: no
program can set ctime. As file systems' clocks tick coarsely, a file that had changed only just before that read is not
trusted (git calls such entries racy). Where anything differs, the whole validation runs.

What a `FileRecall` reads was once compared, number by number, with what validation made of the same files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

import torch

from weft.adapters.folder import WEIGHTS_FILE
from weft.adapters.pages import HostAdapter
from weft.adapters.peft_config import CONFIG_FILE
from weft.adapters.rows import HeldRows, RowForm
from weft.adapters.tensors import PREFIX

_FILES = (CONFIG_FILE, WEIGHTS_FILE)

_SETTLED_NS = 3_000_000_000
"""Since a file's last change; the coarsest clock of a file system in use ticks every two seconds (FAT)."""

_HALF = re.compile(re.escape(PREFIX) + r"(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_CHUNK_BYTES = 2 << 20
"""That are read and turned at a time, so that they are still in the processor's cache."""

_MAX_BUFFERS = 1024
"""That one call may fill: Linux's IOV_MAX."""

Stamp = tuple[tuple[int, int, int, int, int], ...]
"""Of both files: mtime and ctime in nanoseconds, device, inode, size."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A tensor of the file, in its order. shape: as rank rows, [rank, d]; is_b: stored transposed."""

    module: str
    shape: tuple[int, int]
    is_b: bool

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Layout:
    """Where a file of nothing but A and B of linear modules, all of one dtype, has them; start: of the first, bytes."""

    start: int
    dtype: torch.dtype
    pieces: tuple[_Piece, ...]

    def read(self, file: int, form: RowForm) -> HeldRows:
        """Rank rows by module. What needs no change is read to where it stays. Raises OSError."""
        shapes: dict[str, dict[bool, tuple[int, int]]] = {}
        for piece in self.pieces:
            shapes.setdefault(piece.module, {})[piece.is_b] = piece.shape
        held = form.make_room({module: (both[False], both[True]) for module, both in shapes.items()})
        chunk: list[_Piece] = []
        num_bytes, at = 0, self.start
        scratch = torch.empty(0, dtype=self.dtype)
        for piece in self.pieces:
            chunk.append(piece)
            num_bytes += piece.numel * self.dtype.itemsize
            if num_bytes >= _CHUNK_BYTES or piece is self.pieces[-1]:
                if scratch.nbytes < num_bytes:
                    scratch = torch.empty(num_bytes // self.dtype.itemsize, dtype=self.dtype)
                self._read_chunk(file, at, chunk, held, form, scratch)
                at += num_bytes
                chunk, num_bytes = [], 0
        return held

    def _read_chunk(
        self, file: int, at: int, chunk: Sequence[_Piece], held: HeldRows, form: RowForm, scratch: torch.Tensor
    ) -> None:
        """Fill the rows of some adjacent pieces; scratch has room for all."""
        aside, used = _bytes_of(scratch), 0
        buffers: list[memoryview] = []
        sources: list[tuple[_Piece, torch.Tensor]] = []
        for piece in chunk:
            part = held[piece.module][piece.is_b]
            if not piece.is_b and part.dtype == self.dtype:
                buffers.append(_bytes_of(part.view(-1)))
                continue
            source = scratch[used : used + piece.numel]
            buffers.append(aside[used * self.dtype.itemsize :][: source.nbytes])
            used += piece.numel
            sources.append((piece, source.view(piece.shape[::-1]).t() if piece.is_b else source.view(piece.shape)))
        _read_into(file, buffers, at)
        if form.dtype == torch.int8:
            for piece, source in sources:
                form.put(held[piece.module], piece.is_b, source)
        elif sources:
            torch._foreach_copy_(
                [held[piece.module][piece.is_b] for piece, _ in sources], [part for _, part in sources]
            )


@dataclass(frozen=True, slots=True)
class FileRecall:
    """Reads one content again from a source. bare: all of it but its rows, which are held in this form."""

    source: str
    stamp: Stamp
    layout: Layout
    form: RowForm
    bare: HostAdapter

    def read(self, folder: Path) -> HostAdapter | None:
        """None where the files are not those that they were. Raises OSError."""
        rows = _read_unchanged(folder, self.stamp, self.layout, self.form)
        return None if rows is None else replace(self.bare, rows=rows, recall=self)


class Recalls:
    """Makes recalls; those of files that are laid out alike share the layout. May be used from any thread."""

    def __init__(self, form: RowForm) -> None:
        self._form = form
        self._lock = Lock()
        self._layouts: WeakValueDictionary[bytes, Layout] = WeakValueDictionary()

    def remember(self, host: HostAdapter, source: str, folder: Path, before: Stamp | None) -> HostAdapter:
        """With a recall, if there can be one. before: the files' stamp when validation began to read them.

        Raises OSError.
        """
        layout = self._layout(folder) if host.rows and not host.patches else None
        if layout is None or before is None or time.time_ns() - max(max(each[:2]) for each in before) < _SETTLED_NS:
            return host
        rows = _read_unchanged(folder, before, layout, self._form)
        if rows is None or not _are_equal(rows, host.rows):
            return host
        bare = replace(host, rows={})
        return replace(host, recall=FileRecall(source, before, layout, self._form, bare))

    def _layout(self, folder: Path) -> Layout | None:
        with (folder / WEIGHTS_FILE).open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        key = hashlib.sha256(header).digest()
        with self._lock:
            known = self._layouts.get(key)
        if known is None:
            known = _layout_of(header)
            if known is not None:
                with self._lock:
                    known = self._layouts.setdefault(key, known)
        return known


def stamp_of(folder: Path) -> Stamp | None:
    """Of an adapter's files as they are now; None where they can't be looked at."""
    try:
        return _stamp([folder / name for name in _FILES])
    except OSError:
        return None


def _stamp(files: Sequence[Path | int]) -> Stamp:
    found = map(os.stat, files)
    return tuple((file.st_mtime_ns, file.st_ctime_ns, file.st_dev, file.st_ino, file.st_size) for file in found)


def _layout_of(header: bytes) -> Layout | None:
    """Of a safetensors header that was validated; None for a file that holds anything else."""
    entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
    dtypes = {entry["dtype"] for entry in entries.values()}
    matches = {name: _HALF.fullmatch(name) for name in entries}
    if len(dtypes) != 1 or not dtypes <= _DTYPES.keys():
        return None
    pieces: list[_Piece] = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        match, shape = matches[name], entry["shape"]
        if match is None or len(shape) != 2:
            return None
        is_b = match["half"] == "B"
        pieces.append(_Piece(match["module"], (shape[1], shape[0]) if is_b else (shape[0], shape[1]), is_b))
    return Layout(8 + len(header), _DTYPES[dtypes.pop()], tuple(pieces))


def _read_unchanged(folder: Path, stamp: Stamp, layout: Layout, form: RowForm) -> HeldRows | None:
    """None where the files are not those of the stamp: those that are opened, not what the paths lead to by then."""
    with ExitStack() as opened:
        files: list[int] = []
        for name in _FILES:
            files.append(os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK))
            opened.callback(os.close, files[-1])
        if _stamp(files) != stamp:
            return None
        rows = layout.read(files[-1], form)
        return rows if _stamp(files) == stamp else None


def _read_into(file: int, buffers: Sequence[memoryview], at: int) -> None:
    """Fill the buffers in turn with what is in the file from `at` on."""
    waiting = deque(buffers)
    while waiting:
        count = os.preadv(file, list(islice(waiting, _MAX_BUFFERS)), at)
        if count == 0:
            raise OSError(errno.EIO, "is shorter than it was")
        at += count
        while waiting and count >= len(waiting[0]):
            count -= len(waiting.popleft())
        if count:
            waiting[0] = waiting[0][count:]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _are_equal(some: HeldRows, others: HeldRows) -> bool:
    return some.keys() == others.keys() and all(
        torch.equal(row, other) for name in some for row, other in zip(some[name], others[name], strict=True)
    )
