"""Who calls, and what that caller may do."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    """INFER asks models, READ looks at adapters, ADMIN changes them."""

    INFER = "infer"
    READ = "read"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """One who calls. name: empty where nobody has to say who they are."""

    name: str = ""
    roles: frozenset[Role] = frozenset(Role)


ANYBODY = Caller()
"""The caller where authentication is off: may do everything."""

current_caller: ContextVar[Caller] = ContextVar("current_caller", default=ANYBODY)
"""Of the RPC that this task serves; the edge sets it."""
