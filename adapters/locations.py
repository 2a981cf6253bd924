"""Folders on other machines, written in one way each, so that a prefix allows what it seems to allow and nothing else.

A spelling that could be read in two ways (percent-encoding, user names, dots, doubled slashes, a host in capitals, a
query) is refused rather than made canonical.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

REMOTE_SCHEMES = ("hf", "https", "http", "s3", "gs")

MAX_SOURCE_CHARACTERS = 1024

_DEFAULT_PORTS = {"https": 443, "http": 80}
_SEGMENT = re.compile(r"[A-Za-z0-9_~+=.-]+")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_AUTHORITY = re.compile(rf"(?P<host>{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{{0,4}}))?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,221}[a-z0-9]")
_SHA256 = re.compile(r"#sha256=([0-9a-f]{64})$")


@dataclass(frozen=True, slots=True)
class Location:
    """A folder on another machine, or with an empty host or path a prefix of such.

    host: with its port where that is not the scheme's own; the bucket of s3 and gs; empty for hf.
    path: its segments; for hf the organisation, the repository and a folder in it.
    revision: of hf. sha256: what adapter_model.safetensors must have, or empty.
    """

    scheme: str
    host: str
    path: tuple[str, ...]
    revision: str = ""
    sha256: str = ""

    @property
    def url(self) -> str:
        """The folder, without a revision or checksum; what is fetched is `url/file`."""
        start = f"{self.scheme}:" if self.scheme == "hf" else f"{self.scheme}://{self.host}/"
        return (start + "/".join(self.path)).rstrip("/")

    @property
    def is_loopback(self) -> bool:
        """Whether it names this machine."""
        if self.scheme not in _DEFAULT_PORTS:
            return False
        host = re.sub(r":\d+$", "", self.host).strip("[]")
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")
        return address.is_loopback or address.is_unspecified

    def is_under(self, prefix: Location) -> bool:
        """Whether the prefix allows it: the same scheme and host, and the path whole segment by whole segment."""
        same_place = self.scheme == prefix.scheme and prefix.host == self.host
        return same_place and self.path[: len(prefix.path)] == prefix.path

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.url + revision + (f"#sha256={self.sha256}" if self.sha256 else "")


def is_remote(source: str) -> bool:
    """Whether a source is on another machine."""
    return source.partition(":")[0] in REMOTE_SCHEMES


def without_secrets(source: str) -> str:
    """A source as it was asked for, servable or not, without what might be a password, a token or a signature."""
    return re.sub(r"\?.*", "?***", re.sub(r"://.*@", "://***@", source, flags=re.DOTALL), flags=re.DOTALL)


def parse_location(text: str) -> Location:
    """A whole folder. Raises ValueError, in words that follow "is …, which"."""
    pin = _SHA256.search(text)
    place, at, revision = text.removesuffix(pin[0] if pin else "").partition("@")
    scheme, host, path = _split(place)
    if at and scheme != "hf":
        raise ValueError("holds an '@', which no folder's URL needs")
    if at and not (_is_path(revision.split("/")) and ".." not in revision):
        raise ValueError("has no revision after its '@'")
    if scheme == "hf" and len(path) < 2:
        raise ValueError("must be hf:organisation/repository, with @revision where it is not main")
    return Location(scheme, host, path, revision or ("main" if scheme == "hf" else ""), pin[1] if pin else "")


def parse_prefix(text: str) -> Location:
    """What an operator allows: `hf:`, `hf:org/`, `https://host/folder/`, `s3://bucket/`. Raises ValueError."""
    return Location(*_split(text))


def _split(text: str) -> tuple[str, str, tuple[str, ...]]:
    """Scheme, host and path of a URL without revision and checksum. Raises ValueError."""
    if len(text) > MAX_SOURCE_CHARACTERS:
        raise ValueError(f"has {len(text)} characters; {MAX_SOURCE_CHARACTERS} are allowed")
    scheme, _, rest = text.partition(":")
    if scheme not in REMOTE_SCHEMES:
        raise ValueError(f"has none of the schemes {', '.join(REMOTE_SCHEMES)}")
    host = ""
    if scheme != "hf":
        if not rest.startswith("//"):
            raise ValueError(f"must begin with {scheme}://")
        authority, _, rest = rest[2:].partition("/")
        host = _host(scheme, authority)
    segments = rest.removesuffix("/").split("/") if rest else []
    if not _is_path(segments):
        raise ValueError(
            "has a path that is not letters, digits and _~+=.- between single slashes, without '.' or '..'"
        )
    return scheme, host, tuple(segments)


def _host(scheme: str, authority: str) -> str:
    """The authority in its one spelling: lower case, the port only where it is not the scheme's own."""
    if scheme not in _DEFAULT_PORTS:
        if not _BUCKET.fullmatch(authority):
            raise ValueError("does not name a bucket: 3 or more of a-z, 0-9, '.', '_' and '-'")
        return authority
    match = _AUTHORITY.fullmatch(authority)
    if match is None or not _is_host(match["host"]) or int(match["port"] or 1) > 65535:
        raise ValueError("does not name a host in lower case, with a port or none, and no user")
    port = match["port"]
    return match["host"] if port is None or int(port) == _DEFAULT_PORTS[scheme] else f"{match['host']}:{port}"


def _is_host(host: str) -> bool:
    """A name, or an address in its usual spelling: resolvers read 0x7f.1 and 2130706433 as addresses too."""
    if host[-1] != "]" and re.fullmatch(r"[a-z][a-z0-9-]*", host.rpartition(".")[2]):
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return host == str(address)
    return host == f"[{address}]" and address.ipv4_mapped is None


def _is_path(segments: list[str]) -> bool:
    return all(_SEGMENT.fullmatch(segment) and segment not in (".", "..") for segment in segments)
