"""What an engine tells its metrics, and what it measures of itself to foresee how long others will wait."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from weft.server.engine.forecast import Forecast
from weft.server.engine.request import Request
from weft.server.engine.scheduler import Scheduled, Scheduler
from weft.server.engine.sequence import Sequence
from weft.server.metrics import Metrics, StepStats


class Meter:
    """Times are on the engine's clock, in seconds."""

    def __init__(self, metrics: Metrics, scheduler: Scheduler) -> None:
        self.forecast = Forecast(scheduler.pace)
        self._metrics = metrics
        self._scheduler = scheduler

    def nothing_ran(self) -> None:
        self._metrics.stands(self._stats([], 0, 0.0))

    def step(
        self, picked: Seq[Scheduled], num_decodes: int, begun: Iterable[Request], duration_s: float, now_s: float
    ) -> None:
        """One forward pass was made. begun: who ran for the first time in it."""
        stats = self._stats(picked, num_decodes, duration_s)
        self._metrics.step(stats)
        self._scheduler.pace.observe(stats.num_prefill_tokens, duration_s)
        if self._scheduler.is_full:
            self.forecast.step(sum(len(request.prompt) for request in begun), duration_s, now_s)

    def preempted(self, count: int) -> None:
        for _ in range(count):
            self._metrics.preempted()

    def begun(self, sequence: Sequence) -> None:
        """It runs for the first time."""
        if sequence.num_cached is not None:
            self._metrics.prefix_cache(len(sequence.request.prompt), sequence.num_cached)

    def speculated(self, num_accepted: int, num_drafts: int) -> None:
        self._metrics.speculated(num_accepted, num_drafts - num_accepted)

    def tokens(self, sequence: Sequence, count: int, now_s: float) -> None:
        """Several tokens that come at once share the time since the one before them."""
        label = sequence.adapter_label
        last_s = sequence.last_token_s
        if last_s is None or sequence.started_s is None:
            last_s = sequence.first_token_s = now_s
            queue_s = (sequence.started_s or now_s) - sequence.arrived_s
            self._metrics.first_token(label, queue_s, now_s - sequence.arrived_s)
            count -= 1
        for _ in range(count):
            self._metrics.inter_token(label, (now_s - last_s) / count)
            self.forecast.token((now_s - last_s) / count)
        sequence.last_token_s = now_s

    def ended(self, sequence: Sequence, outcome: str, now_s: float) -> None:
        """outcome: as `Metrics.finished` takes it."""
        self._metrics.finished(
            adapter=sequence.adapter_label,
            outcome=outcome,
            prompt_tokens=len(sequence.request.prompt),
            completion_tokens=sequence.num_generated,
            e2e_s=now_s - sequence.arrived_s,
        )

    def _stats(self, picked: Seq[Scheduled], num_decodes: int, duration_s: float) -> StepStats:
        pool = self._scheduler.pool
        return StepStats(
            duration_s=duration_s,
            num_prefill_tokens=sum(item.num_tokens for item in picked) - num_decodes,
            num_decode_tokens=num_decodes,
            num_requests=len(picked),
            adapters=_adapter_names(item.sequence for item in picked),
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            running_adapters=_adapter_names(self._scheduler.running),
            waiting_adapters=tuple(sorted(self._scheduler.waiting.adapters())),
            kv_blocks_used=pool.capacity - pool.num_free,
            kv_blocks_total=0 if self._scheduler.whole_prompts else pool.capacity,  # then nothing is kept in them
        )


def _adapter_names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    return tuple(sorted({ref.name for sequence in sequences for ref in sequence.adapters}))
