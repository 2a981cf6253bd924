"""A remote folder's files, copied into a cache: resumed where they stopped, bounded, and verified."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from filelock import FileLock

from weft.adapters.classes import CLASSES_FILE
from weft.adapters.folder import WEIGHTS_FILE
from weft.adapters.json_files import MAX_JSON_BYTES
from weft.adapters.locations import Location
from weft.adapters.peft_config import CONFIG_FILE, is_classifier
from weft.errors import InvalidAdapter, Problem, Unavailable

_log = logging.getLogger(__name__)

MAX_ADAPTER_BYTES = 4 << 30
MAX_TRIES = 10
"""Of one file, each of which must bring it on; one that brings nothing is the last."""

LOG_EVERY_S = 5.0

SLOWEST_BYTES = 1 << 20
SLOWEST_S = 60.0
"""A transfer must bring so many bytes in so many seconds, or more: one that drips would hold its thread for ever."""

_NEW = "new-"
_WHOLE = "whole"

OnProgress = Callable[[str, int, int | None], None]
"""Told of a source, the bytes of its weights that are here, and how many there are where that is known."""


class BrokenTransfer(Exception):
    """A transfer that ended early or could not begin; what came is kept, and the next try goes on from there."""


class MissingFile(InvalidAdapter):
    """The remote has no such file."""

    def __init__(self, location: Location, name: str) -> None:
        super().__init__(str(location), [Problem(name, f"is missing at {location.url}")])


class StaleTransfer(BrokenTransfer):
    """The remote has another version than the one that was begun: what came of that is of no use."""


@dataclass(frozen=True, slots=True)
class Have:
    """What is here of a file: a whole copy of one version of it, and the first bytes of another."""

    copy: str = ""
    part: str = ""
    part_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """One version of a file on its way. start: the first byte that comes. size: of the whole file, where it is known.

    version: says which content it is, or empty where the remote can't say; then nothing is resumed or used again.
    """

    start: int
    size: int | None
    version: str
    chunks: Iterator[bytes]


class Remote(Protocol):
    """A kind of place that files come from."""

    def open(self, location: Location, name: str, have: Have) -> AbstractContextManager[Reply | None]:
        """A file of the folder; None where the copy that is here is still what the remote has.

        Raises InvalidAdapter where there is no such file or it may not be had; BrokenTransfer, also while the chunks
        are read.
        """


@dataclass(frozen=True, slots=True)
class Limits:
    """What a download may be, and who hears of it. clock: in seconds."""

    max_bytes: int = MAX_ADAPTER_BYTES
    on_progress: OnProgress = lambda source, done, total: None
    clock: Callable[[], float] = time.monotonic

    def check(self, location: Location, name: str, num_bytes: int) -> None:
        """Raises InvalidAdapter where a file is larger than it may be."""
        problem = self.problem(name, num_bytes)
        if problem is not None:
            raise InvalidAdapter(str(location), [problem])

    def problem(self, name: str, num_bytes: int) -> Problem | None:
        """What is wrong with a file of so many bytes, if anything."""
        limit, option = (self.max_bytes, " (--max-adapter-bytes)") if name == WEIGHTS_FILE else (MAX_JSON_BYTES, "")
        if num_bytes <= limit:
            return None
        return Problem(name, f"has {num_bytes:,} bytes or more; {limit:,} are allowed{option}")


class Pace:
    """Whether a transfer is fast enough, from its beginning on."""

    def __init__(self, location: Location, name: str, clock: Callable[[], float]) -> None:
        self._what = f"{name} of {location}"
        self._clock = clock
        self._begun_s = clock()
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Tell of bytes that came. Raises Unavailable where they were too few for too long."""
        self._num_bytes += num_bytes
        now = self._clock()
        passed_s = now - self._begun_s
        if passed_s < SLOWEST_S:
            return
        if self._num_bytes / passed_s < SLOWEST_BYTES / SLOWEST_S:
            words = f"{self._num_bytes:,} bytes in {passed_s:.0f} s"
            raise Unavailable(f"{self._what} comes too slowly ({words}): try again")
        self._begun_s, self._num_bytes = now, 0


@dataclass(frozen=True, slots=True)
class _Copy:
    """A whole file: where it lies, which version it is, and its SHA-256."""

    path: Path
    version: str
    sha256: str


class Downloads:
    """A cache folder. Copies in it never change: a new version of a source comes to lie in a folder of its own.

    Every method may be called from any thread, and several servers may share the folder.
    """

    def __init__(self, cache: Path, limits: Limits) -> None:
        self._cache = cache
        self._limits = limits

    def fetch(self, location: Location, remote: Remote) -> Path:
        """The local copy of a remote folder, brought up to date; blocks. One source is fetched once at a time.

        Raises InvalidAdapter, Unavailable.
        """
        home = self._cache / location.scheme / hashlib.sha256(location.url.encode()).hexdigest()[:32]
        try:
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(home / "lock"):
                return _Download(home, location, remote, self._limits).run()
        except OSError as error:
            raise Unavailable(f"the download can't be kept in --cache {self._cache} ({error.strerror})") from None


