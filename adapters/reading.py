"""From a source to an adapter in host memory: the first time, and again when it has left all memory."""

from __future__ import annotations

import logging
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from weft.adapters.content import LoraWeights, digest_of
from weft.adapters.folder import WEIGHTS_FILE, examine_folder, load_folder
from weft.adapters.pages import HostAdapter, PagePool, Recall
from weft.adapters.peft_config import CONFIG_FILE
from weft.adapters.recall import Recalls, stamp_of
from weft.adapters.report import AdapterReport, ModuleReport, module_reports
from weft.adapters.sources import Sources
from weft.errors import InvalidAdapter, InvalidRequest, Problem, Unavailable

_log = logging.getLogger(__name__)

Probe = Callable[[LoraWeights, HostAdapter, str], float]
"""Compares what would be served with a plain reference: gives the largest relative error, or raises InvalidAdapter."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What an adapter must show before it is taken. probe: None to do without."""

    allow_no_effect: bool = False
    probe: Probe | None = None


class Reader:
    """Reads adapters for one page pool. Every method blocks, and may be called from any thread."""

    def __init__(self, pool: PagePool, sources: Sources, policy: Policy) -> None:
        self._pool = pool
        self._sources = sources
        self._policy = policy
        self._recalls = Recalls(pool.row_form)

    def check(self, source: str) -> None:
        """Look at the source's form alone. Raises InvalidRequest."""
        self._sources.check(source)

    def read(self, source: str) -> HostAdapter:
        """Read, validate, and see that it does what it should. Raises InvalidRequest, InvalidAdapter, Unavailable."""
        folder = self._sources.fetch(source)
        before = stamp_of(folder)
        weights = load_folder(folder, source, self._pool.base)
        host = self._prove(weights, self._prepare(weights, source), source)
        if host.rounding_error:
            _log.info("%s: 8-bit rows change its deltas by up to %.1f %%", source, 100 * host.rounding_error)
        with suppress(OSError):
            return self._recalls.remember(host, source, folder, before)
        return host

    def inspect(self, source: str) -> AdapterReport:
        """Say what a source holds, what of it can't be served and why, and what it would cost.

        Raises InvalidRequest for a source that may not be read, Unavailable for one that can't be just now.
        """
        modules: tuple[ModuleReport, ...] = ()
        try:
            weights, problems = examine_folder(self._sources.fetch(source), source, self._pool.base)
            modules = module_reports(weights, self._pool.base, problems)
            if problems:
                return AdapterReport(source, modules, tuple(problems))
            weights = replace(weights, digest=digest_of(weights))
            host = self._prove(weights, self._prepare(weights, source), source)
        except InvalidAdapter as error:
            return AdapterReport(source, modules, error.problems)
        return AdapterReport(
            source,
            modules,
            digest=host.digest,
            num_pages=host.num_pages,
            device_bytes=host.num_pages * self._pool.page_bytes,
            host_bytes=host.num_bytes,
            probe_error=host.probe_error,
            classes=host.classes,
        )

    def _prove(self, weights: LoraWeights, host: HostAdapter, source: str) -> HostAdapter:
        """Raises InvalidAdapter where it has no effect, or the probe finds it served wrong."""
        if not host.has_effect and not self._policy.allow_no_effect:
            words = "changes nothing: every delta is zero. Train it, or start the server with --allow-no-effect"
            raise InvalidAdapter(source, [Problem(WEIGHTS_FILE, words)])
        if self._policy.probe is None:
            return host
        return replace(host, probe_error=self._policy.probe(weights, host, source))

    def _prepare(self, weights: LoraWeights, source: str) -> HostAdapter:
        host = self._pool.prepare(weights, source)
        if host.num_pages > self._pool.num_pages:
            words = (
                f"takes {host.num_pages} pages on the device and there are {self._pool.num_pages} in all: "
                f"start the server with --adapter-pages {host.num_pages} or more"
            )
            raise InvalidAdapter(source, [Problem("size", words)])
        return host

    def read_again(self, sources: Iterable[str], digest: str, recall: Recall | None = None) -> HostAdapter:
        """Read the content that one of the sources held before. recall: as its last `HostAdapter` had it.

        Raises InvalidAdapter where their content is another by now, Unavailable where a file can't be read just now.
        """
        errors: list[InvalidAdapter | Unavailable] = []
        for source in dict.fromkeys(sources):
            try:
                host = self._load(source, recall if recall is not None and recall.source == source else None)
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

    def _load(self, source: str, recall: Recall | None) -> HostAdapter:
        """Without validation where a recall has what the source holds."""
        folder = self._sources.fetch_again(source)
        host = recall.read(folder) if recall is not None else None
        if host is not None:
            return host
        before = stamp_of(folder)
        weights = load_folder(folder, source, self._pool.base)
        return self._recalls.remember(self._prepare(weights, source), source, folder, before)

    def _unreadable(self, source: str) -> Unavailable | None:
        """Whether it is the files that can't be read, rather than what they hold."""
        try:
            folder = self._sources.fetch_again(source)
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
