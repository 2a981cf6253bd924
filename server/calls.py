"""One RPC as its log lines and its span name it. A leaf."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

from opentelemetry.trace import Span

Fact = str | int | float


@dataclass(slots=True, eq=False)
class Call:
    """What is known of an RPC so far; whoever serves it adds to it.

    method: `Service/Method`. span: None where nothing is traced. request_id and caller: empty until they are known.
    adapters: `name@sha256:…` of each version that serves it. code: of its status, as gRPC names it. outcome: in words,
    the code where there are none. problem: why it was refused, without what the request said. facts: what else its
    line in the access log tells: tokens and seconds.
    """

    method: str = ""
    span: Span | None = None
    request_id: str = ""
    caller: str = ""
    adapters: tuple[str, ...] = ()
    code: str = "OK"
    outcome: str = ""
    problem: str = ""
    facts: dict[str, Fact] = field(default_factory=dict)


current_call: ContextVar[Call | None] = ContextVar("current_call", default=None)
"""Of the RPC that this task or thread serves."""


def this_call() -> Call:
    """The RPC that is being served; outside of any, one that nobody sees."""
    return current_call.get() or Call()


def as_word(value: str | Iterable[str]) -> str:
    """Values in one word of a line, so that none can pass for another field."""
    text = value if isinstance(value, str) else ",".join(value)
    return text if text.isprintable() and not set(text) & set(' "[]=') else json.dumps(text)
