"""The folder of --adapters: what lies in it is loaded, and while it is watched also updated and deleted."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from watchfiles import awatch

from weft.adapters.classes import CLASSES_FILE
from weft.adapters.folder import WEIGHTS_FILE
from weft.adapters.peft_config import CONFIG_FILE
from weft.adapters.records import AdapterChange, AdapterInfo, AdapterState, NewAdapter
from weft.adapters.store import AdapterStore
from weft.errors import AdapterNotFound, Unavailable
from weft.server.api.loading import AdapterLoader

_log = logging.getLogger(__name__)

QUIET_MS = 500
"""How long nothing must change before a change is acted on: a folder that is being copied is not looked at."""

LONGEST_MS = 300_000
LOOK_EVERY_MS = 5_000
"""For file systems that don't tell of changes, and links that lead out of the watched folder."""

_FILES = (CONFIG_FILE, WEIGHTS_FILE, CLASSES_FILE)

_Marks = tuple[tuple[int, int, int] | None, ...]
"""How each of the two files was last seen: inode, size and ctime, which no copy can set; None: it is not there."""


class AdapterFolders:
    """The PEFT folders directly under one folder; each is an adapter of its name.

    A name whose source is another than its folder belongs to whoever created it over the API, and is left alone.
    Everything but `watch` and `stop` blocks, and is called by one thread at a time.
    """

    def __init__(self, root: Path, allowed: Sequence[Path], store: AdapterStore, loader: AdapterLoader) -> None:
        """allowed: folders that a link may lead to a place in."""
        self._root = root.absolute()
        self._allowed = [folder.resolve() for folder in allowed]
        self._store = store
        self._loader = loader
        self._seen: dict[str, _Marks] = {}
        self._identity = self._identify()
        self._stop = asyncio.Event()

    def load_all(self) -> list[bool]:
        """Load every folder whose name is free; whether each was loaded."""
        self._seen = self._look()
        return [self._load(name) for name in sorted(self._seen) if self._info(name) is None]

    def catch_up(self) -> None:
        """Load the folders that are new, update those that changed, and delete those that are gone.

        One that fails is logged in one line, and tried again when it changes. One that lacks a file is left for later.
        """
        identity = self._identify()
        found = self._look()
        if identity is None or identity != self._identify():
            return
        if identity != self._identity and not found:  # a volume that went away, and what it was mounted on
            return
        self._identity = identity
        for name in sorted(self._seen.keys() - found):
            del self._seen[name]
            if self._owns(name):
                _log.info("adapter %s is deleted: its folder is gone", name)
                self._loader.delete_now(name)
        for name, marks in sorted(found.items()):
            if marks != self._seen.get(name) and None not in marks[:2]:
                self._seen[name] = marks
                self._bring(name)

    async def watch(self, look_every_ms: int = LOOK_EVERY_MS) -> None:
        """Catch up whenever the folder has changed and come to rest, and now and then without, until `stop`."""
        try:
            async for _ in awatch(
                self._root,
                watch_filter=None,
                debounce=LONGEST_MS,
                step=QUIET_MS,
                rust_timeout=look_every_ms,
                yield_on_timeout=True,
                ignore_permission_denied=True,
                stop_event=self._stop,
            ):
                try:
                    await self._loader.run(self.catch_up)
                except Unavailable as error:
                    _log.warning("--adapters %s: %s", self._root, error)
        except (OSError, RuntimeError) as error:  # the system's limits on watches, for one
            _log.warning(
                "--adapters %s can't be watched any more (%s): restart the server to load it", self._root, error
            )

    def stop(self) -> None:
        """Let `watch` end; on its event loop."""
        self._stop.set()

    def _bring(self, name: str) -> None:
        info = self._info(name)
        if info is None:
            self._load(name)
        elif not self._owns(name):
            _log.info("%s was not loaded: the adapter %s comes from %s", self._root / name, name, info.source)
        elif info.state is AdapterState.FAILED:
            self._loader.load_now(NewAdapter(name, info.source, info.labels, info.pinned))
        else:
            self._loader.update_now(name, AdapterChange(source=info.source))

    def _load(self, name: str) -> bool:
        folder = self._root / name
        target = folder.resolve()
        if not any(target.is_relative_to(root) for root in self._allowed):
            words = "%s was not loaded: it leads to %s; add that with --source-root %s"
            _log.warning(words, folder, target, target)
            return False
        return self._loader.load_now(NewAdapter(name, self._source(name)))

    def _owns(self, name: str) -> bool:
        """Whether the adapter of that name is the folder's."""
        info = self._info(name)
        return info is not None and info.source == self._source(name)

    def _info(self, name: str) -> AdapterInfo | None:
        try:
            return self._store.get(name)
        except AdapterNotFound:
            return None

    def _source(self, name: str) -> str:
        return f"file:{self._root / name}"

    def _identify(self) -> tuple[int, int] | None:
        """Device and inode of the folder itself; None where there is none."""
        try:
            found = self._root.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _look(self) -> dict[str, _Marks]:
        """How the folders stand that hold a config or weights, or both."""
        try:
            names = [entry.name for entry in os.scandir(self._root)]
        except OSError:
            return dict(self._seen)
        marks = {name: tuple(_mark(self._root / name / file) for file in _FILES) for name in names}
        return {name: found for name, found in marks.items() if any(found[:2])}


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_ctime_ns
