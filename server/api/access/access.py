"""The gate and the certificate of one server, kept as their files say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import grpc

from weft.server.api.access.access_file import AccessFile, read_access
from weft.server.api.access.files import Opening, Reloading
from weft.server.api.access.gate import Gate, Rules
from weft.server.api.access.jwks import FetchedKeys, FileKeys, Keys, read_jwks
from weft.server.api.access.quotas import Quotas
from weft.server.api.access.tls import Certificates, read_pair
from weft.server.config import ServerConfig

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""A change holds when two looks in a row have seen the same."""


class Counts(Protocol):
    """What is told of it."""

    def quota_refused(self, limit: str) -> None: ...

    def reloaded(self, what: str, outcome: str) -> None: ...

    def certificate_expires(self, at_s: float) -> None: ...


class Access:
    """What the configuration says of who may call. `gate` is open where it says nothing."""

    def __init__(self, config: ServerConfig, counts: Counts, clock: Callable[[], float]) -> None:
        """Reads the files; blocks. clock: seconds, for the quotas. Raises InvalidConfig."""
        self._counts = counts
        self._quotas = Quotas(clock, counts.quota_refused)
        self._fetched: FetchedKeys | None = None
        self._listeners: list[Callable[[], None]] = []
        self._reloading: list[Reloading[Any]] = []
        self._certificates: Certificates | None = None
        self.gate = Gate(has_client_ca=config.tls_client_ca is not None)
        if config.tls_cert is not None and config.tls_key is not None:
            self._certificates = Certificates(counts.certificate_expires)
            cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
            self._start("certificate", lambda opening: read_pair(cert, key, client_ca, opening), self._certificates.use)
        if config.access is not None:
            path = config.access
            self._start("access", lambda opening: self._load(path, opening), self._use)

    @property
    def credentials(self) -> grpc.ServerCredentials | None:
        """For a port; None without TLS."""
        return self._certificates.credentials() if self._certificates is not None else None

    def when_changed(self, tell: Callable[[], None]) -> None:
        """Say what to call when other rules hold, on the event loop."""
        self._listeners.append(tell)

    async def watch(self) -> None:
        """Keep up with the files, and keys from elsewhere, for ever."""
        while True:
            await self.catch_up()
            await asyncio.sleep(LOOK_EVERY_S)

    async def catch_up(self) -> None:
        """One look at everything."""
        if self._fetched is not None:
            self._fetched.keep_fresh()
        for files in self._reloading:
            await files.catch_up()

    def _start(self, what: str, load: Callable[[Opening], Any], use: Callable[[Any], None]) -> None:
        files = Reloading(what, load, use, self._counts.reloaded)
        files.start()
        self._reloading.append(files)

    def _load(self, path: Path, opening: Opening) -> tuple[AccessFile, Keys | None]:
        file = read_access(opening(path), has_client_ca=self.gate.has_client_ca)
        jwks = file.tokens.jwks if file.tokens is not None else None
        return file, FileKeys(read_jwks(opening(jwks))) if isinstance(jwks, Path) else None

    def _use(self, loaded: tuple[AccessFile, Keys | None]) -> None:
        file, keys = loaded
        url = file.tokens.jwks if file.tokens is not None else None
        if isinstance(url, str):
            if self._fetched is None or self._fetched.url != url:
                self._fetched = FetchedKeys(url, self._counts.reloaded)
            keys = self._fetched
        else:
            self._fetched = None
        self.gate.rules = Rules.of(file, keys, self._quotas)
        for tell in self._listeners:
            tell()
