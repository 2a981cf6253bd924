"""Files in object stores, through fsspec: credentials, regions and endpoints are as its s3fs and gcsfs find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import fsspec
from fsspec import AbstractFileSystem

from weft.adapters.downloads import BrokenTransfer, Have, MissingFile, Reply, StaleTransfer
from weft.adapters.locations import Location
from weft.errors import InvalidAdapter, InvalidConfig, Problem

_CHUNK_BYTES = 4 << 20
_LIBRARIES = {"s3": ("s3fs", "weft[s3]"), "gs": ("gcsfs", "weft[gcs]")}


def check_library(prefix: Location) -> None:
    """Raises InvalidConfig where what reads such a place is not installed."""
    library, extra = _LIBRARIES.get(prefix.scheme, ("", ""))
    if library and find_spec(library) is None:
        raise InvalidConfig(f"--source-root is {prefix.url}, which needs {library}: pip install '{extra}'")


def open_filesystem(scheme: str) -> AbstractFileSystem:
    """A store that looks anew every time: what it listed before may have changed."""
    return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)


class Buckets:
    """Reads a file from any byte on; its version is what the store says of it (ETag, generation, times, size)."""

    def __init__(self, open_filesystem: Callable[[str], AbstractFileSystem] = open_filesystem) -> None:
        self._open_filesystem = open_filesystem

    @contextmanager
    def open(self, location: Location, name: str, have: Have) -> Iterator[Reply | None]:
        """As `Remote.open`."""
        path = "/".join((location.host, *location.path, name))
        with _as_refusals(location, name):
            store = self._open_filesystem(location.scheme)
            info = store.info(path)
            version = str(store.ukey(path))
        if info["type"] != "file":
            raise MissingFile(location, name)
        if version == have.copy:
            yield None
            return
        start = have.part_bytes if version == have.part else 0

        def chunks() -> Iterator[bytes]:
            with _as_refusals(location, name), store.open(path, "rb", block_size=_CHUNK_BYTES) as file:
                file.seek(start)
                while chunk := file.read(_CHUNK_BYTES):
                    yield chunk
                if store.ukey(path) != version:
                    raise StaleTransfer("it changed while it was read")

        yield Reply(start, info["size"], version, chunks())


@contextmanager
def _as_refusals(location: Location, name: str) -> Iterator[None]:
    """What a store raises, as InvalidAdapter where the file can't be had and as BrokenTransfer otherwise."""
    try:
        yield
    except (BrokenTransfer, GeneratorExit):
        raise
    except FileNotFoundError:
        raise MissingFile(location, name) from None
    except PermissionError as error:
        raise InvalidAdapter(str(location), [Problem(name, f"may not be read at {location.url} ({error})")]) from None
    except Exception as error:  # each store's library has errors of its own, with no common base
        raise BrokenTransfer(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
