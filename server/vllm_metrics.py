"""Counters and histograms that routers and dashboards know already: vLLM's names, with its buckets. A leaf."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
INTER_TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
E2E_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

QUERIED = "Prompt tokens looked up in the prefix cache."
HIT = "Prompt tokens found in the prefix cache."

_REASONS = {
    "stop_token": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "context_length": "length",
    "time_limit": "length",
    "cancelled": "abort",
    "deadline": "abort",
    "error": "error",
}


class VllmMetrics:
    """Counters and histograms under vLLM's names, with its buckets."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=registry).labels(model_name)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=registry)

        self._model_name = model_name
        self._ttft = histogram("vllm:time_to_first_token_seconds", "Time to first token.", TTFT_BUCKETS)
        self._inter_token = histogram("vllm:inter_token_latency_seconds", "Time between tokens.", INTER_TOKEN_BUCKETS)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Time from arrival to end.", E2E_BUCKETS)
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens of requests that ended.").labels(model_name)
        self._generated = counter("vllm:generation_tokens", "Tokens generated.").labels(model_name)
        self._queried = counter("vllm:prefix_cache_queries", QUERIED).labels(model_name)
        self._hit = counter("vllm:prefix_cache_hits", HIT).labels(model_name)
        self._ended = counter("vllm:request_success", "Requests that ended, by vLLM's reasons.", "finished_reason")

    def prefix_cache(self, num_queried: int, num_hit: int) -> None:
        self._queried.inc(num_queried)
        self._hit.inc(num_hit)

    def first_token(self, ttft_s: float) -> None:
        self._generated.inc()
        self._ttft.observe(ttft_s)

    def inter_token(self, seconds: float) -> None:
        self._generated.inc()
        self._inter_token.observe(seconds)

    def finished(self, outcome: str, prompt_tokens: int, e2e_s: float) -> None:
        self._ended.labels(self._model_name, _REASONS.get(outcome, "error")).inc()
        self._prompt.inc(prompt_tokens)
        self._e2e.observe(e2e_s)
