"""The access file: TOML that says who may call, read and checked as a whole."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from weft.errors import InvalidConfig
from weft.server.api.access.keys import is_digest
from weft.server.api.access.quotas import Limits
from weft.server.api.callers import Role

EVERYBODY_ELSE = "*"
"""The name of the rules for tokens whose caller has none of its own."""

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""Of tokens: signatures by a key that only the issuer has. HMAC and `none` are not among them."""

MAX_NAME_CHARACTERS = 256
MAX_LIMIT = 1 << 40


@dataclass(frozen=True, slots=True)
class CallerRules:
    """One [callers.NAME]; the fields are those of `Caller`, and what proves that somebody is it."""

    roles: frozenset[Role]
    adapters: tuple[str, ...] | None
    labels: Mapping[str, str]
    base: bool
    sources: tuple[str, ...] | None
    limits: Limits
    on_behalf: bool
    key_sha256: tuple[str, ...]
    certificates: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenRules:
    """[jwt]. jwks: a file or an https URL. roles_claim: empty where tokens say nothing of roles."""

    jwks: Path | str
    issuer: str
    audience: str
    algorithms: tuple[str, ...]
    caller_claim: str
    roles_claim: str


@dataclass(frozen=True, slots=True)
class AccessFile:
    """All of it."""

    callers: Mapping[str, CallerRules]
    tokens: TokenRules | None
    share_prefixes: bool


