"""From a source to an adapter in host memory: the first time, and again when it has left all memory."""

from __future__ import annotations

import stat
from collections.abc import Iterable

from weft.adapters.folder import WEIGHTS_FILE, load_folder
from weft.adapters.pages import HostAdapter, PagePool
from weft.adapters.peft_config import CONFIG_FILE
from weft.adapters.sources import Sources
from weft.errors import InvalidAdapter, InvalidRequest, Problem, Unavailable


class Reader:
    """Reads adapters for one page pool. Every method blocks, and may be called from any thread."""

    def __init__(self, pool: PagePool, sources: Sources) -> None:
        self._pool = pool
        self._sources = sources

    def check(self, source: str) -> None:
        """Look at the source's form alone. Raises InvalidRequest."""
        self._sources.check(source)

    def read(self, source: str) -> HostAdapter:
        """Read and validate. Raises InvalidRequest, InvalidAdapter, Unavailable."""
        weights = load_folder(self._sources.fetch(source), source, self._pool.base)
        host = self._pool.prepare(weights, source)
        if host.num_pages > self._pool.num_pages:
            words = (
                f"takes {host.num_pages} pages on the device and there are {self._pool.num_pages} in all: "
                f"start the server with --adapter-pages {host.num_pages} or more"
            )
            raise InvalidAdapter(source, [Problem("size", words)])
        return host

    def read_again(self, sources: Iterable[str], digest: str) -> HostAdapter:
        """Read the content that one of the sources held before.

        Raises InvalidAdapter where their content is another by now, Unavailable where a file can't be read just now.
        """
        errors: list[InvalidAdapter | Unavailable] = []
        for source in dict.fromkeys(sources):
            try:
                host = self.read(source)
            except Unavailable as error:
                errors.append(error)
            except OSError as error:
                errors.append(Unavailable(f"the files at {source} can't be read ({error})"))
            except (InvalidAdapter, InvalidRequest) as error:
                errors.append(self._unreadable(source) or _changed(source, f" ({error.problems[0]})"))
            else:
                if host.digest == digest:
                    return host
                errors.append(_changed(source))
        raise next((error for error in errors if isinstance(error, Unavailable)), errors[0])

    def _unreadable(self, source: str) -> Unavailable | None:
        """Whether it is the files that can't be read, rather than what they hold."""
        try:
            folder = self._sources.fetch(source)
            for path in (folder / CONFIG_FILE, folder / WEIGHTS_FILE):
                if stat.S_ISREG(path.stat().st_mode):  # opening another kind of file may block
                    with path.open("rb") as file:
                        file.read(1)
        except OSError as error:
            return Unavailable(f"the files of adapter {source} can't be read ({error.strerror}): try again")
        except (InvalidAdapter, InvalidRequest):
            return None
        return None


def _changed(source: str, how: str = "") -> InvalidAdapter:
    words = f"its files at {source} have changed since it was loaded{how}: update the adapter"
    return InvalidAdapter(source, [Problem("source", words)])
