"""The log as it is written: text and JSON, the request that a line is about, and what it keeps to itself."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from contextvars import copy_context
from typing import Any

import pytest

from weft.errors import InvalidRequest, WeftError
from weft.server.calls import Call, current_call
from weft.server.logs import TextFormatter, add_scope, json_formatter, log_loop_error

CALL = Call("weft.v1.InferenceService/Generate", request_id="r-1", caller="team-a", adapters=("upper@sha256:ab",))
SECRET = "my mother's maiden name"


class Log:
    """A logger, and what it has written."""

    def __init__(self, formatter: logging.Formatter) -> None:
        self.written = io.StringIO()
        self.logger = logging.Logger("weft.test")  # noqa: LOG001 - one of its own
        handler = logging.StreamHandler(self.written)
        handler.setFormatter(formatter)
        handler.addFilter(add_scope)
        self.logger.addHandler(handler)

    @property
    def text(self) -> str:
        return self.written.getvalue()

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]


@pytest.fixture
def text() -> Log:
    return Log(TextFormatter())


@pytest.fixture
def as_json() -> Log:
    return Log(json_formatter())


@pytest.fixture(params=[TextFormatter, json_formatter])
def either(request: pytest.FixtureRequest) -> Log:
    return Log(request.param())


def during(call: Call, work: Callable[[], None]) -> None:
    """Do what is logged while an RPC is served."""

    def serve() -> None:
        current_call.set(call)
        work()

    copy_context().run(serve)


def test_a_line_of_a_request_says_which(text: Log) -> None:
    during(CALL, lambda: text.logger.warning("slow"))
    line = text.text.rstrip("\n")
    assert line.endswith("WARNING weft.test: slow [request=r-1 adapter=upper@sha256:ab caller=team-a]")


def test_a_line_of_no_request_says_nothing_of_one(text: Log, as_json: Log) -> None:
    text.logger.warning("ready")
    as_json.logger.warning("ready")
    assert text.text.endswith("weft.test: ready\n")
    (line,) = as_json.objects
    assert line.pop("timestamp").endswith("+00:00")
    assert line == {"level": "WARNING", "logger": "weft.test", "message": "ready"}


def test_as_json_a_line_is_an_object_with_all_that_it_was_given(as_json: Log) -> None:
    during(CALL, lambda: as_json.logger.warning("done", extra={"prompt_tokens": 5, "queue_s": 0.25}))
    (line,) = as_json.objects
    assert line["request_id"] == "r-1"
    assert line["adapters"] == ["upper@sha256:ab"]
    assert line["caller"] == "team-a"
    assert (line["prompt_tokens"], line["queue_s"]) == (5, 0.25)


def test_a_thread_that_serves_no_rpc_names_the_request_itself(text: Log) -> None:
    text.logger.warning("failed", extra={"request_id": "r-2", "adapters": ("a@1", "b@2"), "caller": ""})
    assert text.text.endswith("failed [request=r-2 adapter=a@1,b@2]\n")


def test_an_id_cannot_pass_for_another_field_or_line(text: Log) -> None:
    during(Call("m", request_id='x] caller=root "'), lambda: text.logger.warning("done"))
    assert text.text.endswith('done [request="x] caller=root \\""]\n')
    assert text.text.count("\n") == 1


def chain(*errors: Exception) -> Exception:
    """The last one, raised from those before it."""
    *before, last = errors
    with pytest.raises(type(last)) as raised:
        raise last from (chain(*before) if before else None)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        KeyError(SECRET),
        ValueError(f"can't encode {SECRET!r}"),
        RuntimeError(SECRET),
        InvalidRequest.of("chat.messages[0].role", f"is {SECRET!r}"),
    ],
)
def test_what_an_unexpected_error_says_is_not_logged_but_its_kind_and_place_are(either: Log, error: Exception) -> None:
    either.logger.error("it failed", exc_info=chain(error, TypeError(SECRET)))
    assert SECRET not in either.text
    assert "mother" not in either.text
    for words in ("it failed", type(error).__name__, "TypeError", "in chain", "test_logs.py"):
        assert words in either.text


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), WeftError("No space left on device")])
def test_what_is_about_the_machine_is(either: Log, error: Exception) -> None:
    either.logger.error("it failed", exc_info=chain(error))
    assert "No space left on device" in either.text


def test_as_json_an_error_stays_in_its_line(as_json: Log) -> None:
    as_json.logger.error("it failed", exc_info=chain(ValueError("x")))
    (line,) = as_json.objects
    assert "Traceback (most recent call last):" in line["exception"]
    assert "exc_info" not in line


@pytest.fixture
def own_root() -> Iterator[Log]:
    log = Log(TextFormatter())
    logger = logging.getLogger("weft.server.logs")
    logger.addHandler(log.logger.handlers[0])
    yield log
    logger.removeHandler(log.logger.handlers[0])


def test_an_event_loop_tells_no_more_of_what_it_could_not_hand_on(own_root: Log) -> None:
    log_loop_error(None, {"message": "Task exception was never retrieved", "exception": chain(KeyError(SECRET))})
    assert "Task exception was never retrieved" in own_root.text
    assert "KeyError" in own_root.text
    assert SECRET not in own_root.text
