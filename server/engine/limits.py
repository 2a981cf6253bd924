"""What a request must fit in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from weft.adapters.residency import AdapterRef
from weft.errors import InvalidRequest
from weft.server.engine.request import Pooling, Request

CAUSAL = (Pooling.LAST, Pooling.MEAN)
"""What can be made of the hidden states of a model whose tokens see those before them: the first sees itself alone."""


@dataclass(frozen=True, slots=True)
class Limits:
    """context_length: prompt and answer together, in tokens. poolings: that the model can answer with, the usual first.

    is_by_cache: whether the context length is what the KV cache holds, and the model could do more.
    """

    context_length: int
    vocab_size: int
    is_by_cache: bool = False
    poolings: tuple[Pooling, ...] = CAUSAL

    def check(self, request: Request) -> None:
        """Raises InvalidRequest for a prompt that can't be run: empty, too long, or of tokens that don't exist.

        And for a pooling that the model has not.
        """
        if not request.prompt:
            raise InvalidRequest.of("prompt", "is empty: give at least one token")
        longest = self.context_length - (request.stopping.max_tokens > 0)
        if len(request.prompt) > longest:
            hint = " in the KV cache: see --kv-tokens" if self.is_by_cache else ""
            raise InvalidRequest.of("prompt", f"has {len(request.prompt)} tokens; at most {longest} fit{hint}")
        if max(request.prompt) >= self.vocab_size:
            raise InvalidRequest.of(
                "prompt",
                f"holds token id {max(request.prompt)}; the vocabulary ends at {self.vocab_size - 1}",
            )
        if request.pooling is not None and request.pooling not in self.poolings:
            able = ", ".join(pooling.name for pooling in self.poolings) or "no pooling at all"
            raise InvalidRequest.of("pooling", f"is {request.pooling.name}; this base serves {able}")


def check_use(request: Request, adapters: Sequence[AdapterRef]) -> None:
    """Raises InvalidRequest where adapters were not made for what is asked: a classifier's head gives no tokens."""
    path = "adapter_id" if len(adapters) < 2 else "adapters"
    names = ", ".join(ref.name for ref in adapters)
    if request.through_head:
        if not adapters:
            words = "is empty, and the base has no classification head: name an adapter that has one"
            raise InvalidRequest.of(path, words)
        if len(adapters) > 1 or adapters[0].version.classes is None:
            raise InvalidRequest.of(path, f"names {names}, which has no classification head of its own: use Generate")
    elif request.pooling is None and any(ref.version.classes is not None for ref in adapters):
        raise InvalidRequest.of(path, f"names {names}, a sequence classifier, which gives no tokens: use Classify")
