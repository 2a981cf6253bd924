"""The next step's forward pass, launched while the last one's tokens are on their way to the host.

A decode step is as a rule followed by one more token of each of its sequences. All that the next step needs is known
by then but the tokens themselves, and those the device knows before the host does. So the next step is laid out and
launched first, and reads its tokens where they were chosen; then the host waits for them, and commits and publishes
them while the device goes on. Nothing of that step is sampled before the tokens that it follows are committed:
penalties, constraints and whatever else a row is sampled by see what they would have seen. A sequence that turns out
to have ended has a row too many, which nobody looks at. Its blocks are free at once: whoever gets them writes behind
that step, on the device.

Where a row can't be known to go on, or another may join, there is no such step: the next one is picked in its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from weft.server.engine.batch import Batch
from weft.server.engine.model import Outputs
from weft.server.engine.scheduler import Scheduled, Scheduler
from weft.server.engine.sequence import Sequence
from weft.server.engine.speculation import Speculation
from weft.server.engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose forward pass was launched. made: good until the next launch."""

    picked: Seq[Scheduled]
    batch: Batch
    made: Outputs


Launch = Callable[[Seq[Scheduled], torch.Tensor | None], Launched]
"""Of a step, and of what it reads in place of tokens that the host does not know yet: int64 [T], None where it does."""


class Ahead:
    """At most one step that was launched ahead of its turn."""

    def __init__(
        self,
        scheduler: Scheduler,
        launch: Launch,
        context_length: int,
        speculation: Speculation | None,
        *,
        enabled: bool,
    ) -> None:
        self._enabled = enabled
        self._scheduler = scheduler
        self._launch = launch
        self._context_length = context_length
        self._speculation = speculation
        self._next: Launched | None = None

    def take(self, is_running: Callable[[Sequence], bool]) -> Launched | None:
        """The step that was launched, less the rows of those that have ended since; None where there is none."""
        launched, self._next = self._next, None
        if launched is None:
            return None
        rows = [row for row, item in enumerate(launched.picked) if is_running(item.sequence)]
        if not rows:
            return None
        batch = replace(launched.batch, sample_rows=tuple(rows))
        return replace(launched, picked=[launched.picked[row] for row in rows], batch=batch)

    def drop(self) -> None:
        """Forget the step that was launched: what it computes is computed again."""
        self._next = None

    def covers(self, sequence: Sequence) -> bool:
        """Whether a token more of it is being computed."""
        return self._next is not None and any(item.sequence is sequence for item in self._next.picked)

    def follow(self, picked: Seq[Scheduled], tokens: Seq[torch.Tensor], *, was_ahead: bool) -> None:
        """Launch the step after one whose tokens were chosen, if it is known.

        tokens: int64, together one for each that was picked. was_ahead: whether that step was itself launched here.
        """
        if not self._is_known(picked, was_ahead=was_ahead):
            return
        rows = [row for row, item in enumerate(picked) if self._goes_on(item.sequence)]
        sequences = [picked[row].sequence for row in rows]
        with _with_a_token_more(sequences):
            following = self._scheduler.again(sequences) if sequences else None
            if following is not None:
                fed = torch.cat(list(tokens)) if len(tokens) > 1 else tokens[0]
                if len(rows) < len(picked):
                    fed = fed[to_device(torch.tensor(rows), fed.device)]
                self._next = self._launch(following, fed)

    def _is_known(self, picked: Seq[Scheduled], *, was_ahead: bool) -> bool:
        """Whether nobody else runs, and nothing is to be read that the next launch writes over, or to be guessed."""
        return (
            self._enabled
            and len(picked) == len(self._scheduler.running)
            and all(item.completes and not item.drafts and not item.sequence.request.logprobs for item in picked)
            and all(item.sequence.request.prompt_logprobs_from is None for item in picked)
            and all(item.sequence.request.pooling is None for item in picked)
            and not (was_ahead and self._speculation is not None and self._speculation.would_extend(picked))
        )

    def _goes_on(self, sequence: Sequence) -> bool:
        """Whether the token that is on its way is not the last that it may have."""
        return (
            sequence.num_generated + 1 < sequence.request.stopping.max_tokens
            and len(sequence.tokens) + 1 < self._context_length
        )


@contextmanager
def _with_a_token_more(sequences: Seq[Sequence]) -> Iterator[None]:
    """Sequences as they will be once their tokens are committed; which tokens is not said."""
    before = [sequence.num_computed for sequence in sequences]
    for sequence in sequences:
        sequence.num_computed = len(sequence.tokens)
        sequence.tokens.append(0)
    try:
        yield
    finally:
        for sequence, num_computed in zip(sequences, before, strict=True):
            sequence.tokens.pop()
            sequence.num_computed = num_computed
