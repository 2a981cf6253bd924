"""What the server counts and times, for Prometheus. A leaf: it knows neither the engine nor gRPC.

Everything is published twice where routers and dashboards expect it: under Weft's own names (`weft_…`, with a bounded
label `adapter`) and under vLLM's (`vllm:…`, with its buckets, and with its label `model_name` where vLLM has one).
The registry is a parameter. `Metrics` is called by one thread at a time, the engine's, but where a
method says otherwise; scrapes come from any.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from weft.server.busiest import Busiest
from weft.server.vllm_metrics import E2E_BUCKETS, HIT, INTER_TOKEN_BUCKETS, QUERIED, TTFT_BUCKETS, VllmMetrics

_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LOAD_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_COUNT_BUCKETS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKEN_BUCKETS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)

_REFUSALS = (
    *("invalid_argument", "not_found", "already_exists", "failed_precondition", "resource_exhausted", "unavailable"),
    *("unauthenticated", "permission_denied", "deadline_exceeded", "internal"),
)
_TIERS = ("disk", "host")
_LOADS = ("ok", "failed")
_RELOADED = ("access", "certificate", "jwks")


@dataclass(frozen=True, slots=True)
class StepStats:
    """One step of the engine, and how things stand after it. Adapters are names, each once."""

    duration_s: float
    num_prefill_tokens: int
    num_decode_tokens: int
    num_requests: int
    adapters: tuple[str, ...]
    num_running: int
    num_waiting: int
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    kv_blocks_used: int
    kv_blocks_total: int


@dataclass(frozen=True, slots=True)
class AdapterSnapshot:
    """The registered adapters, counted by state, and the device pages that they take."""

    by_state: Mapping[str, int]
    pages_used: int
    pages_total: int


_IDLE = StepStats(0.0, 0, 0, 0, (), 0, 0, (), (), 0, 0)


class Metrics:
    """Every metric of the server. max_adapters: how many adapters get a label of their own; see `Busiest`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        max_adapters: int = 32,
        model_name: str = "",
        now: Callable[[], float] = time.time,
    ) -> None:
        """now: seconds since the epoch."""
        self._registry = registry
        self._last = _IDLE
        self._block_tokens = 0
        self._requests = _RequestMetrics(registry, max_adapters)
        self._steps = _StepMetrics(registry)
        self._vllm = VllmMetrics(registry, model_name)
        self._adapter_loads = Histogram(
            "weft_adapter_load_seconds", "Time of a load.", ["outcome"], buckets=_LOAD_BUCKETS, registry=registry
        )
        self._moves = Histogram(
            "weft_adapter_move_seconds",
            "Time of a registered adapter's move to the next faster tier, by the tier it came from.",
            ["tier", "outcome"],
            buckets=_LOAD_BUCKETS,
            registry=registry,
        )
        self._evictions = Counter(
            "weft_adapter_evictions", "Adapters that made room, by the tier they left.", ["tier"], registry=registry
        )
        self._refused = Counter(
            "weft_refused_requests", "Requests that the engine never had, by status code.", ["code"], registry=registry
        )
        self._quota_refused = Counter(
            "weft_quota_refusals", "Requests over their caller's quota, by the limit.", ["limit"], registry=registry
        )
        self._reloads = Counter(
            "weft_reloads", "Files and keys of access that were read again.", ["what", "outcome"], registry=registry
        )
        self._certificate_expiry: Gauge | None = None
        speculated = Counter(
            "weft_speculative_tokens", "Tokens guessed ahead, by outcome.", ["outcome"], registry=registry
        )
        self._accepted, self._rejected = speculated.labels("accepted"), speculated.labels("rejected")
        self._ready = Gauge("weft_ready", "1 while health says SERVING, else 0.", registry=registry)
        self._lost = Gauge("weft_engine_lost", "1 once the engine has stopped by itself.", registry=registry)
        self._begin_at_zero()
        self._snapshot: Callable[[], AdapterSnapshot] | None = None
        registry.register(_LoadCollector(model_name, lambda: self._last, self._adapters, now))

    def step(self, stats: StepStats) -> None:
        """One forward pass was made."""
        self._steps.observe(stats)
        self._last = stats

    def stands(self, stats: StepStats) -> None:
        """Nothing was computed, and this is how things stand."""
        self._last = stats

    def first_token(self, adapter: str, queue_s: float, ttft_s: float) -> None:
        """A request got its first token, `ttft_s` after it came; it waited the first `queue_s` of them."""
        self._requests.first_token(adapter, queue_s, ttft_s)
        self._vllm.first_token(ttft_s)

    def inter_token(self, adapter: str, seconds: float) -> None:
        """A request got another token, so long after the one before."""
        self._requests.inter_token(adapter, seconds)
        self._vllm.inter_token(seconds)

    def speculated(self, accepted: int, rejected: int) -> None:
        """So many tokens that were guessed were right, and so many were not."""
        self._accepted.inc(accepted)
        self._rejected.inc(rejected)

    def preempted(self) -> None:
        """A running request gave up its blocks."""
        self._steps.preemptions.inc()

    def prefix_cache(self, num_queried: int, num_hit: int) -> None:
        """A request ran for the first time: of its prompt's tokens, so many were computed before."""
        self._steps.prefix_cache(num_queried, num_hit)
        self._vllm.prefix_cache(num_queried, num_hit)

    def finished(self, adapter: str, outcome: str, prompt_tokens: int, completion_tokens: int, e2e_s: float) -> None:
        """A request ended. outcome: a finish reason, "error" or "deadline"."""
        self._requests.finished(adapter, outcome, prompt_tokens, completion_tokens, e2e_s)
        self._vllm.finished(outcome, prompt_tokens, e2e_s)
        self._last = _less_one(self._last)

    def refused(self, code: str) -> None:
        """A request ended before the engine had it. code: a gRPC status, lower case. Any thread may call this."""
        self._refused.labels(code).inc()

    def quota_refused(self, limit: str) -> None:
        """A request was over its caller's quota: requests_per_minute, tokens_per_minute or max_in_flight."""
        self._quota_refused.labels(limit).inc()

    def reloaded(self, what: str, outcome: str) -> None:
        """What says who may call was read again. what: "access", "certificate" or "jwks"; outcome: "ok" or "failed"."""
        self._reloads.labels(what, outcome).inc()

    def certificate_expires(self, at_s: float) -> None:
        """The certificate that new connections get is valid until then, in seconds since the epoch."""
        if self._certificate_expiry is None:
            self._certificate_expiry = Gauge(
                "weft_certificate_expiry_timestamp_seconds",
                "When the TLS certificate expires.",
                registry=self._registry,
            )
        self._certificate_expiry.set(at_s)

    def adapter_loaded(self, seconds: float, outcome: str) -> None:
        """A load ended: outcome "ok", or why not. May be called from any thread."""
        self._adapter_loads.labels(outcome).observe(seconds)

    def adapter_moved(self, tier: str, seconds: float, outcome: str) -> None:
        """A move from a tier, "disk" or "host", ended: "ok" or "failed". May be called from any thread."""
        self._moves.labels(tier, outcome).observe(seconds)

    def adapter_evicted(self, tier: str) -> None:
        """An adapter left a tier, "host" or "device", to make room. May be called from any thread."""
        self._evictions.labels(tier).inc()

    def set_ready(self, *, is_ready: bool) -> None:
        """What health says. Any thread may call this."""
        self._ready.set(is_ready)

    def engine_lost(self) -> None:
        """The engine stopped by itself. Any thread may call this."""
        self._lost.set(1)

    def set_limits(self, max_running: int, max_queued: int) -> None:
        """The most requests that run and that wait."""
        for name, text, most in (
            ("weft_requests_running_limit", "The most requests that run at once.", max_running),
            ("weft_requests_waiting_limit", "The most requests that wait; one more is refused.", max_queued),
        ):
            Gauge(name, text, registry=self._registry).set(most)

    def watch_adapters(self, snapshot: Callable[[], AdapterSnapshot]) -> None:
        """Publish the adapters as they are at each scrape; called from the scrape's thread."""
        self._snapshot = snapshot

    def set_build_info(self, version: str, model: str, dtype: str, device: str) -> None:
        labels = {"version": version, "model": model, "dtype": dtype, "device": device}
        self._constant("weft_build_info", "What runs here: always 1.", labels)

    def set_cache_config(self, block_size: int, num_blocks: int) -> None:
        """block_size in tokens; num_blocks that requests can use."""
        self._last = replace(self._last, kv_blocks_total=num_blocks)
        self._block_tokens = block_size
        labels = {"block_size": str(block_size), "num_gpu_blocks": str(num_blocks)}
        self._constant("vllm:cache_config_info", "Sizes of the KV cache: always 1.", labels)

    @property
    def kv_tokens(self) -> tuple[int, int]:
        """Tokens that fit in the KV cache, and how many nobody held after the last step. Any thread may ask."""
        last = self._last
        free = last.kv_blocks_total - last.kv_blocks_used
        return last.kv_blocks_total * self._block_tokens, free * self._block_tokens

    def _begin_at_zero(self) -> None:
        """A series that begins at 1 shows no increase: the first of what is alerted on would go unseen."""
        for code in _REFUSALS:
            self._refused.labels(code)
        for outcome in _LOADS:
            for what in _RELOADED:
                self._reloads.labels(what, outcome)
            self._adapter_loads.labels(outcome)
            for tier in _TIERS:
                self._moves.labels(tier, outcome)
        for tier in ("host", "device"):
            self._evictions.labels(tier)

    def _constant(self, name: str, text: str, labels: Mapping[str, str]) -> None:
        Gauge(name, text, list(labels), registry=self._registry).labels(**labels).set(1)

    def _adapters(self) -> AdapterSnapshot | None:
        return self._snapshot() if self._snapshot is not None else None


