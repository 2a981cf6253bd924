"""The step loop: schedule, build, forward, sample, commit.

One thread owns an engine. It knows nothing of gRPC, of asyncio or of files: requests come in by `add`, answers go out
as the events that `step` returns.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import islice

import torch

from weft.adapters.residency import AdapterRef
from weft.errors import DeadlineExceeded, GenerationFailed, WeftError
from weft.kernels.plan import Plans
from weft.server.engine.ahead import Ahead, Launched
from weft.server.engine.batch import CheckedRow, PooledRows, PromptRows, build_batch
from weft.server.engine.deadlines import Deadlines
from weft.server.engine.limits import Limits
from weft.server.engine.meter import Meter
from weft.server.engine.model import PagedModel
from weft.server.engine.patience import Patience
from weft.server.engine.pooling import Pooled, pool
from weft.server.engine.reporter import Reporter
from weft.server.engine.request import Delta, FinishReason, Request, Token
from weft.server.engine.sampler import Draw, Sample, are_finite, choose
from weft.server.engine.scheduler import Scheduled, Scheduler
from weft.server.engine.sequence import Sequence
from weft.server.engine.speculation import Speculation
from weft.server.engine.text import Decode, OutputText
from weft.server.engine.transfer import to_device
from weft.server.metrics import Metrics

_log = logging.getLogger(__name__)

_HOST = torch.device("cpu")
"""Where a step is laid out; the model takes it to its device in the way that is quickest for the step."""

Event = tuple[Request, Delta | WeftError]
"""What happened to a request: more of its answer, or the error that ended it."""


class Engine:
    """Continuous batching over one model. Not thread-safe, but for `check`."""

    def __init__(
        self,
        model: PagedModel,
        scheduler: Scheduler,
        limits: Limits,
        decode: Decode,
        eos_token_ids: frozenset[int],
        release: Callable[[AdapterRef], None],
        metrics: Metrics,
        clock: Callable[[], float],
        speculation: Speculation | None = None,
        *,
        max_wait_s: float = 0.0,
        run_ahead: bool = False,
    ) -> None:
        """release gives an adapter version back; clock is monotonic, in seconds.

        max_wait_s: for a turn, while others have all the room; 0: for ever.
        run_ahead: launch steps before the tokens that they follow are on the host; see `ahead.py`.
        """
        self.limits = limits
        self.clock = clock
        self._model = model
        self._scheduler = scheduler
        self._decode = decode
        self._reporter = Reporter(decode)
        self._plans = Plans()
        self._eos_token_ids = eos_token_ids
        self._release = release
        self._meter = Meter(metrics, scheduler)
        self._speculation = speculation
        self._ahead = Ahead(scheduler, self._launch, limits.context_length, speculation, enabled=run_ahead)
        self._sequences: dict[Request, Sequence] = {}
        self._deadlines = Deadlines()
        self._patience = Patience(max_wait_s)
        self._is_stalled = False
        self.begun: dict[Request, float] = {}
        """Who ran for the first time in the last step, and since when."""
        self.is_full = False
        """Whether the last step had no room for all who were ready. Any thread may ask."""

    @property
    def queued_token_s(self) -> float | None:
        """Seconds for which each prompt token in the queue holds up those behind it, if known. Any thread may ask."""
        return self._meter.forecast.queued_token_s(self.clock())

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def idle_s(self) -> float | None:
        """For how long a step would do nothing, unless a command comes or an adapter: 0 if it would, None: for ever."""
        if not self._sequences:
            return None
        if not self._is_stalled:
            return 0.0
        end_s = self._deadlines.next_s
        return None if end_s is None else max(0.0, end_s - self.clock())

    def check(self, request: Request) -> None:
        """Raises InvalidRequest for one that does not fit in the limits."""
        self.limits.check(request)

    def add(self, request: Request, adapters: tuple[AdapterRef, ...]) -> None:
        """Queue a checked request; its adapter versions are the engine's to release from now on."""
        stopping = request.stopping
        sequence = Sequence(
            request=request,
            adapters=adapters,
            text=OutputText(self._decode, stopping.stop_sequences, include_stop=stopping.include_stop_sequence),
            rng=random.Random(request.sampling.seed),
            arrived_s=self.clock() if request.arrived_s is None else request.arrived_s,
            matcher=request.constraint.matcher() if request.constraint is not None else None,
        )
        self._sequences[request] = sequence
        self._deadlines.add(sequence)
        self._patience.add(sequence)
        self._scheduler.add(sequence)

    def cancel(self, request: Request) -> None:
        """End a request that nobody waits for any more; one that has ended already is no error."""
        sequence = self._sequences.get(request)
        if sequence is not None:
            self._wipe(sequence)
            self._retire(sequence, FinishReason.CANCELLED.value)

    def abort_all(self, error: WeftError) -> list[Event]:
        """End every request with the same error."""
        return [self._fail(sequence, error) for sequence in list(self._sequences.values())]

    def step(self) -> list[Event]:
        """Advance by one forward pass: every picked sequence by its share, every finished prompt by a new token.

        Does nothing but end requests where all that are left wait for their adapters.
        """
        started_s = self.clock()
        events = self._expire(started_s)
        events += self._give_up(started_s)
        self.begun = {}
        launched = self._ahead.take(self._is_running)
        picked = launched.picked if launched is not None else self._schedule(started_s, events)
        self._is_stalled = not picked
        self.is_full = self._scheduler.is_full
        if not picked:
            self._meter.nothing_ran()
            return events
        num_decodes = sum(item.num_tokens == 1 and item.sequence.num_generated > 0 for item in picked)
        events += self._run(picked, launched)
        now_s = self.clock()
        self._meter.step(picked, num_decodes, self.begun, now_s - started_s, now_s)
        return events

    def _schedule(self, now_s: float, events: list[Event]) -> Seq[Scheduled]:
        """Pick the step's tokens; who can't be run is told so in the events."""
        preemptions = self._scheduler.num_preemptions
        picked = self._scheduler.schedule()
        events += [self._fail(sequence, error) for sequence, error in self._scheduler.hopeless]
        self._meter.preempted(self._scheduler.num_preemptions - preemptions)
        for item in picked:
            if item.sequence.started_s is None:
                item.sequence.started_s = now_s
                self._patience.remove(item.sequence)
                self.begun[item.sequence.request] = now_s
                self._meter.begun(item.sequence)
        return self._speculation.extend(picked) if picked and self._speculation is not None else picked

    def check_pools(self) -> None:
        """Audit blocks against sequences. Raises AssertionError."""
        self._scheduler.check()
        assert set(self._scheduler.sequences()) == set(self._sequences.values()), "a sequence is lost"

    def _run(self, picked: Seq[Scheduled], launched: Launched | None = None) -> list[Event]:
        """Forward, sample, commit. A step that fails is run again for each request alone: the guilty end, no other.

        launched: its forward pass, if that was launched before.
        """
        sampled = [item for item in picked if item.completes and item.sequence.request.pooling is None]
        was_ahead = launched is not None
        try:
            launched = launched or self._launch(picked)
            batch, logits, hidden = launched.batch, launched.made.logits, launched.made.hidden
            reports = [self._reporter.prompt(rows, logits) for rows in batch.prompt_rows]
            finite = are_finite(_rows(logits, [checked.row for checked in batch.checked_rows]))
            pooled = pool(hidden, batch.pooled, self._model) if hidden is not None else []
            draws = self._sample(sampled, _rows(logits, batch.sample_rows))
            self._ahead.follow(picked, [draw.tokens for draw in draws], was_ahead=was_ahead)
            samples = _by_item(sampled, draws)
        except Exception as error:  # noqa: BLE001 - the edge of the loop: others must go on
            self._ahead.drop()
            if len(picked) > 1:
                return [event for item in picked for event in self._run([item])]
            (item,) = picked
            _log.exception("request %s failed", item.sequence.request.request_id, extra=_scope(item.sequence))
            failure = GenerationFailed(f"the request's own step failed ({type(error).__name__})")
            return [self._fail(item.sequence, failure)]
        for item in picked:
            item.sequence.num_computed += item.num_tokens
        now_s = self.clock()
        events = self._take_reports(batch.prompt_rows, reports)
        events += self._publish_chunks(batch.checked_rows, finite)
        events += self._take_pooled(batch.pooled, pooled, now_s)
        for item, made in zip(sampled, samples, strict=True):
            if self._is_running(item.sequence):
                events += self._commit(item, made, now_s)
        return events

    def _is_running(self, sequence: Sequence) -> bool:
        return self._sequences.get(sequence.request) is sequence

    def _launch(self, picked: Seq[Scheduled], fed: torch.Tensor | None = None) -> Launched:
        """Lay out a step and have the device begin with it. fed: its tokens, where only the device knows them."""
        block_tokens, check_chunks = self._scheduler.pool.block_tokens, self._scheduler.prefixes.enabled
        batch = build_batch(picked, block_tokens, _HOST, check_chunks=check_chunks, make_plan=self._plans)
        batch = batch if fed is None else replace(batch, fed=fed)
        return Launched(picked, batch, self._model.forward(batch))

    def _sample(self, complete: Seq[Scheduled], logits: torch.Tensor) -> list[Draw]:
        """What comes after each sequence's last token and after each of its drafts. logits: a row for each."""
        sequences = [item.sequence for item in complete for _ in range(1 + len(item.drafts))]
        ahead = [at for item in complete for at in range(1 + len(item.drafts))]
        return choose(logits, sequences, self._eos_token_ids, ahead) if sequences else []

    def _take_reports(self, reported: Seq[PromptRows], reports: Seq[list[Token]]) -> list[Event]:
        """Keep them for the first delta of each; a prompt whose logits are not finite fails."""
        events: list[Event] = []
        for rows, tokens in zip(reported, reports, strict=True):
            rows.sequence.report_prompt(tokens)
            if any(token.logprob is not None and math.isnan(token.logprob) for token in tokens):
                events.append(self._fail(rows.sequence, _not_finite(rows.sequence)))
        return events

    def _publish_chunks(self, checked_rows: Seq[CheckedRow], finite: Seq[bool]) -> list[Event]:
        """Let others begin with what these prompts have computed so far; one whose logits are not finite fails."""
        events: list[Event] = []
        for checked, is_finite in zip(checked_rows, finite, strict=True):
            sequence = checked.sequence
            if sequence.request not in self._sequences:
                continue
            if is_finite:
                self._scheduler.prefixes.publish(sequence)
            else:
                events.append(self._fail(sequence, _not_finite(sequence)))
        return events

    def _take_pooled(self, rows: Seq[PooledRows], pooled: Seq[Pooled], now_s: float) -> list[Event]:
        """Keep what there is of each vector, publish, and end the sequences whose vectors are complete."""
        events: list[Event] = []
        for sequence, made in zip((each.sequence for each in rows), pooled, strict=True):
            sequence.pooled = made.state
            if not made.finite:
                events.append(self._fail(sequence, _not_finite(sequence)))
                continue
            self._scheduler.prefixes.publish(sequence)
            if made.vector is not None:
                events.append(self._finish(sequence, FinishReason.MAX_TOKENS, now_s, vector=made.vector))
        return events

    def _commit(self, item: Scheduled, made: Seq[Sample], now_s: float) -> list[Event]:
        """Append what was sampled, up to the first draft that is wrong; publish it; end the sequence if it is complete.

        made: what was sampled after the last token, and after each draft.
        """
        sequence = item.sequence
        if item.drafts and not all(one.finite for one in made):
            self._undraft(sequence)
            return []
        if not made[0].finite:
            return [self._fail(sequence, _not_finite(sequence))]
        self._scheduler.prefixes.publish(sequence)
        if sequence.request.stopping.max_tokens == 0:
            return [self._finish(sequence, FinishReason.MAX_TOKENS, now_s)]
        token, text, reason = self._append(sequence, made[0])
        tokens = [token]
        for draft, one in zip(item.drafts, made[1:], strict=True):
            if reason is not None or tokens[-1].id != draft:
                break
            token, new, reason = self._append(sequence, one)
            tokens.append(token)
            text += new
        sequence.num_computed = len(sequence.tokens) - 1
        self._learn(item, len(tokens) - 1)
        self._meter.tokens(sequence, len(tokens), now_s)
        if reason is not None:
            if self._ahead.covers(sequence):
                self._model.scrub(self._last_blocks(sequence))  # behind the step that writes there
            return [self._finish(sequence, reason, now_s, text, tuple(tokens))]
        return [(sequence.request, Delta(text, tuple(tokens), prompt=sequence.take_prompt_report()))]

    def _learn(self, item: Scheduled, num_accepted: int) -> None:
        if item.drafts and item.sequence.lookup is not None:
            item.sequence.lookup.learn(len(item.drafts), num_accepted)
            self._meter.speculated(num_accepted, len(item.drafts))

    def _undraft(self, sequence: Sequence) -> None:
        """Take back a step whose drafts gave values that are not finite: masked out, they still spoil the other rows.

        The block they begin in is computed again, without any.
        """
        last = self._last_blocks(sequence)
        self._model.scrub(last)
        sequence.num_computed = (len(sequence.blocks) - len(last)) * self._scheduler.pool.block_tokens
        if sequence.lookup is not None:
            sequence.lookup.stop()

    def _last_blocks(self, sequence: Sequence) -> list[int]:
        """From that of its last token on."""
        return sequence.blocks[(len(sequence.tokens) - 1) // self._scheduler.pool.block_tokens :]

    def _append(self, sequence: Sequence, made: Sample) -> tuple[Token, str, FinishReason | None]:
        """One more token: as it is published, the text that became final with it, and why it is the last, if it is."""
        sequence.tokens.append(made.token)
        reason = self._stop_reason(sequence, made.token)
        piece, text = "", ""
        if reason is not FinishReason.STOP_TOKEN:
            piece, text = sequence.text.push(made.token, may_stop=sequence.may_stop)
            if sequence.matcher is not None:
                sequence.matcher.accept(made.token)
                reason = FinishReason.STOP_TOKEN if sequence.matcher.is_over else reason
        if reason is not None and not sequence.text.stop_sequence:
            text += sequence.text.flush(may_stop=sequence.may_stop)
        if sequence.text.stop_sequence:
            reason = FinishReason.STOP_SEQUENCE
        return self._reporter.sampled(made, piece), text, reason

    def _stop_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        stopping = sequence.request.stopping
        if token in stopping.stop_token_ids or (token in self._eos_token_ids and not stopping.ignore_eos):
            return FinishReason.STOP_TOKEN
        if sequence.num_generated >= stopping.max_tokens:
            return FinishReason.MAX_TOKENS
        if len(sequence.tokens) >= self.limits.context_length:
            return FinishReason.CONTEXT_LENGTH
        return None

    def _expire(self, now_s: float) -> list[Event]:
        """End what ran out of time: deadlines with an error, time limits with what there is."""
        events: list[Event] = []
        for sequence in self._deadlines.due(now_s):
            deadline_s = sequence.request.deadline_s
            if deadline_s is not None and now_s >= deadline_s:
                events.append(
                    self._fail(sequence, DeadlineExceeded("the deadline passed before the answer was complete"))
                )
            else:
                text = sequence.text.flush(may_stop=sequence.may_stop)
                reason = FinishReason.STOP_SEQUENCE if sequence.text.stop_sequence else FinishReason.TIME_LIMIT
                self._wipe(sequence)
                events.append(self._finish(sequence, reason, now_s, text))
        return events

    def _give_up(self, now_s: float) -> list[Event]:
        """Refuse those that wait and can't meet their deadlines at the current rate, or have waited too long.

        Who waits while there is room waits for an adapter, which is no reason.
        """
        scheduler = self._scheduler
        late = self._meter.forecast.late(
            scheduler.waiting,
            scheduler.num_cached,
            now_s,
            is_idle=not scheduler.running,
            is_full=scheduler.is_full,
        )
        events = [self._fail(sequence, error) for sequence, error in late]
        over = self._patience.over(now_s) if scheduler.is_full else []
        return events + [self._fail(sequence, error) for sequence, error in over]

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        now_s: float,
        text: str = "",
        tokens: tuple[Token, ...] = (),
        vector: torch.Tensor | None = None,
    ) -> Event:
        finish = sequence.finish(reason, now_s)
        self._retire(sequence, reason.value)
        return sequence.request, Delta(text, tokens, finish, sequence.take_prompt_report(), vector)

    def _fail(self, sequence: Sequence, error: WeftError) -> Event:
        self._wipe(sequence)
        self._retire(sequence, "deadline" if isinstance(error, DeadlineExceeded) else "error")
        return sequence.request, error

    def _wipe(self, sequence: Sequence) -> None:
        """Before an end that no finite logits were seen to come to: nobody else gets what it computed."""
        self._model.scrub(self._scheduler.pool.unpublished(sequence.blocks))

    def _retire(self, sequence: Sequence, outcome: str) -> None:
        """The one exit: free blocks, release adapters, count."""
        request = sequence.request
        del self._sequences[request]
        self._deadlines.remove(sequence)
        self._patience.remove(sequence)
        if not self._sequences:
            self._plans = Plans()  # it holds the last step's adapters
            self._ahead.drop()
        self._scheduler.remove(sequence)
        for ref in sequence.adapters:
            self._release(ref)
        self._meter.ended(sequence, outcome, self.clock())


