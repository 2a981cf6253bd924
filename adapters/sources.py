"""Where adapters come from: a source, checked against what the server may read, and made a local folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weft.adapters.buckets import Buckets, check_library
from weft.adapters.classes import CLASSES_FILE
from weft.adapters.downloads import Downloads, Limits
from weft.adapters.folder import WEIGHTS_FILE
from weft.adapters.hub import Hub
from weft.adapters.locations import MAX_SOURCE_CHARACTERS, REMOTE_SCHEMES, Location, parse_location, parse_prefix
from weft.adapters.peft_config import CONFIG_FILE, is_classifier
from weft.adapters.web import WEB_SCHEMES, Web
from weft.errors import InvalidAdapter, InvalidConfig, InvalidRequest, Problem

_FORMS = "file:/path, hf:organisation/repository@revision, https://host/path, s3://bucket/path or gs://bucket/path"


@dataclass(frozen=True, slots=True)
class RemoteSettings:
    """What may be fetched, and how. prefixes: what sources must lie under. cache: where copies go; None, the user's.

    hub_endpoint: a hub other than the one that HF_ENDPOINT names.
    """

    prefixes: Sequence[str] = ()
    cache: Path | None = None
    limits: Limits = field(default_factory=Limits)
    hub_endpoint: str | None = None


class Sources:
    """The allow-list, and how to get at what it allows. Every method may be called from any thread."""

    def __init__(self, roots: Sequence[Path], remote: RemoteSettings | None = None) -> None:
        """roots: folders that `file:` sources must lie under. Raises InvalidConfig for a prefix that can't be one."""
        self._roots = tuple(root.resolve() for root in roots)
        self._remote = remote or RemoteSettings()
        self._prefixes = tuple(map(_prefix, self._remote.prefixes))
        self._fetched: dict[str, Path] = {}

    def check(self, source: str) -> None:
        """Look at the form and the allow-list alone. Raises InvalidRequest."""
        if source.startswith("file:"):
            self._folder_of(source)
        else:
            self._location_of(source)

    def fetch(self, source: str) -> Path:
        """The local folder that holds the adapter; blocks. A fetched folder's files never change.

        Raises InvalidRequest, InvalidAdapter, and Unavailable where another machine can't be read now.
        """
        if source.startswith("file:"):
            return self._check_files(source, self._folder_of(source))
        folder = self._download(self._location_of(source))
        self._fetched[source] = folder
        return folder

    def fetch_again(self, source: str) -> Path:
        """As `fetch`, but of a remote source the copy that its last fetch gave, whatever the remote has by now."""
        folder = self._fetched.get(source)
        return folder if folder is not None and (folder / WEIGHTS_FILE).is_file() else self.fetch(source)

    def _download(self, location: Location) -> Path:
        cache = self._remote.cache or _user_cache()
        if location.scheme == "hf":
            return Hub(cache / "hub", self._remote.limits, self._remote.hub_endpoint).fetch(location)
        remote = Web(self._allows) if location.scheme in WEB_SCHEMES else Buckets()
        return Downloads(cache, self._remote.limits).fetch(location, remote)

    def _location_of(self, source: str) -> Location:
        """A remote source. Raises InvalidRequest for a form that is none, and for a place that is not allowed."""
        if source.partition(":")[0] not in REMOTE_SCHEMES:
            raise _refused(source, f"must be {_FORMS}")
        try:
            location = parse_location(source)
        except ValueError as error:
            raise _refused(source, f"which {error}") from None
        if not self._allows(location):
            allowed = ", ".join(str(prefix) for prefix in self._prefixes) or "none is set"
            raise _refused(
                source, f"which lies under no allowed prefix ({allowed}); start the server with --source-root"
            )
        return location

    def _allows(self, location: Location) -> bool:
        return any(location.is_under(prefix) for prefix in self._prefixes)

    def _folder_of(self, source: str) -> Path:
        """The folder of a `file:` source, symlinks resolved. Raises InvalidRequest unless it lies under a root."""
        path = source.removeprefix("file:")
        if not path.startswith("/") or not path.isprintable() or len(path) > MAX_SOURCE_CHARACTERS:
            raise _refused(
                source,
                f"must be file:/path/to/a/PEFT/folder, printable, {MAX_SOURCE_CHARACTERS} long at most",
            )
        try:
            folder = Path(path).resolve()
        except (OSError, RuntimeError) as error:
            raise _refused(source, f"which can't be followed ({error})") from None
        if not self._is_in_root(folder):
            roots = ", ".join(map(str, self._roots)) or "none is set"
            raise InvalidRequest.of(
                "adapter.source",
                f"{path} lies under no allowed root ({roots}); start the server with --source-root",
            )
        return folder

    def _check_files(self, source: str, folder: Path) -> Path:
        """Raises InvalidAdapter where one of the files leads out of the roots, is no file, or is too large."""
        self._check_each(source, folder, (CONFIG_FILE, WEIGHTS_FILE))
        if is_classifier(folder / CONFIG_FILE):
            self._check_each(source, folder, (CLASSES_FILE,))
        return folder

    def _check_each(self, source: str, folder: Path, names: Sequence[str]) -> None:
        problems = [problem for name in names if (problem := self._problem(folder / name)) is not None]
        if problems:
            raise InvalidAdapter(source, problems)

    def _problem(self, path: Path) -> Problem | None:
        try:
            target = path.resolve()
            if not self._is_in_root(target):
                return Problem(path.name, "is a link to a file outside the allowed roots")
            if not target.exists():
                return None  # whoever reads the folder says so, and what lies there instead
            if not target.is_file():
                return Problem(path.name, "is not a regular file")
            return self._remote.limits.problem(path.name, target.stat().st_size)
        except (OSError, RuntimeError) as error:
            return Problem(path.name, f"can't be followed ({error})")

    def _is_in_root(self, path: Path) -> bool:
        return any(path.is_relative_to(root) for root in self._roots)


def _prefix(text: str) -> Location:
    try:
        prefix = parse_prefix(text)
    except ValueError as error:
        raise InvalidConfig(f"--source-root is {text!r}, which {error}") from None
    check_library(prefix)
    return prefix


def _refused(source: str, words: str) -> InvalidRequest:
    return InvalidRequest.of(
        "adapter.source", f"is {source[:200]!r}{'; ' if words.startswith('must') else ', '}{words}"
    )


def _user_cache() -> Path:
    """Weft's folder among the user's caches. Raises InvalidConfig where the user has no home."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise InvalidConfig("--cache is not set, and the user has no home to keep a cache in: set it") from None
    return base / "weft"