def _less_one(last: StepStats) -> StepStats:
    """How things stand after one request ended between steps.

    Whether it ran or waited is not known here: the next step says, and when there is none, none are left.
    """
    running, waiting = last.num_running, last.num_waiting
    running, waiting = (running - 1, waiting) if running else (0, max(0, waiting - 1))
    if running or waiting:
        return replace(last, num_running=running, num_waiting=waiting)
    return replace(_IDLE, kv_blocks_total=last.kv_blocks_total)


class _RequestMetrics:
    """Requests, by adapter."""

    def __init__(self, registry: CollectorRegistry, max_adapters: int) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self._busiest = Busiest(max_adapters, self._drop)
        self._ended = counter("weft_requests", "Requests that ended, by outcome.", "adapter", "outcome")
        self._prompt = counter("weft_prompt_tokens", "Prompt tokens of requests that ended.", "adapter")
        self._generated = counter("weft_generation_tokens", "Tokens generated.", "adapter")
        self._queue = histogram("weft_request_queue_seconds", "Time until first run.", TTFT_BUCKETS, "adapter")
        self._ttft = histogram("weft_time_to_first_token_seconds", "Time to first token.", TTFT_BUCKETS, "adapter")
        self._inter_token = histogram(
            "weft_inter_token_latency_seconds", "Time between tokens.", INTER_TOKEN_BUCKETS, "adapter"
        )
        self._e2e = histogram("weft_e2e_request_latency_seconds", "Time from arrival to end.", E2E_BUCKETS, "adapter")
        self._prompt_sizes = histogram("weft_request_prompt_tokens", "Prompt tokens a request.", _TOKEN_BUCKETS)
        self._completion_sizes = histogram(
            "weft_request_generation_tokens", "Generated tokens a request.", _TOKEN_BUCKETS
        )
        self._outcomes: set[str] = set()

    def first_token(self, adapter: str, queue_s: float, ttft_s: float) -> None:
        label = self._busiest.label(adapter)
        self._generated.labels(label).inc()
        self._queue.labels(label).observe(queue_s)
        self._ttft.labels(label).observe(ttft_s)

    def inter_token(self, adapter: str, seconds: float) -> None:
        label = self._busiest.label(adapter)
        self._generated.labels(label).inc()
        self._inter_token.labels(label).observe(seconds)

    def finished(self, adapter: str, outcome: str, prompt_tokens: int, completion_tokens: int, e2e_s: float) -> None:
        label = self._busiest.label(adapter)
        self._outcomes.add(outcome)
        self._ended.labels(label, outcome).inc()
        self._prompt.labels(label).inc(prompt_tokens)
        self._e2e.labels(label).observe(e2e_s)
        self._prompt_sizes.observe(prompt_tokens)
        self._completion_sizes.observe(completion_tokens)
        self._busiest.count(adapter)

    def _drop(self, label: str) -> None:
        for metric in (self._prompt, self._generated, self._queue, self._ttft, self._inter_token, self._e2e):
            with suppress(KeyError):
                metric.remove(label)
        for outcome in self._outcomes:
            with suppress(KeyError):
                self._ended.remove(label, outcome)


