"""Every error that Weft raises on purpose, in one tree.

Each message names the thing that was wrong and what to do about it. `server/api/errors.py` turns the tree into gRPC
statuses; the command line prints the message as one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_PROBLEMS = 20
"""That one error lists."""


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line that is not too long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:300] + " …"


class WeftError(Exception):
    """Base of the tree."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one part of an input: a field of a request, or a file, tensor or field of an adapter."""

    subject: str
    description: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.description}"


def cut_short(problems: Sequence[Problem], subject: str) -> Sequence[Problem]:
    """The first problems, and how many more there are of the subject."""
    rest = len(problems) - MAX_PROBLEMS
    return [*problems[:MAX_PROBLEMS], Problem(subject, f"has {rest} more problems")] if rest > 0 else problems


class _Problems(WeftError):
    """An error that lists every problem found rather than the first."""

    def __init__(self, heading: str, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(heading + "; ".join(str(problem) for problem in problems))


class InvalidRequest(_Problems):
    """Fields of a request that are out of range or contradict each other."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("", problems)

    @classmethod
    def of(cls, field: str, description: str) -> InvalidRequest:
        return cls([Problem(field, description)])


class InvalidAdapter(_Problems):
    """An adapter that can't be served on this base, or be made another: every reason, by name."""

    def __init__(self, source: str, problems: Sequence[Problem], to_be: str = "served") -> None:
        self.source = source
        super().__init__(f"adapter {source} can't be {to_be}: ", problems)


class InvalidModel(WeftError):
    """A folder that is no language model, or one that Weft would not serve exactly."""


class Unsupported(WeftError):
    """Something that the base can't be asked for, whatever the request says."""


class InvalidConfig(WeftError):
    """A value of the configuration that is out of range: names the option, the value and the range."""


class InvalidData(WeftError):
    """A file of examples, or a row of one, that can't be trained on: names the file and the line."""


class AdapterNotFound(WeftError):
    """No adapter has this name, or the named version is gone."""

    def __init__(self, adapter_id: str, hint: str = "", names: Sequence[str] | None = None) -> None:
        """names: all that there are, where the hint goes by them."""
        self.adapter_id = adapter_id
        self.names = names
        super().__init__(f"adapter {adapter_id!r} is not loaded" + (f": {hint}" if hint else ""))


class AdapterExists(WeftError):
    """The name is taken."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"adapter {name!r} exists already: delete it first, or choose another name")


class OutOfCapacity(WeftError):
    """Queues or pages are full for now; `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class QuotaExceeded(OutOfCapacity):
    """A caller has asked for more than it may for now."""

    def __init__(self, caller: str, limit: str, retry_after_s: float) -> None:
        self.caller = caller
        self.limit = limit
        super().__init__(f"the quota of caller {caller!r} is used up: {limit}", retry_after_s)


class Unauthenticated(WeftError):
    """No credentials, or such as prove nothing. The message never holds any of them."""


class PermissionDenied(WeftError):
    """The caller is known, and may not do that."""


class Unavailable(WeftError):
    """The server is starting, draining, or has lost its engine."""


class DeadlineExceeded(WeftError):
    """The caller's deadline passed before the answer was complete."""


class ReaderStalled(WeftError):
    """The client took nothing of its answer for as long as it may."""


class GenerationFailed(WeftError):
    """The step that held the request failed; the request may be sent again."""


class AddressUnavailable(WeftError):
    """The server can't listen where it was told to."""
