"""Who calls, and what that caller may do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase

from weft.server.api.access.quotas import Quota


class Role(StrEnum):
    """INFER asks models, READ looks at adapters, ADMIN changes them and looks at them."""

    INFER = "infer"
    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """One who calls, with all rights unless told otherwise.

    name: empty where nobody has to say who they are. patterns: of the adapters' names that it may use, None for all;
    labels: those of adapters that it may use besides, empty for none. base: whether it may ask the base alone.
    sources: patterns of what it may load adapters from and look into, None for all. on_behalf: a gateway, whose word is
    taken for whom it asks. own_prefixes: what is computed for its prompts is used for no other caller's. quota: None
    for no limits. left_s: tells for how many seconds more its token holds; None, it has none that ends.
    """

    name: str = ""
    roles: frozenset[Role] = frozenset(Role)
    patterns: tuple[str, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    base: bool = True
    sources: tuple[str, ...] | None = None
    on_behalf: bool = False
    own_prefixes: bool = True
    quota: Quota | None = field(default=None, compare=False, repr=False)
    left_s: Callable[[], float] | None = field(default=None, compare=False, repr=False)

    def may_name(self, name: str) -> bool:
        """Whether it may use whatever has this name, or will."""
        return self.patterns is None or any(fnmatchcase(name, pattern) for pattern in self.patterns)

    def may_use(self, name: str, labels: Mapping[str, str]) -> bool:
        """Whether it may use, and know of, an adapter with this name and these labels."""
        if self.may_name(name):
            return True
        return bool(self.labels) and all(labels.get(key) == value for key, value in self.labels.items())

    def may_load(self, source: str) -> bool:
        """Whether it may load from there, or look there. A path that leads back up is none of the pattern's."""
        if self.sources is None:
            return True
        leads_up = ".." in source or "%2e" in source.lower()
        return not leads_up and any(fnmatchcase(source, pattern) for pattern in self.sources)

    def asking_for(self, other: str) -> str:
        """The name of who a gateway asks for. No two pairs give the same, whatever slashes are in them."""
        own = self.name.replace("%", "%25").replace("/", "%2F")
        return "/".join(filter(None, (own, other)))

    def salted(self, cache_salt: str, other: str) -> str:
        """What prefixes are shared under, of those whom `other` names."""
        return f"{self.name!r} {other!r} {cache_salt}" if self.own_prefixes else cache_salt


ANYBODY = Caller(on_behalf=True, own_prefixes=False)
"""The caller where authentication is off: may do everything."""

current_caller: ContextVar[Caller] = ContextVar("current_caller", default=ANYBODY)
"""Of the RPC that this task serves; the edge sets it."""
