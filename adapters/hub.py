"""Files of the Hugging Face Hub, or of what stands for it (HF_ENDPOINT), with the token it knows (HF_TOKEN)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError is that of whichever library it goes by
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.file_download import HfFileMetadata
from tqdm import tqdm

from weft.adapters.classes import CLASSES_FILE
from weft.adapters.downloads import Limits, Pace
from weft.adapters.folder import WEIGHTS_FILE
from weft.adapters.locations import Location
from weft.adapters.peft_config import CONFIG_FILE, is_classifier
from weft.errors import InvalidAdapter, Problem, Unavailable

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ETAG = re.compile(r"[A-Za-z0-9_-]{1,128}")
_FILES = (CONFIG_FILE, WEIGHTS_FILE)


class Hub:
    """Fetches an adapter's files of one commit, and no others, into a cache in huggingface_hub's own layout."""

    def __init__(self, cache: Path, limits: Limits, endpoint: str | None = None) -> None:
        """endpoint: a hub other than the one that HF_ENDPOINT names."""
        self._cache = cache
        self._limits = limits
        self._endpoint = endpoint

    def fetch(self, location: Location) -> Path:
        """The local folder of a repository's commit; blocks. A commit that is here already needs no network.

        Raises InvalidAdapter, Unavailable.
        """
        try:
            return self._cached(location) or self._download(location)
        except (RemoteEntryNotFoundError, RevisionNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
            raise InvalidAdapter(str(location), [Problem(location.url, _words(error))]) from None
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                raise InvalidAdapter(str(location), [Problem(location.url, _words(error))]) from None
            raise Unavailable(f"{location} can't be fetched now ({_words(error)}): try again") from None
        except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, XetDownloadError, OSError) as error:
            raise Unavailable(f"{location} can't be fetched now ({_words(error)}): try again") from None

    def _cached(self, location: Location) -> Path | None:
        if not _COMMIT.fullmatch(location.revision):
            return None
        paths = [
            try_to_load_from_cache(_repository(location), _path(location, name), self._cache, location.revision)
            for name in _FILES
        ]
        if not all(isinstance(path, str) for path in paths):
            return None
        folder = Path(str(paths[0])).parent
        classes = try_to_load_from_cache(
            _repository(location), _path(location, CLASSES_FILE), self._cache, location.revision
        )
        if classes is None and is_classifier(folder / CONFIG_FILE):  # nor is it known that there is none
            return None
        self._verify(location, folder / WEIGHTS_FILE, location.sha256)
        return folder

    def _download(self, location: Location) -> Path:
        config = self._look_up(location, CONFIG_FILE, location.revision)
        commit = config.commit_hash or ""
        found = {CONFIG_FILE: config, WEIGHTS_FILE: self._look_up(location, WEIGHTS_FILE, commit)}
        for name, metadata in found.items():
            self._limits.check(location, name, metadata.size or 0)
        paths = {name: self._get(location, name, commit, metadata) for name, metadata in found.items()}
        if is_classifier(paths[CONFIG_FILE]):
            with suppress(RemoteEntryNotFoundError):
                self._get(location, CLASSES_FILE, commit)
        self._verify(location, paths[WEIGHTS_FILE], location.sha256)
        return paths[CONFIG_FILE].parent

    def _look_up(self, location: Location, name: str, revision: str) -> HfFileMetadata:
        """What the hub says of a file. Raises InvalidAdapter where that is not what a hub says."""
        url = hf_hub_url(_repository(location), _path(location, name), revision=revision, endpoint=self._endpoint)
        metadata = get_hf_file_metadata(url, endpoint=self._endpoint)
        if not (_COMMIT.fullmatch(metadata.commit_hash or "") and _ETAG.fullmatch(metadata.etag or "")):
            words = "comes from a server that does not answer as a hub does: look at HF_ENDPOINT"
            raise InvalidAdapter(str(location), [Problem(name, words)])
        return metadata

    def _get(self, location: Location, name: str, commit: str, metadata: HfFileMetadata | None = None) -> Path:
        """A file of a commit, resumed if it was begun; its size and, where the hub knows it, its SHA-256 are right."""
        was_here = isinstance(
            try_to_load_from_cache(_repository(location), _path(location, name), self._cache, commit), str
        )
        path = Path(
            hf_hub_download(
                _repository(location),
                _path(location, name),
                revision=commit,
                cache_dir=self._cache,
                endpoint=self._endpoint,
                tqdm_class=self._meter(location, name),
            )
        )
        self._limits.check(location, name, path.stat().st_size)
        promised = (metadata.etag if metadata is not None else "") or ""
        if not was_here and _SHA256.fullmatch(promised):
            self._verify(location, path, promised)
        return path

    def _verify(self, location: Location, path: Path, sha256: str) -> None:
        """Raises InvalidAdapter, and forgets the file, where it is not the one that was asked for or promised."""
        if not sha256:
            return
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            if sha256 != location.sha256:
                path.resolve().unlink()
                path.unlink(missing_ok=True)
            raise InvalidAdapter(str(location), [Problem(path.name, f"has SHA-256 {found}; it must be {sha256}")])

    def _meter(self, location: Location, name: str) -> type[tqdm[NoReturn]]:
        """What huggingface_hub takes for a progress bar: it counts, tells, and stops what grows too large."""
        limits = self._limits

        class Meter(tqdm):  # type: ignore[type-arg]  # the class itself takes no argument
            def __init__(self, *args: Any, **settings: Any) -> None:
                self.done = int(settings.get("initial") or 0)
                self.expected: int | None = settings.pop("total", None)
                self.pace = Pace(location, name, limits.clock)
                super().__init__(disable=True)

            def update(self, n: float | None = 1) -> bool | None:
                self.done += int(n or 0)
                limits.check(location, name, self.done)
                self.pace.add(int(n or 0))
                if name == WEIGHTS_FILE:
                    limits.on_progress(str(location), self.done, self.expected)
                return None

        return Meter


def _repository(location: Location) -> str:
    return "/".join(location.path[:2])


def _path(location: Location, name: str) -> str:
    return "/".join((*location.path[2:], name))


def _words(error: Exception) -> str:
    """An error of huggingface_hub in one line that says what to do."""
    known: Mapping[type[Exception], str] = {
        GatedRepoError: "is gated: give the server an HF_TOKEN that may read it",
        RevisionNotFoundError: "has no such revision",
        RemoteEntryNotFoundError: "lacks adapter_config.json or adapter_model.safetensors there",
        RepositoryNotFoundError: "is no repository that the server may read (HF_TOKEN says who it is)",
    }
    for kind, words in known.items():
        if isinstance(error, kind):
            return words
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
