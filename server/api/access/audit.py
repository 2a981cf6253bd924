"""One line for each call that would change adapters, whatever came of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError, Message

from weft.adapters.locations import without_secrets
from weft.server.api.access.gate import ROLE_OF, Context
from weft.server.api.callers import Role, current_caller

_log = logging.getLogger("weft.audit")

NOBODY = "-"
MAX_CHARACTERS = 2048
"""Of one word: a name that is refused may be as long as a message."""


@dataclass(slots=True)
class AuditLine:
    """Filled in as the call goes on. outcome: "ok", or a status code in lower case.

    asks: for which source, labels and pin, where it says so.
    """

    method: str
    peer: str
    caller: str = NOBODY
    adapter: str = NOBODY
    digest: str = NOBODY
    outcome: str = "cancelled"
    asks: Mapping[str, str] = field(default_factory=dict)

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
        self.asks = {} if names_itself else _asks(request)

    def answered(self, response: Message) -> None:
        adapter: Any = getattr(response, "adapter", None)
        self.digest = getattr(adapter, "digest", "") or NOBODY
        self.outcome = "ok"

    def write(self) -> None:
        before = {name: getattr(self, name) for name in ("caller", "peer", "method", "adapter")}
        fields = {**before, **self.asks, "digest": self.digest, "outcome": self.outcome}
        _log.info("%s", " ".join(f"{name}={_word(value)}" for name, value in fields.items()), extra={"audit": fields})


def _asks(request: Any) -> Mapping[str, str]:
    """What a creation or an update would have the adapter be, in words without secrets."""
    adapter = request.adapter
    mask = request.update_mask.paths if "update_mask" in request.DESCRIPTOR.fields_by_name else ()
    names = frozenset(mask or (given.name for given, _ in adapter.ListFields()))
    words = {
        "source": without_secrets(adapter.source),
        "labels": json.dumps(dict(adapter.labels), sort_keys=True, ensure_ascii=False),
        "pinned": str(adapter.pinned).lower(),
    }
    return {name: word for name, word in words.items() if name in names}


def _word(value: str) -> str:
    """As it is, or quoted where it could be taken for more than one word."""
    plain = value.isascii() and value.isprintable() and not set(value) & set(" =\"'\\")
    return value[:MAX_CHARACTERS] if plain else repr(value[:MAX_CHARACTERS])
