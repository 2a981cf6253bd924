"""Files over HTTPS, and over plain HTTP where that is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2

from weft.adapters.downloads import BrokenTransfer, Have, MissingFile, Reply, StaleTransfer
from weft.adapters.locations import Location, parse_location
from weft.errors import InvalidAdapter, Problem

WEB_SCHEMES = ("https", "http")
MAX_REDIRECTS = 5
_TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
_GONE = {401: "may not be read", 403: "may not be read"}
_LATER = (408, 425, 429)


class Web:
    """Reads with a plain GET, from where it stopped where the server can say which version that was (a strong ETag).

    is_allowed: asked about every address that a server sends it on to.
    """

    def __init__(self, is_allowed: Callable[[Location], bool]) -> None:
        self._is_allowed = is_allowed

    @contextmanager
    def open(self, location: Location, name: str, have: Have) -> Iterator[Reply | None]:
        """As `Remote.open`."""
        try:
            # A proxy from the environment is for the world outside this machine.
            with httpx2.Client(timeout=_TIMEOUT, trust_env=not location.is_loopback) as client:
                response = self._get(client, location, name, _headers(have))
                try:
                    yield _reply(response, location, name, have)
                finally:
                    response.close()
        except (httpx2.TransportError, httpx2.StreamError) as error:
            raise BrokenTransfer(f"{type(error).__name__}: {error}".rstrip(": ")) from None

    def _get(self, client: httpx2.Client, location: Location, name: str, headers: dict[str, str]) -> httpx2.Response:
        """The answer after the redirects that are allowed; its body is still to be read."""
        request = client.build_request("GET", f"{location.url}/{name}", headers=headers)
        for _ in range(MAX_REDIRECTS + 1):
            response = client.send(request, stream=True)
            if not response.has_redirect_location:
                return response
            response.close()
            target = self._redirect(location, name, response)
            request = client.build_request("GET", target, headers=headers)
        raise InvalidAdapter(str(location), [Problem(name, f"redirects more than {MAX_REDIRECTS} times")])

    def _redirect(self, location: Location, name: str, response: httpx2.Response) -> httpx2.URL:
        """Where a redirect leads, if a source could lead there too. Raises InvalidAdapter."""
        said = response.headers["location"]
        try:
            url = response.request.url.join(said)
            target = parse_location(str(url.copy_with(query=None, fragment=None)))
        except (httpx2.InvalidURL, ValueError):
            pass
        else:
            inward = target.is_loopback and not location.is_loopback
            if target.scheme in WEB_SCHEMES and self._is_allowed(target) and not inward:
                return url
        words = f"redirects to {said[:200]!r}, which no --source-root allows"
        raise InvalidAdapter(str(location), [Problem(name, words)])


def _headers(have: Have) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity"}
    if have.part and have.part_bytes:
        headers |= {"Range": f"bytes={have.part_bytes}-", "If-Range": have.part}
    elif have.copy:
        headers["If-None-Match"] = have.copy
    return headers


def _reply(response: httpx2.Response, location: Location, name: str, have: Have) -> Reply | None:
    """What a response to `_headers` means. Raises InvalidAdapter, BrokenTransfer."""
    status = response.status_code
    if status == 304 and have.copy:
        return None
    if status >= 500 or status in _LATER:
        raise BrokenTransfer(f"the server answers {status}")
    if status in (404, 410):
        raise MissingFile(location, name)
    if status not in (200, 206, 416):
        words = _GONE.get(status, f"can't be had: the server answers {status}")
        raise InvalidAdapter(str(location), [Problem(name, f"{words} at {location.url}")])
    if response.headers.get("content-encoding", "identity") != "identity":
        raise InvalidAdapter(str(location), [Problem(name, "comes compressed, though it was asked for as it is")])
    version = response.headers.get("etag", "")
    strong = version if version.startswith('"') and version.isprintable() else ""
    start, size = _extent(response, have, strong)
    return Reply(start, size, strong, response.iter_raw())


def _extent(response: httpx2.Response, have: Have, version: str) -> tuple[int, int | None]:
    """The first byte that comes, and the size of the whole file where it is known."""
    if response.status_code == 200:
        length = response.headers.get("content-length", "")
        return 0, int(length) if re.fullmatch(r"[0-9]{1,19}", length) else None
    match = re.fullmatch(r"bytes ([0-9]{1,19})-[0-9]{1,19}/([0-9]{1,19})", response.headers.get("content-range", ""))
    if response.status_code == 416 or match is None or int(match[1]) != have.part_bytes or version != have.part:
        raise StaleTransfer("the server has another version than the one that was begun")
    return int(match[1]), int(match[2])
