"""What may wait: requests, their prompt tokens, requests to one adapter, and for how long. More is refused at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from weft.errors import OutOfCapacity
from weft.server.engine.request import Request

SHORTEST_RETRY_S = 0.1
LONGEST_RETRY_S = 60.0
UNKNOWN_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """What may wait beside the requests that run at once, and for how long; 0: as much as comes, for ever."""

    max_running: int
    max_requests: int
    max_tokens: int = 0
    max_per_adapter: int = 0
    max_wait_s: float = 0.0


class QueueGate:
    """Counts the requests from their submission to their end, and which of them have begun."""

    def __init__(
        self, limits: QueueLimits, token_s: Callable[[], float | None], is_full: Callable[[], bool] = lambda: False
    ) -> None:
        """token_s: how long each prompt token that waits holds up those behind it, in seconds, where that is known.

        is_full: whether those that wait find no room although fewer run than may.
        """
        self._limits = limits
        self._token_s = token_s
        self._is_full = is_full
        self._waiting: set[Request] = set()
        self._num_running = 0
        self._by_adapter: Counter[str] = Counter()
        self._tokens = 0
        self._by_caller: dict[str, Counter[str]] = {}
        """Prompt tokens that wait, by caller and by adapter."""

    def check(self, request: Request) -> None:
        """Raises OutOfCapacity, with the time after which there may be room, where it has to wait and may not."""
        limits, num_waiting = self._limits, len(self._waiting)
        if self._num_running + num_waiting >= limits.max_running + limits.max_requests:
            raise self._refusal(
                f"{self._num_running + num_waiting} requests are queued or running, as many as are allowed",
                self._tokens / num_waiting if num_waiting else 0,
            )
        num_free = max(0, limits.max_running - self._num_running)
        if num_waiting >= num_free or self._is_full():
            self._check_wait(request)
        if num_waiting < num_free:  # it will not have to
            return
        num_tokens, name = len(request.prompt), _name(request)
        if limits.max_tokens and num_waiting and self._tokens + num_tokens > limits.max_tokens:
            raise self._refusal(
                f"{self._tokens} prompt tokens are queued, and with this request's {num_tokens} they would be more "
                f"than the {limits.max_tokens} that are allowed",
                self._tokens + num_tokens - limits.max_tokens,
            )
        if limits.max_per_adapter and self._by_adapter[name] >= limits.max_per_adapter + num_free:
            raise self._refusal(
                f"{self._by_adapter[name]} requests to {f'adapter {name!r}' if name else 'the base model'} are queued, "
                "as many as are allowed for one",
                self._tokens / num_waiting,
            )

    def tokens_ahead(self, request: Request) -> int:
        """Prompt tokens that will begin before one that comes now, if its caller and its adapter get even shares.

        As the queue is served in turns, what others have in it counts no more than as much again as one's own: who has
        nothing waiting is next.
        """
        own = self._by_caller.get(request.caller, Counter())
        of_caller = min(own.total(), len(own) * own[_name(request)])
        return min(self._tokens, len(self._by_caller) * of_caller)

    def _check_wait(self, request: Request) -> None:
        """Raises OutOfCapacity where it would wait too long at the rate of now, if that is known."""
        longest_s, token_s = self._limits.max_wait_s, self._token_s()
        if not longest_s or token_s is None:
            return
        tokens = self.tokens_ahead(request)
        if tokens * token_s > longest_s:
            raise self._refusal(
                f"at the current rate it would wait {tokens * token_s:.2g} s for the {tokens} prompt tokens before it, "
                f"and {longest_s:g} s is as long as requests may",
                tokens - longest_s / token_s,
            )

    def enter(self, request: Request) -> None:
        """A request waits from now on."""
        self._waiting.add(request)
        self._by_adapter[_name(request)] += 1
        self._tokens += len(request.prompt)
        self._by_caller.setdefault(request.caller, Counter())[_name(request)] += len(request.prompt)

    def begin(self, request: Request) -> None:
        """A request runs now; no matter if it has ended."""
        if self._stop_waiting(request):
            self._num_running += 1

    def leave(self, request: Request) -> None:
        """A request that entered has ended."""
        if not self._stop_waiting(request):
            self._num_running -= 1

    def _stop_waiting(self, request: Request) -> bool:
        if request not in self._waiting:
            return False
        self._waiting.remove(request)
        name = _name(request)
        self._by_adapter[name] -= 1
        if not self._by_adapter[name]:
            del self._by_adapter[name]
        self._tokens -= len(request.prompt)
        own = self._by_caller[request.caller]
        own[name] -= len(request.prompt)
        if not own[name]:
            del own[name]
        if not own:
            del self._by_caller[request.caller]
        return True

    def _refusal(self, message: str, num_tokens: float) -> OutOfCapacity:
        token_s = self._token_s()
        after_s = UNKNOWN_RETRY_S if token_s is None else num_tokens * token_s
        return OutOfCapacity(message, min(max(after_s, SHORTEST_RETRY_S), LONGEST_RETRY_S))


def _name(request: Request) -> str:
    """The names of its adapters as one word, without their versions; empty for the base."""
    return "+".join(adapter_id.partition("@")[0] for adapter_id, _ in request.adapters)