def _rows(logits: torch.Tensor, wanted: Seq[int]) -> torch.Tensor:
    """Those rows, given in order; not copied where they are all."""
    if len(wanted) == len(logits):
        return logits
    return logits[to_device(torch.tensor(wanted, dtype=torch.int64), logits.device)]


def _by_item(complete: Seq[Scheduled], draws: Seq[Draw]) -> list[Seq[Sample]]:
    """What was chosen, once it is on the host: after each item's last token, and after each of its drafts."""
    made = (sample for draw in draws for sample in draw.read())
    return [list(islice(made, 1 + len(item.drafts))) for item in complete]


def _not_finite(sequence: Sequence) -> WeftError:
    """Why no token can be chosen: a constraint that can't be followed any further, or the model."""
    if sequence.matcher is not None and sequence.matcher.error is not None:
        return sequence.matcher.error
    names = sequence.adapter_label or "the base model"
    what = "logits" if sequence.request.pooling is None else "numbers"
    return GenerationFailed(f"{names} gave {what} that are not finite")


def _scope(sequence: Sequence) -> dict[str, object]:
    """What names a request in the log, as it does where the RPC is served."""
    return {
        "request_id": sequence.request.request_id,
        "adapters": tuple(f"{ref.name}@{ref.version.digest}" for ref in sequence.adapters),
        "caller": sequence.request.caller,
    }
