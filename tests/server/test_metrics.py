"""Every metric through the registry, as a scrape sees it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from promtool import needs_promtool, promtool

from weft.server.busiest import BASE, OTHER
from weft.server.metrics import AdapterSnapshot, Metrics, StepStats

MODEL = {"model_name": "tiny"}

STEP = StepStats(
    duration_s=0.02,
    num_prefill_tokens=30,
    num_decode_tokens=2,
    num_requests=4,
    adapters=("one", "two"),
    num_running=4,
    num_waiting=3,
    running_adapters=("one", "two"),
    waiting_adapters=("three",),
    kv_blocks_used=5,
    kv_blocks_total=20,
)

# api.md's own lists.
TTFT = ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160 640 2560"
INTER_TOKEN = ".01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10 20 40 80"
E2E = ".3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680"


class Scraped:
    """Metrics, and the registry that they are read from."""

    def __init__(self, max_adapters: int = 32) -> None:
        self.registry = CollectorRegistry()
        self.metrics = Metrics(self.registry, max_adapters, "tiny", now=lambda: 1234.5)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def family(self, name: str) -> Metric:
        return next(family for family in self.registry.collect() if family.name == name)

    def adapters(self, name: str) -> set[str]:
        return {sample.labels["adapter"] for sample in self.family(name).samples if "adapter" in sample.labels}

    def end(self, adapter: str = "", outcome: str = "max_tokens") -> None:
        self.metrics.finished(adapter, outcome, prompt_tokens=7, completion_tokens=3, e2e_s=0.4)


@pytest.fixture
def scraped() -> Scraped:
    return Scraped()


@pytest.mark.parametrize(
    ("name", "buckets"),
    [
        ("vllm:time_to_first_token_seconds", TTFT),
        ("vllm:inter_token_latency_seconds", INTER_TOKEN),
        ("vllm:e2e_request_latency_seconds", E2E),
    ],
)
def test_the_buckets_are_vllms(scraped: Scraped, name: str, buckets: str) -> None:
    bounds = [sample.labels["le"] for sample in scraped.family(name).samples if sample.name.endswith("_bucket")]
    assert [float(bound) for bound in bounds[:-1]] == [float(bound) for bound in buckets.split()]
    assert bounds[-1] == "+Inf"


def test_every_name_that_routers_and_dashboards_read_is_there_before_the_first_request(scraped: Scraped) -> None:
    scraped.metrics.set_cache_config(16, 100)
    scraped.metrics.set_build_info("1", "tiny", "float32", "cpu")
    scrape = generate_latest(scraped.registry).decode()
    for line in (
        'vllm:num_requests_running{model_name="tiny"} 0.0',
        'vllm:num_requests_waiting{model_name="tiny"} 0.0',
        'vllm:kv_cache_usage_perc{model_name="tiny"} 0.0',
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"} 1.0',
        'vllm:time_to_first_token_seconds_count{model_name="tiny"} 0.0',
        'vllm:inter_token_latency_seconds_count{model_name="tiny"} 0.0',
        'vllm:e2e_request_latency_seconds_count{model_name="tiny"} 0.0',
        'vllm:prompt_tokens_total{model_name="tiny"} 0.0',
        'vllm:generation_tokens_total{model_name="tiny"} 0.0',
        'vllm:prefix_cache_queries_total{model_name="tiny"} 0.0',
        'vllm:prefix_cache_hits_total{model_name="tiny"} 0.0',
        "# TYPE vllm:request_success_total counter",
        'vllm:lora_requests_info{max_lora="0",running_lora_adapters="",waiting_lora_adapters=""} 1234.5',
        'weft_build_info{device="cpu",dtype="float32",model="tiny",version="1"} 1.0',
        "weft_kv_blocks 100.0",
    ):
        assert line in scrape.splitlines()


def test_refusals_are_counted_by_code(scraped: Scraped) -> None:
    for code in ("not_found", "invalid_argument", "not_found"):
        scraped.metrics.refused(code)
    assert scraped.value("weft_refused_requests_total", code="not_found") == 2
    assert scraped.value("weft_refused_requests_total", code="invalid_argument") == 1


def test_guesses_are_counted_by_outcome(scraped: Scraped) -> None:
    for accepted, rejected in ((3, 1), (0, 4)):
        scraped.metrics.speculated(accepted, rejected)
    assert scraped.value("weft_speculative_tokens_total", outcome="accepted") == 3
    assert scraped.value("weft_speculative_tokens_total", outcome="rejected") == 5


def test_the_prefix_cache_is_counted_in_tokens(scraped: Scraped) -> None:
    for queried, hit in ((20, 0), (30, 16)):
        scraped.metrics.prefix_cache(queried, hit)
    for prefix, labels in (("weft", {}), ("vllm:", MODEL)):
        name = f"{prefix}{'' if prefix.endswith(':') else '_'}prefix_cache"
        assert scraped.value(f"{name}_queries_total", **labels) == 50
        assert scraped.value(f"{name}_hits_total", **labels) == 16


def test_a_step_says_what_it_held(scraped: Scraped) -> None:
    scraped.metrics.step(STEP)
    scraped.metrics.step(replace(STEP, num_requests=1, adapters=("one",)))
    assert scraped.value("weft_step_seconds_count") == 2
    assert scraped.value("weft_step_tokens_sum") == 64
    assert scraped.value("weft_computed_tokens_total", phase="prefill") == 60
    assert scraped.value("weft_computed_tokens_total", phase="decode") == 4
    assert scraped.value("weft_step_requests_sum") == 5
    assert scraped.value("weft_step_adapters_bucket", le="1.0") == 1
    assert scraped.value("weft_step_adapters_bucket", le="2.0") == 2
    assert scraped.value("weft_step_adapters_max") == 2
    assert scraped.value("weft_step_requests_max") == 4


def test_a_step_says_how_things_stand(scraped: Scraped) -> None:
    scraped.metrics.step(STEP)
    assert scraped.value("vllm:num_requests_running", **MODEL) == scraped.value("weft_requests_running") == 4
    assert scraped.value("vllm:num_requests_waiting", **MODEL) == scraped.value("weft_requests_waiting") == 3
    assert scraped.value("vllm:kv_cache_usage_perc", **MODEL) == 0.25
    assert scraped.value("weft_kv_blocks_used") == 5


def test_lora_requests_info_is_one_series_whatever_came_before(scraped: Scraped) -> None:
    scraped.metrics.watch_adapters(lambda: AdapterSnapshot({"device": 3}, pages_used=4, pages_total=64))
    scraped.metrics.step(STEP)
    scraped.metrics.step(replace(STEP, running_adapters=("two",), waiting_adapters=()))
    (sample,) = scraped.family("vllm:lora_requests_info").samples
    assert sample.labels == {"max_lora": "64", "running_lora_adapters": "two", "waiting_lora_adapters": ""}
    assert sample.value == 1234.5


def test_requests_that_end_between_steps_leave_an_idle_server(scraped: Scraped) -> None:
    scraped.metrics.step(STEP)
    for left in range(6, -1, -1):
        scraped.end(outcome="cancelled")
        running = scraped.value("vllm:num_requests_running", **MODEL)
        waiting = scraped.value("vllm:num_requests_waiting", **MODEL)
        assert running is not None
        assert waiting is not None
        assert running + waiting == left
    assert scraped.value("vllm:kv_cache_usage_perc", **MODEL) == 0
    assert scraped.value("weft_kv_blocks") == 20
    (sample,) = scraped.family("vllm:lora_requests_info").samples
    assert sample.labels["running_lora_adapters"] == sample.labels["waiting_lora_adapters"] == ""
    scraped.end(outcome="cancelled")  # came and went between two scrapes, unseen by a step
    assert scraped.value("vllm:num_requests_running", **MODEL) == 0


def test_latencies_and_tokens_are_counted_under_both_names(scraped: Scraped) -> None:
    scraped.metrics.first_token("one", queue_s=0.002, ttft_s=0.03)
    scraped.metrics.inter_token("one", 0.02)
    scraped.metrics.inter_token("one", 0.02)
    scraped.end("one")
    for name, total in (
        ("time_to_first_token_seconds_sum", 0.03),
        ("inter_token_latency_seconds_count", 2),
        ("e2e_request_latency_seconds_sum", 0.4),
        ("prompt_tokens_total", 7),
        ("generation_tokens_total", 3),
    ):
        assert scraped.value(f"vllm:{name}", **MODEL) == scraped.value(f"weft_{name}", adapter="one") == total
    assert scraped.value("weft_request_queue_seconds_sum", adapter="one") == 0.002
    assert scraped.value("weft_request_prompt_tokens_sum") == 7
    assert scraped.value("weft_request_generation_tokens_sum") == 3


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("stop_token", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("context_length", "length"),
        ("time_limit", "length"),
        ("cancelled", "abort"),
        ("deadline", "abort"),
        ("error", "error"),
    ],
)
def test_outcomes_are_translated_to_vllms_reasons(scraped: Scraped, outcome: str, reason: str) -> None:
    scraped.end(outcome=outcome)
    assert scraped.value("weft_requests_total", adapter=BASE, outcome=outcome) == 1
    assert scraped.value("vllm:request_success_total", finished_reason=reason, **MODEL) == 1


def test_preemptions_and_loads_are_counted(scraped: Scraped) -> None:
    scraped.metrics.preempted()
    scraped.metrics.adapter_loaded(0.2, "ok")
    scraped.metrics.adapter_loaded(0.1, "failed")
    assert scraped.value("weft_preemptions_total") == 1
    assert scraped.value("weft_adapter_load_seconds_sum", outcome="ok") == 0.2
    assert scraped.value("weft_adapter_load_seconds_count", outcome="failed") == 1


def test_adapters_are_published_as_they_are_at_the_scrape(scraped: Scraped) -> None:
    assert scraped.value("weft_adapter_pages") is None
    states = {"device": 2}
    scraped.metrics.watch_adapters(lambda: AdapterSnapshot(dict(states), pages_used=len(states), pages_total=9))
    assert scraped.value("weft_adapters", state="device") == 2
    states["failed"] = 1
    assert scraped.value("weft_adapters", state="failed") == 1
    assert scraped.value("weft_adapter_pages_used") == 2
    assert scraped.value("weft_adapter_pages") == 9


def test_every_state_is_there_also_where_no_adapter_is_in_it(scraped: Scraped) -> None:
    scraped.metrics.watch_adapters(lambda: AdapterSnapshot({"host": 3}, pages_used=0, pages_total=9))
    counts = {sample.labels["state"]: sample.value for sample in scraped.family("weft_adapters").samples}
    assert counts == {"loading": 0, "disk": 0, "host": 3, "device": 0, "failed": 0}


def test_what_the_kv_cache_holds_is_known_in_tokens(scraped: Scraped) -> None:
    scraped.metrics.set_cache_config(block_size=16, num_blocks=20)
    assert scraped.metrics.kv_tokens == (320, 320)
    scraped.metrics.step(STEP)
    assert scraped.metrics.kv_tokens == (320, 240)
    for _ in range(STEP.num_running + STEP.num_waiting):
        scraped.end()
    assert scraped.metrics.kv_tokens == (320, 320)


def everything(scraped: Scraped) -> bytes:
    """A scrape in which each metric has a series."""
    metrics = scraped.metrics
    metrics.set_build_info("1", "tiny", "float32", "cpu")
    metrics.set_cache_config(block_size=16, num_blocks=20)
    metrics.set_limits(64, 1024)
    metrics.step(STEP)
    metrics.first_token("one", 0.1, 0.2)
    metrics.inter_token("one", 0.01)
    metrics.preempted()
    scraped.end("one")
    metrics.refused("not_found")
    metrics.quota_refused("max_in_flight")
    metrics.reloaded("access", "ok")
    metrics.certificate_expires(1.0)
    metrics.adapter_loaded(0.1, "ok")
    metrics.adapter_moved("disk", 0.1, "ok")
    metrics.adapter_evicted("host")
    metrics.watch_adapters(lambda: AdapterSnapshot({"device": 2}, pages_used=2, pages_total=9))
    return generate_latest(scraped.registry)


def test_a_scrape_is_read_by_the_clients_own_parser(scraped: Scraped) -> None:
    families = list(text_string_to_metric_families(everything(scraped).decode()))
    assert all(family.samples and family.documentation for family in families if not family.name.endswith("_created"))
    series = [(sample.name, tuple(sample.labels.items())) for family in families for sample in family.samples]
    assert len(series) == len(set(series))
    assert {"weft_adapters", "weft_adapter_load_seconds", "weft_adapter_move_seconds", "weft_adapter_evictions"} <= {
        family.name for family in families
    }


@needs_promtool
def test_promtool_finds_nothing_but_vllms_own_names(scraped: Scraped) -> None:
    ran = promtool("check", "metrics", text=everything(scraped))
    complaints = (ran.stdout + ran.stderr).decode().splitlines()
    assert [line for line in complaints if not line.startswith("vllm:")] == []


def test_the_first_adapters_get_a_label_and_the_rest_share_one() -> None:
    scraped = Scraped(max_adapters=2)
    for adapter in ("", "one", "two", "three", "four"):
        scraped.end(adapter)
    assert scraped.adapters("weft_requests") == {BASE, "one", "two", OTHER}
    assert scraped.value("weft_requests_total", adapter=OTHER, outcome="max_tokens") == 2


def test_a_clearly_busier_adapter_takes_the_label_of_the_least_busy() -> None:
    scraped = Scraped(max_adapters=2)
    for _ in range(40):
        scraped.end("busy")
    scraped.end("quiet")
    for _ in range(30):
        scraped.metrics.first_token("newcomer", 0.0, 0.1)
        scraped.metrics.inter_token("newcomer", 0.1)
        scraped.end("newcomer")
    for name in ("requests", "prompt_tokens", "generation_tokens", "time_to_first_token_seconds"):
        assert "quiet" not in scraped.adapters(f"weft_{name}")
        assert "newcomer" in scraped.adapters(f"weft_{name}")
    assert "busy" in scraped.adapters("weft_requests")
    total = sum(
        sample.value for sample in scraped.family("vllm:request_success").samples if sample.name.endswith("_total")
    )
    assert total == 71


def test_labels_stay_bounded_whatever_comes() -> None:
    scraped = Scraped(max_adapters=4)
    draw = random.Random(0)
    for _ in range(5000):
        adapter = f"adapter-{int(draw.paretovariate(0.5))}"
        scraped.metrics.first_token(adapter, 0.0, 0.1)
        scraped.end(adapter, draw.choice(("max_tokens", "error")))
    assert len(scraped.adapters("weft_requests")) <= 4 + 1
    assert {"adapter-1", "adapter-2"} <= scraped.adapters("weft_requests")


def test_no_adapter_can_pass_for_the_base_or_for_the_rest(scraped: Scraped) -> None:
    scraped.end("")
    scraped.end(BASE)
    scraped.end(OTHER)
    assert scraped.value("weft_requests_total", adapter=BASE, outcome="max_tokens") == 1
    assert scraped.value("weft_requests_total", adapter=OTHER, outcome="max_tokens") == 2


def test_no_adapter_labels_at_all_if_none_are_wanted() -> None:
    scraped = Scraped(max_adapters=0)
    for _ in range(50):
        scraped.end("one")
    assert scraped.adapters("weft_requests") == {OTHER}


def test_moves_and_evictions_are_counted_by_tier() -> None:
    scraped = Scraped()
    scraped.metrics.adapter_moved("disk", 0.5, "ok")
    scraped.metrics.adapter_moved("disk", 0.1, "failed")
    scraped.metrics.adapter_moved("host", 0.25, "ok")
    scraped.metrics.adapter_evicted("device")
    assert scraped.value("weft_adapter_move_seconds_sum", tier="disk", outcome="ok") == 0.5
    assert scraped.value("weft_adapter_move_seconds_count", tier="disk", outcome="failed") == 1
    assert scraped.value("weft_adapter_move_seconds_sum", tier="host", outcome="ok") == 0.25
    assert scraped.value("weft_adapter_evictions_total", tier="device") == 1


def test_what_waits_is_published_though_nothing_is_computed() -> None:
    scraped = Scraped()
    scraped.metrics.stands(replace(STEP, num_running=0, num_requests=0))
    assert scraped.value("weft_requests_waiting") == 3
    assert scraped.value("weft_step_seconds_count") == 0


def test_what_is_alerted_on_is_there_at_zero_before_it_happens(scraped: Scraped) -> None:
    for code in ("internal", "resource_exhausted", "unauthenticated", "permission_denied"):
        assert scraped.value("weft_refused_requests_total", code=code) == 0
    assert scraped.value("weft_adapter_load_seconds_count", outcome="failed") == 0
    for what in ("access", "certificate", "jwks"):
        assert scraped.value("weft_reloads_total", what=what, outcome="failed") == 0
    assert scraped.value("weft_adapter_move_seconds_count", tier="disk", outcome="failed") == 0
    assert scraped.value("weft_adapter_evictions_total", tier="device") == 0


def test_what_health_says_and_a_lost_engine_are_published(scraped: Scraped) -> None:
    assert scraped.value("weft_ready") == scraped.value("weft_engine_lost") == 0
    scraped.metrics.set_ready(is_ready=True)
    assert scraped.value("weft_ready") == 1
    scraped.metrics.engine_lost()
    scraped.metrics.set_ready(is_ready=False)
    assert (scraped.value("weft_ready"), scraped.value("weft_engine_lost")) == (0, 1)


def test_what_may_run_and_wait_is_published_beside_what_does(scraped: Scraped) -> None:
    scraped.metrics.set_limits(max_running=64, max_queued=1024)
    assert scraped.value("weft_requests_running_limit") == 64
    assert scraped.value("weft_requests_waiting_limit") == 1024