def read_access(path: Path, *, has_client_ca: bool) -> AccessFile:
    """has_client_ca: whether callers can show certificates. Raises InvalidConfig, which names the first key at fault.

    No value is repeated: one of them may be a secret that was put where its hash belongs.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidConfig(f"--access {path} can't be read: {_why_unreadable(error)}") from None
    top = _Table(f"--access {path}", "", raw)
    share_prefixes, jwt, callers = top.flag("share_prefixes", False), top.table("jwt"), top.table("callers")
    top.check_known()
    tokens = None if jwt is None else _tokens(jwt, path.parent)
    rules = {} if callers is None else {name: _caller(callers.under(name), name) for name in callers.raw}
    found = AccessFile(rules, tokens, share_prefixes)
    _check_credentials(top, found, has_client_ca=has_client_ca)
    return found


def _why_unreadable(error: Exception) -> str | None:
    match error:
        case OSError():
            return error.strerror
        case UnicodeDecodeError():
            return "is not UTF-8"
        case tomllib.TOMLDecodeError():
            return f"is no TOML: {error}"
        case _:  # numbers of thousands of digits, tables of thousands of levels
            return "is no TOML that can be taken in"


class _Table:
    """One table of the file, whose keys are asked for one by one."""

    def __init__(self, file: str, path: str, raw: object) -> None:
        self._file, self._path = file, path
        self._known: list[str] = []
        if not isinstance(raw, dict):
            raise InvalidConfig(f"{file}: {path} must be a table")
        self.raw: dict[str, Any] = raw

    def wrong(self, key: str, words: str) -> InvalidConfig:
        return InvalidConfig(f"{self._file}: {self._at(key)} {words}")

    def under(self, key: str) -> _Table:
        return _Table(self._file, self._at(key), self.raw[key])

    def table(self, key: str) -> _Table | None:
        return self.under(key) if self._has(key) else None

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw[key] if self._has(key) else default
        if not isinstance(value, bool):
            raise self.wrong(key, "must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Raises InvalidConfig where it is not there and has no default."""
        value = self.raw[key] if self._has(key) else default
        if value is None:
            raise self.wrong(key, "is missing")
        if not isinstance(value, str) or (not value and default is None):
            raise self.wrong(key, "must be a text that is not empty")
        return value

    def texts(self, key: str) -> tuple[str, ...] | None:
        if not self._has(key):
            return None
        value = self.raw[key]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "must be a list of texts")
        return tuple(value)

    def chosen(self, key: str, default: Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
        """At least one, each of those allowed."""
        values = self.texts(key) if self._has(key) else tuple(default)
        if not values:
            raise self.wrong(key, f"is empty; must name some of {', '.join(allowed)}")
        for value in values:
            if value not in allowed:
                raise self.wrong(key, f"holds what is none of {', '.join(allowed)}{_nearest(value, allowed)}")
        return values

    def limit(self, key: str) -> int | None:
        if not self._has(key):
            return None
        value = self.raw[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_LIMIT:
            raise self.wrong(key, f"must be a whole number from 1 to {MAX_LIMIT}; leave it out for no limit")
        return value

    def check_known(self) -> None:
        """Raises InvalidConfig for a key that was not asked for."""
        for key in self.raw:
            if key not in self._known:
                hint = _nearest(key, self._known) or f"; the keys are {', '.join(self._known)}"
                raise self.wrong(key, f"is no key{hint}")

    def _has(self, key: str) -> bool:
        self._known.append(key)
        return key in self.raw

    def _at(self, key: str) -> str:
        return ".".join(filter(None, (self._path, key)))


def _nearest(given: str, known: Sequence[str]) -> str:
    close = get_close_matches(given, known, n=1)
    return f"; did you mean {str(close[0])!r}?" if close else ""


def _caller(table: _Table, name: str) -> CallerRules:
    if not name or not name.isprintable() or len(name) > MAX_NAME_CHARACTERS:
        raise table.wrong("", f"is no caller's name: give 1 to {MAX_NAME_CHARACTERS} printable characters")
    rules = CallerRules(
        roles=frozenset(map(Role, table.chosen("roles", [Role.INFER], [*Role]))),
        adapters=table.texts("adapters"),
        labels=_labels(table.table("labels")),
        base=table.flag("base", True),
        sources=table.texts("sources"),
        limits=Limits(*map(table.limit, ("requests_per_minute", "tokens_per_minute", "max_in_flight"))),
        on_behalf=table.flag("on_behalf", False),
        key_sha256=tuple(digest.lower() for digest in table.texts("key_sha256") or ()),
        certificates=table.texts("certificates") or (),
    )
    table.check_known()
    for index, digest in enumerate(rules.key_sha256):
        if not is_digest(digest):
            raise table.wrong(f"key_sha256[{index}]", "is no SHA-256 in hex: make one with `weft keys hash`")
    if "" in rules.certificates:
        raise table.wrong("certificates", "holds an empty name")
    is_limited = rules.adapters is not None or bool(rules.labels)
    if rules.roles == {Role.INFER} and is_limited and not (rules.adapters or rules.labels or rules.base):
        raise table.wrong("adapters", "is empty, and base is false: such a caller could ask nothing")
    if rules.roles == {Role.INFER} and rules.sources is not None:
        raise table.wrong("sources", "is of no use without the role admin or read: only these look into sources")
    return rules


def _labels(table: _Table | None) -> Mapping[str, str]:
    if table is None:
        return {}
    if not table.raw or not all(isinstance(value, str) for value in table.raw.values()):
        raise table.wrong("", "must hold labels, each a text")
    return dict(table.raw)


def _tokens(table: _Table, folder: Path) -> TokenRules:
    rules = TokenRules(
        jwks=_jwks(table, table.text("jwks"), folder),
        issuer=table.text("issuer"),
        audience=table.text("audience"),
        algorithms=table.chosen("algorithms", ["RS256", "ES256"], ALGORITHMS),
        caller_claim=table.text("caller_claim", "sub"),
        roles_claim=table.text("roles_claim", ""),
    )
    table.check_known()
    return rules


def _jwks(table: _Table, given: str, folder: Path) -> Path | str:
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given):
        return folder / given
    try:
        url = urlsplit(given)
    except ValueError:
        raise table.wrong("jwks", "is no URL") from None
    is_loopback = url.hostname in ("localhost", "127.0.0.1", "::1")
    if not url.hostname or url.scheme not in ("https", "http") or (url.scheme == "http" and not is_loopback):
        raise table.wrong("jwks", "must be a file or an https URL: who can change it can call as anybody")
    return given


def _check_credentials(top: _Table, file: AccessFile, *, has_client_ca: bool) -> None:
    """Each caller can be proved by something, and each proof stands for one."""
    if not file.callers:
        raise top.wrong("callers", "is empty: nobody could call; add a [callers.NAME]")
    for name, rules in file.callers.items():
        at = f"callers.{_quoted(name)}"
        if rules.certificates and not has_client_ca:
            raise top.wrong(f"{at}.certificates", "needs --tls-client-ca, which is not given")
        if name == EVERYBODY_ELSE and (rules.key_sha256 or rules.certificates):
            raise top.wrong(at, "stands for all other callers of tokens, and can't have keys or certificates")
        if name == EVERYBODY_ELSE and file.tokens is None:
            raise top.wrong(at, "stands for all other callers of tokens, which needs [jwt]")
        if file.tokens is None and not (rules.key_sha256 or rules.certificates):
            raise top.wrong(at, "can't prove who it is: give it key_sha256 or certificates, or add [jwt]")
    for kind in ("key_sha256", "certificates"):
        owners: dict[str, str] = {}
        for name, proof in _proofs(file, kind):
            other = owners.setdefault(proof, name)
            if other != name:
                raise top.wrong(f"callers.{_quoted(name)}.{kind}", f"holds one that {other!r} has too: whose is it?")


def _proofs(file: AccessFile, kind: str) -> Iterator[tuple[str, str]]:
    return ((name, proof) for name, rules in file.callers.items() for proof in getattr(rules, kind))


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else f'"{name}"'
