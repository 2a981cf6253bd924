"""One line for each call that would change adapters, whatever came of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError, Message

from weft.server.api.access.gate import ROLE_OF, Context
from weft.server.api.callers import Role, current_caller

_log = logging.getLogger("weft.audit")

NOBODY = "-"


@dataclass(slots=True)
class AuditLine:
    """Filled in as the call goes on. outcome: "ok", or a status code in lower case."""

    method: str
    peer: str
    caller: str = NOBODY
    adapter: str = NOBODY
    digest: str = NOBODY
    outcome: str = "cancelled"

    @classmethod
    def of(cls, method: str, context: Context) -> AuditLine | None:
        """None for a method that changes nothing."""
        return cls(method.rpartition("/")[2], context.peer()) if ROLE_OF.get(method) is Role.ADMIN else None

    def asked(self, raw: bytes, deserialize: Any) -> None:
        """By whom, and for what, if it can be read: a request of AdapterService that changes something."""
        self.caller = current_caller.get().name or NOBODY
        try:
            request = deserialize(raw)
        except DecodeError:
            return
        names_itself = "name" in request.DESCRIPTOR.fields_by_name
        self.adapter = (request.name if names_itself else request.adapter.name) or NOBODY

    def answered(self, response: Message) -> None:
        adapter: Any = getattr(response, "adapter", None)
        self.digest = getattr(adapter, "digest", "") or NOBODY
        self.outcome = "ok"

    def write(self) -> None:
        fields = {name: getattr(self, name) for name in ("caller", "peer", "method", "adapter", "digest", "outcome")}
        _log.info("%s", " ".join(f"{name}={_word(value)}" for name, value in fields.items()), extra={"audit": fields})


def _word(value: str) -> str:
    """As it is, or quoted where it could be taken for more than one word."""
    plain = value.isascii() and value.isprintable() and not set(value) & set(" =\"'\\")
    return value[:256] if plain else repr(value[:256])
