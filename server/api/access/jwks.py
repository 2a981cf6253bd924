"""The public keys that tokens are signed with: from a file, or fetched and fetched again."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

import httpx2
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from weft.errors import InvalidConfig, Unavailable

_log = logging.getLogger(__name__)

MAX_BYTES = 1 << 20
FETCH_S = 10.0
"""How long a fetch may take in all."""

FRESH_S = 300.0
"""How old fetched keys get before they are fetched again."""

MIN_BETWEEN_S = 10.0
"""From one fetch to the next: tokens that name keys that nobody knows must not load the issuer."""

_FAMILIES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("RSA", ""): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
    ("OKP", "Ed448"): ("EdDSA",),
}
"""Which algorithms a key can be for, by its type and its curve. A secret, `oct`, can be for none."""


class UnusableKeys(Exception):
    """What should be a JWKS is none."""


class KeySet:
    """Public keys by id and algorithm."""

    def __init__(self, document: bytes) -> None:
        """document: a JWKS. Keys of other kinds, or for other uses, are left out. Raises UnusableKeys."""
        try:
            keys = json.loads(document)["keys"]
            found = [key for key in keys if isinstance(key, dict)]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UnusableKeys("is no JWKS: an object with a list of keys") from None
        self._keys: dict[tuple[str, str], PyJWK] = {}
        for key in found:
            for algorithm in _algorithms(key):
                for made in _made(key, algorithm):
                    self._keys.setdefault((str(key.get("kid", "")), algorithm), made)
        if not self._keys:
            raise UnusableKeys("holds no public key that tokens could be signed with")

    def find(self, kid: str | None, algorithm: str) -> PyJWK | None:
        """The key of this id; without one, the only key there is for the algorithm."""
        if kid is not None:
            return self._keys.get((kid, algorithm))
        fitting = [key for (_, its), key in self._keys.items() if its == algorithm]
        return fitting[0] if len(fitting) == 1 else None


class Keys(Protocol):
    """Where keys come from. num_taken: how many sets of them there have been."""

    @property
    def num_taken(self) -> int: ...

    async def find(self, kid: str | None, algorithm: str) -> PyJWK | None: ...


class FileKeys:
    """Those of a file, which is read again as a whole."""

    num_taken = 1

    def __init__(self, keys: KeySet) -> None:
        self._keys = keys

    async def find(self, kid: str | None, algorithm: str) -> PyJWK | None:
        return self._keys.find(kid, algorithm)


class FetchedKeys:
    """Those of a URL, which are fetched when they are old, and when a token names one that is not among them."""

    def __init__(
        self,
        url: str,
        count: Callable[[str, str], None],
        fetch: Callable[[str], bytes] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """count: is told "jwks" and "ok" or "failed". fetch: blocks, and raises UnusableKeys."""
        self.url = url
        self._count = count
        self._fetch = fetch or fetch_jwks
        self._clock = clock
        self._keys: KeySet | None = None
        self.num_taken = 0
        self._tried_s: float | None = None
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, kid: str | None, algorithm: str) -> PyJWK | None:
        """Raises Unavailable where the keys were never to be had."""
        found = self._keys.find(kid, algorithm) if self._keys is not None else None
        if found is None and (self._fetching is not None or self._age_s() >= MIN_BETWEEN_S):
            await asyncio.shield(self._start_fetch())
            found = self._keys.find(kid, algorithm) if self._keys is not None else None
        if self._keys is None:
            raise Unavailable("the keys that tokens are signed with can't be had just now: try again")
        return found

    def keep_fresh(self) -> None:
        """Fetch in the background, if it is time; on the event loop."""
        wait_s = FRESH_S if self._keys is not None else MIN_BETWEEN_S
        if self._fetching is None and self._age_s() >= wait_s:
            self._start_fetch()

    def _age_s(self) -> float:
        return float("inf") if self._tried_s is None else self._clock() - self._tried_s

    def _start_fetch(self) -> asyncio.Task[None]:
        if self._fetching is None:
            self._tried_s = self._clock()
            self._fetching = asyncio.create_task(self._refresh(), name="fetch the JWKS")
        return self._fetching

    async def _refresh(self) -> None:
        try:
            self._keys = KeySet(await asyncio.to_thread(self._fetch, self.url))
            self.num_taken += 1
            self._count("jwks", "ok")
        except UnusableKeys as error:
            stays = "; the keys that were fetched before stay" if self._keys is not None else ""
            _log.warning("jwt.jwks %s%s", error, stays)
            self._count("jwks", "failed")
        finally:
            self._fetching = None


def read_jwks(path: Path) -> KeySet:
    """Raises InvalidConfig."""
    try:
        return KeySet(path.read_bytes())
    except OSError as error:
        raise InvalidConfig(f"jwt.jwks {path} can't be read: {error.strerror}") from None
    except UnusableKeys as error:
        raise InvalidConfig(f"jwt.jwks {path} {error}") from None


def fetch_jwks(url: str) -> bytes:
    """Blocks. Redirects are not followed. Raises UnusableKeys, whose words hold no part of the URL but its host."""
    # An event loop of its own, for only that ends what comes byte by byte, be it in the headers.
    return asyncio.run(_fetched(url, urlsplit(url)))


async def _fetched(url: str, parts: SplitResult) -> bytes:
    body, host = b"", parts.hostname
    try:
        async with (
            asyncio.timeout(FETCH_S),
            httpx2.AsyncClient(timeout=FETCH_S, trust_env=parts.scheme == "https") as client,
            client.stream("GET", url) as response,
        ):
            if response.status_code != httpx2.codes.OK:
                raise UnusableKeys(f"at {host} can't be had: HTTP status {response.status_code}")
            async for part in response.aiter_bytes():
                body += part
                if len(body) > MAX_BYTES:
                    raise UnusableKeys(f"at {host} has more than {MAX_BYTES} bytes")
    except TimeoutError:
        raise UnusableKeys(f"at {host} took more than {FETCH_S:g} s") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise UnusableKeys(f"at {host} can't be had: {type(error).__name__}") from None
    return body


def _algorithms(key: Mapping[str, Any]) -> Iterator[str]:
    """What the key can check, by its own words and its kind."""
    operations = key.get("key_ops")
    if key.get("use", "sig") != "sig" or (isinstance(operations, list) and "verify" not in operations):
        return
    kind = str(key.get("kty"))
    curve = "" if kind == "RSA" else str(key.get("crv"))
    for algorithm in _FAMILIES.get((kind, curve), ()):
        if key.get("alg", algorithm) == algorithm:
            yield algorithm


def _made(key: Mapping[str, Any], algorithm: str) -> Iterator[PyJWK]:
    """None where the key is malformed. Its private part, if somebody put one there, is left out."""
    public = {name: value for name, value in key.items() if name not in ("d", "p", "q", "dp", "dq", "qi", "oth")}
    try:
        yield PyJWK(public, algorithm)
    except (PyJWTError, ValueError, TypeError):
        return
