"""What a request must fit in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from weft.adapters.classes import Classes
from weft.adapters.residency import AdapterRef
from weft.errors import InvalidRequest, Unsupported
from weft.server.engine.request import Pooling, Request

CAUSAL = (Pooling.LAST, Pooling.MEAN)
"""What can be made of the hidden states of a model whose tokens see those before them: the first sees itself alone."""


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a model can be asked for.

    generates: whether it has logits of tokens. poolings: that it can answer with, the usual first. class_pooling: the
    one that a sequence classifier's head sees. classes: of the checkpoint's own head; None where it has none.
    """

    generates: bool = True
    poolings: tuple[Pooling, ...] = CAUSAL
    class_pooling: Pooling = Pooling.LAST
    classes: Classes | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """context_length: prompt and answer together, in tokens.

    is_by_cache: whether that is what the KV cache holds, and the model could do more.
    """

    context_length: int
    vocab_size: int
    is_by_cache: bool = False
    abilities: Abilities = field(default_factory=Abilities)

    def check(self, request: Request) -> None:
        """Raises InvalidRequest for a prompt that can't be run: empty, too long, or of tokens that don't exist.

        And for a pooling that the model has not; Unsupported for tokens where it gives none.
        """
        if request.pooling is None and not self.abilities.generates:
            raise Unsupported("the base is an encoder, which gives no text and no scores: ask for Classify or Embed")
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
        poolings = self.abilities.poolings
        if request.pooling is not None and request.pooling not in poolings:
            able = ", ".join(pooling.name for pooling in poolings) or "no pooling at all"
            raise InvalidRequest.of("pooling", f"is {request.pooling.name}; this base serves {able}")


def check_use(request: Request, adapters: Sequence[AdapterRef], abilities: Abilities) -> None:
    """Raises InvalidRequest where adapters were not made for what is asked: a classifier's head gives no tokens."""
    path = "adapter_id" if len(adapters) < 2 else "adapters"
    names = ", ".join(ref.name for ref in adapters)
    if request.through_head:
        if not adapters and abilities.classes is not None:
            return
        if not adapters:
            words = "is empty, and the base has no classification head: name an adapter that has one"
            raise InvalidRequest.of(path, words)
        if len(adapters) > 1 or adapters[0].version.classes is None:
            raise InvalidRequest.of(path, f"names {names}, which has no classification head of its own: use Generate")
    elif request.pooling is None and any(ref.version.classes is not None for ref in adapters):
        raise InvalidRequest.of(path, f"names {names}, a sequence classifier, which gives no tokens: use Classify")