class _StepMetrics:
    """Steps of the engine: what one batch held."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=registry)

        self._seconds = histogram("weft_step_seconds", "Time of a step.", _STEP_BUCKETS)
        self._tokens = histogram("weft_step_tokens", "Tokens that a step computed.", _TOKEN_BUCKETS)
        self._requests = histogram("weft_step_requests", "Requests in a step.", _COUNT_BUCKETS)
        self._adapters = histogram("weft_step_adapters", "Different adapters in a step.", _COUNT_BUCKETS)
        self._max_requests = gauge("weft_step_requests_max", "The most requests in one step so far.")
        self._max_adapters = gauge("weft_step_adapters_max", "The most different adapters in one step so far.")
        self._most = (0, 0)
        self._phases = Counter(
            "weft_computed_tokens", "Tokens computed, repeats after preemption included.", ["phase"], registry=registry
        )
        self.preemptions = Counter("weft_preemptions", "Running requests that gave up their blocks.", registry=registry)
        self._queried = Counter("weft_prefix_cache_queries", QUERIED, registry=registry)
        self._hit = Counter("weft_prefix_cache_hits", HIT, registry=registry)

    def prefix_cache(self, num_queried: int, num_hit: int) -> None:
        self._queried.inc(num_queried)
        self._hit.inc(num_hit)

    def observe(self, stats: StepStats) -> None:
        self._seconds.observe(stats.duration_s)
        self._tokens.observe(stats.num_prefill_tokens + stats.num_decode_tokens)
        self._phases.labels("prefill").inc(stats.num_prefill_tokens)
        self._phases.labels("decode").inc(stats.num_decode_tokens)
        self._requests.observe(stats.num_requests)
        self._adapters.observe(len(stats.adapters))
        self._most = (max(self._most[0], stats.num_requests), max(self._most[1], len(stats.adapters)))
        self._max_requests.set(self._most[0])
        self._max_adapters.set(self._most[1])


_ADAPTER_STATES = ("loading", "disk", "host", "device", "failed")


class _LoadCollector(Collector):
    """What stands now, read at each scrape. Keeps no series of what once was."""

    def __init__(
        self,
        model_name: str,
        last: Callable[[], StepStats],
        adapters: Callable[[], AdapterSnapshot | None],
        now: Callable[[], float],
    ) -> None:
        self._model_name = model_name
        self._last = last
        self._adapters = adapters
        self._now = now

    def describe(self) -> list[Metric]:
        """Nothing: what is collected at registration would call the owner too early."""
        return []

    def collect(self) -> Iterator[Metric]:
        last, adapters = self._last(), self._adapters()
        yield from self._requests(last)
        yield self._lora_requests_info(last, adapters)
        if adapters is not None:
            states = GaugeMetricFamily("weft_adapters", "Registered adapters, by state.", labels=["state"])
            for state in _ADAPTER_STATES:
                states.add_metric([state], adapters.by_state.get(state, 0))
            yield states
            yield GaugeMetricFamily("weft_adapter_pages_used", "Device pages in use.", value=adapters.pages_used)
            yield GaugeMetricFamily("weft_adapter_pages", "Device pages there are.", value=adapters.pages_total)

    def _requests(self, last: StepStats) -> Iterator[Metric]:
        usage = last.kv_blocks_used / last.kv_blocks_total if last.kv_blocks_total else 0.0
        running, waiting = "Requests that hold KV blocks.", "Requests that wait for their turn."
        for name, text, value in (
            ("vllm:num_requests_running", running, last.num_running),
            ("vllm:num_requests_waiting", waiting, last.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", usage),
        ):
            family = GaugeMetricFamily(name, text, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family
        yield GaugeMetricFamily("weft_requests_running", running, value=last.num_running)
        yield GaugeMetricFamily("weft_requests_waiting", waiting, value=last.num_waiting)
        yield GaugeMetricFamily("weft_kv_blocks_used", "KV blocks in use.", value=last.kv_blocks_used)
        yield GaugeMetricFamily("weft_kv_blocks", "KV blocks there are.", value=last.kv_blocks_total)

    def _lora_requests_info(self, last: StepStats, adapters: AdapterSnapshot | None) -> Metric:
        """One series, its value the time now; max_lora: no more adapters than pages can be in device memory."""
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of the requests that run and that wait; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        labels = [
            str(adapters.pages_total if adapters else 0),
            ",".join(last.running_adapters),
            ",".join(last.waiting_adapters),
        ]
        family.add_metric(labels, self._now())
        return family
