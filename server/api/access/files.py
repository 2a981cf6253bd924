"""Files that are read again when they have changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from weft.errors import InvalidConfig

_log = logging.getLogger(__name__)

Value = TypeVar("Value")

Opening: TypeAlias = Callable[[Path], Path]
"""Called with each file before it is read, which it returns."""

_Mark = tuple[int, int, int] | None
"""Inode, size and ctime, which no copy can set; None: it can't be had."""


class Reloading(Generic[Value]):
    """What some files hold together. Where they can't be read again, what was read before stays."""

    def __init__(
        self,
        what: str,
        load: Callable[[Opening], Value],
        use: Callable[[Value], None],
        count: Callable[[str, str], None],
    ) -> None:
        """load: blocks, and raises InvalidConfig. use: is called on the thread that calls `start`, or the event loop's.

        count: is told what was read again, and "ok" or "failed".
        """
        self._what = what
        self._load = load
        self._use = use
        self._count = count
        self._taken: dict[Path, _Mark] = {}
        self._last: dict[Path, _Mark] = {}

    def start(self) -> None:
        """Read for the first time; blocks. Raises InvalidConfig."""
        self._use(self._read())

    async def catch_up(self) -> None:
        """Read again if the files have changed since they were read, and not since the last look at them."""
        found = await asyncio.to_thread(_marks, self._taken)
        rests, self._last = found == self._last, found
        if not rests or found == self._taken:
            return
        try:
            value = await asyncio.to_thread(self._read_again)
        except InvalidConfig as error:
            _log.warning("%s; what was read before stays", error)
            self._count(self._what, "failed")
            return
        except Exception:  # noqa: BLE001 - files, however odd, must not keep others from being read again
            _log.exception("%s could not be read again; what was read before stays", self._what)
            self._count(self._what, "failed")
            return
        self._use(value)
        self._count(self._what, "ok")
        _log.info("%s: read again", self._what)

    def _read_again(self) -> Value:
        def check(path: Path) -> None:
            if path.is_fifo():  # a shell's `<(…)` is read once; then it would be waited for for ever
                raise InvalidConfig(f"{path} is a pipe, and can't be read again")

        return self._read(check)

    def _read(self, check: Callable[[Path], None] = lambda _: None) -> Value:
        opened: dict[Path, _Mark] = {}

        def opening(path: Path) -> Path:
            opened.update(_marks([path]))
            check(path)
            return path

        try:
            value = self._load(opening)
        except Exception:  # it goes on; but what was looked at is known, and not read again until it changes
            self._taken = _marks(self._taken) | opened
            raise
        self._taken = opened
        return value


def _marks(files: Iterable[Path]) -> dict[Path, _Mark]:
    return {path: _mark(path) for path in files}


def _mark(path: Path) -> _Mark:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns
