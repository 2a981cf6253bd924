"""The log: one line an event, as text or as JSON, each with the request that it is about. A leaf but for `calls`.

What an error of another library says may quote a prompt or a key: of errors that nobody expected, types and places are
logged, and messages only of those that can't hold either.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from weft.errors import InvalidRequest, WeftError
from weft.server.calls import as_word, current_call

FORMATS = ("text", "json")

_log = logging.getLogger(__name__)

_SCOPE = {"request_id": "request", "adapters": "adapter", "caller": "caller"}
"""What a line says of its request, and the word for it in text."""

_TELLING = (WeftError, OSError, MemoryError)
_QUOTING = (InvalidRequest,)
_TELLING_MODULES = ("torch",)
"""Errors whose messages are about machines, files and shapes; those that quote the request are none of them."""

ExceptionInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def configure(log_format: str, level: str) -> None:
    """Log to standard error from here on. level: of Weft's own loggers; others show warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(json_formatter() if log_format == "json" else TextFormatter())
    handler.addFilter(add_scope)
    logging.basicConfig(handlers=[handler])
    logging.captureWarnings(capture=True)
    logging.getLogger("weft").setLevel(level.upper())
    logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)  # repeats what is odd in a client's metadata
    threading.excepthook = _log_thread


def add_scope(record: logging.LogRecord) -> bool:
    """A filter that drops nothing: gives a record the request that is being served, unless it names one itself."""
    call = current_call.get()
    if call is not None:
        for name in _SCOPE:
            if not hasattr(record, name) and (value := getattr(call, name)):
                setattr(record, name, value)
        if call.span is not None and (context := call.span.get_span_context()).is_valid:
            record.trace_id, record.span_id = f"{context.trace_id:032x}", f"{context.span_id:016x}"
    return True


class _Discreet(logging.Formatter):
    """Shows errors by type and place."""

    def formatException(self, ei: ExceptionInfo) -> str:  # noqa: N802 - the name is the base's
        return "".join(_lines(ei[1])).rstrip("\n") if ei[1] is not None else ""


class TextFormatter(_Discreet):
    """For people: what happened, and in brackets the request that it happened to."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(scope)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name is the base's
        words = [f"{word}={as_word(value)}" for name, word in _SCOPE.items() if (value := getattr(record, name, ""))]
        record.scope = f" [{' '.join(words)}]" if words else ""
        return super().formatMessage(record)


class _Json(_Discreet, JsonFormatter):
    """For machines: an object a line, with all that the record was given."""


def json_formatter() -> logging.Formatter:
    """Of objects that begin with the level, the logger, the message and the time."""
    names = {"levelname": "level", "name": "logger", "exc_info": "exception"}
    fields = ["levelname", "name", "message"]
    return _Json(fields, rename_fields=names, rename_fields_keep_missing=False, timestamp=True)


def log_loop_error(_loop: object, context: Mapping[str, Any]) -> None:
    """An event loop's handler of errors that no task was asked about."""
    _log.error("%s", context.get("message"), exc_info=context.get("exception"))


def _log_thread(args: threading.ExceptHookArgs) -> None:
    name = args.thread.name if args.thread is not None else "a thread"
    _log.error("%s ended unexpectedly", name, exc_info=args.exc_value)


def _lines(error: BaseException) -> Iterable[str]:
    """As `traceback` prints an error and what it came from, the latest last."""
    earlier = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if earlier is not None:
        yield from _lines(earlier)
        yield "\nwhich led to:\n\n"
    yield "Traceback (most recent call last):\n"
    yield from traceback.format_tb(error.__traceback__)
    kind = type(error)
    is_known = isinstance(error, _TELLING) or kind.__module__.split(".")[0] in _TELLING_MODULES
    tells = is_known and not isinstance(error, _QUOTING)
    yield f"{kind.__name__}: {error}\n" if tells else f"{kind.__name__} (what it says is not logged)\n"