@dataclass(frozen=True, slots=True)
class _Download:
    """One fetch of one source into its folder of the cache."""

    home: Path
    location: Location
    remote: Remote
    limits: Limits

    def run(self) -> Path:
        try:
            return self._bring()
        finally:
            self._sweep()

    def _bring(self) -> Path:
        latest = self._latest()
        weights = latest.get(WEIGHTS_FILE)
        pin = self.location.sha256
        if pin and weights is not None and weights.sha256 == pin:
            return weights.path.parent
        config = self._pull(CONFIG_FILE, latest.get(CONFIG_FILE))
        fresh = self._pull(WEIGHTS_FILE, weights)
        if pin and fresh.sha256 != pin:
            words = f"has SHA-256 {fresh.sha256}, and the source asks for {pin}"
            raise InvalidAdapter(str(self.location), [Problem(WEIGHTS_FILE, words)])
        if fresh is not weights and self._pull(CONFIG_FILE, config).sha256 != config.sha256:
            raise Unavailable(f"{self.location} changed while it was fetched: try again")
        copies = {CONFIG_FILE: config, WEIGHTS_FILE: fresh}
        if is_classifier(config.path):
            with suppress(MissingFile):
                copies[CLASSES_FILE] = self._pull(CLASSES_FILE, latest.get(CLASSES_FILE))
        return self._keep(copies)

    def _pull(self, name: str, known: _Copy | None) -> _Copy:
        """A file's version of now: the copy that is here, or a new one."""
        part = _Part(self.home / f"{name}.part")
        reason = ""
        for _ in range(MAX_TRIES):
            before = part.num_bytes
            try:
                version = self._pull_once(name, known, part)
            except StaleTransfer as error:
                reason = str(error)
                part.drop()
            except BrokenTransfer as error:
                reason = str(error)
                if part.num_bytes == before:
                    break
            else:
                return known if known is not None and version is None else part.finish(version or "")
        raise Unavailable(f"{name} of {self.location} can't be fetched now ({reason}): try again")

    def _pull_once(self, name: str, known: _Copy | None, part: _Part) -> str | None:
        """Bring the part to its end; its version, or None where the known copy is still right."""
        have = Have(known.version if known else "", part.version, part.num_bytes)
        with self.remote.open(self.location, name, have) as reply:
            if reply is None:
                return None
            self.limits.check(self.location, name, reply.size or 0)
            if reply.start != have.part_bytes or reply.start == 0:
                part.restart(reply.version)
            pace = Pace(self.location, name, self.limits.clock)
            with part.path.open("ab") as file:
                done = file.tell()
                for chunk in reply.chunks:
                    done += len(chunk)
                    self._check_size(name, done, part)
                    file.write(chunk)
                    if name == WEIGHTS_FILE:
                        self.limits.on_progress(str(self.location), done, reply.size)
                    pace.add(len(chunk))
            if reply.size is not None and done != reply.size:
                if done > reply.size:
                    part.drop()
                raise BrokenTransfer(f"{done:,} of {reply.size:,} bytes came")
            return reply.version

    def _check_size(self, name: str, num_bytes: int, part: _Part) -> None:
        try:
            self.limits.check(self.location, name, num_bytes)
        except InvalidAdapter:
            part.drop()
            raise

    def _latest(self) -> dict[str, _Copy]:
        """The copies of the last fetch, if they are whole."""
        try:
            kept = json.loads((self.home / "latest.json").read_text())
            folder = self.home / str(kept["folder"])
            names = (CONFIG_FILE, WEIGHTS_FILE, *{CLASSES_FILE} & kept.keys())
            copies = {name: _Copy(folder / name, *map(str, kept[name])) for name in names}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return copies if all(copy.path.is_file() for copy in copies.values()) else {}

    def _keep(self, copies: dict[str, _Copy]) -> Path:
        """Put the copies together in a folder named by their content, and remember it as the latest."""
        content = "".join(copy.sha256 for copy in copies.values())
        folder = self.home / hashlib.sha256(content.encode()).hexdigest()[:32]
        if not all((folder / name).is_file() for name in copies):
            shutil.rmtree(folder, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=_NEW, dir=self.home))
            for name, copy in copies.items():
                _link(copy.path, staging / name)
            staging.rename(folder)
        kept = {"folder": folder.name, **{name: [copy.version, copy.sha256] for name, copy in copies.items()}}
        _write(self.home / "latest.json", json.dumps(kept))
        return folder

    def _sweep(self) -> None:
        """Take away what was left on the way to a copy; parts stay, to be gone on with."""
        for path in self.home.iterdir():
            if path.name.startswith(_NEW) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.startswith((_NEW, f"{_WHOLE}-")):
                path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class _Part:
    """The first bytes of a file, and beside them which version of it they are of."""

    path: Path

    @property
    def version(self) -> str:
        """Empty where there is nothing to go on from."""
        try:
            return self._note.read_text() if self.path.is_file() else ""
        except (OSError, UnicodeDecodeError):
            return ""

    @property
    def num_bytes(self) -> int:
        return self.path.stat().st_size if self.version else 0

    @property
    def _note(self) -> Path:
        return self.path.with_name(f"{self.path.name}.version")

    def restart(self, version: str) -> None:
        self.drop()
        _write(self._note, version)
        self.path.touch(mode=0o600)

    def drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)

    def finish(self, version: str) -> _Copy:
        """The part as a whole file, on disk."""
        with self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        whole = self.path.with_name(f"{_WHOLE}-{self.path.stem}-{sha256}")
        self.path.rename(whole)
        self.drop()
        return _Copy(whole, version, sha256)


def _write(path: Path, text: str) -> None:
    """All of it or nothing."""
    with tempfile.NamedTemporaryFile("w", prefix=_NEW, dir=path.parent, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, target)


class ProgressLog:
    """Says how far each download is, every few seconds; may be called from any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._said_s: dict[str, float] = {}

    def __call__(self, source: str, done: int, total: int | None) -> None:
        now = self._clock()
        with self._lock:
            if now - self._said_s.setdefault(source, now) < LOG_EVERY_S and done != total:
                return
            self._said_s[source] = now
            if done == total:
                del self._said_s[source]
        share = f" of {total / 2**20:,.1f} MiB ({done / total:.0%})" if total else ""
        _log.info("fetching %s: %s MiB%s", source, f"{done / 2**20:,.1f}", share)
