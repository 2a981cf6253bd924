"""The alert rules and the dashboard: whole, explained, and about metrics that a running server has."""

from __future__ import annotations

import json
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from promtool import needs_promtool, promtool
from serving import served
from tiny import make_adapter, make_model, save_tokenizer

from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.server.metrics import Metrics
from weft.v1 import inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).parents[2]
RULES = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
RULE_TESTS = yaml.safe_load((ROOT / "deploy/prometheus/rules_test.yaml").read_text())["tests"]
DASHBOARD = json.loads((ROOT / "deploy/grafana/weft.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]

METRIC = re.compile(r"\b(?:weft_|vllm:|process_|job:weft_|instance:weft_)[\w:]+")
NUM_COLUMNS = 24


def metrics_of(expression: str) -> set[str]:
    """The metrics that an expression reads; labels and their values are not among them."""
    return set(METRIC.findall(re.sub(r'"[^"]*"', "", expression)))


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a server tells after its first request."""
    root = tmp_path_factory.mktemp("monitoring")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    make_adapter(model, root / "adapters" / "one", target_modules=["q_proj"])
    config = ServerConfig(
        model=ModelConfig(str(root / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(max_batch_tokens=64, max_running_requests=8, kv_tokens=4096, adapter_pages=16),
        port=0,
        metrics_port=0,
        adapters=root / "adapters",
    )
    with served(config) as server, grpc.insecure_channel(server.address) as channel:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        stopping = {"max_tokens": 2, "ignore_eos": True}
        stub.Generate(inference_pb2.GenerateRequest(text="hello", adapter_id="one", stopping=stopping))
        with urllib.request.urlopen(f"http://{server.metrics_address}/metrics") as response:
            text: str = response.read().decode()
    return text


@pytest.fixture(scope="module")
def exported(scrape: str) -> set[str]:
    """The names of its samples, and of those that it has with TLS alone."""
    names = {sample.name for family in text_string_to_metric_families(scrape) for sample in family.samples}
    registry = CollectorRegistry()
    Metrics(registry).certificate_expires(0.0)
    return names | {family.name for family in registry.collect() if "certificate" in family.name}


@needs_promtool
def test_promtool_finds_nothing_in_a_servers_metrics_but_vllms_own_names(scrape: str) -> None:
    ran = promtool("check", "metrics", text=scrape.encode())
    complaints = (ran.stdout + ran.stderr).decode().splitlines()
    assert [line for line in complaints if not line.startswith("vllm:")] == []


@needs_promtool
def test_every_query_of_the_dashboard_is_one(tmp_path: Path) -> None:
    queries = [target["expr"].replace("$__rate_interval", "5m") for target in TARGETS]
    rules = [{"record": f"query:{index}", "expr": query} for index, query in enumerate(queries)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    ran = promtool("check", "rules", str(file))
    assert ran.returncode == 0, ran.stderr.decode()


def test_rules_read_what_a_server_exports_or_another_rule_records(exported: set[str]) -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    read = {name for rule in RULES for name in metrics_of(rule["expr"])}
    assert read - recorded - exported == set()
    assert len(read) > 20


def test_the_dashboard_reads_what_a_server_exports(exported: set[str]) -> None:
    expressions = [target["expr"] for target in TARGETS]
    expressions += [
        variable["definition"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query"
    ]
    expressions += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    read = {name for expression in expressions for name in metrics_of(expression)}
    assert read - exported == set()
    assert len(read) > 30


def test_each_alert_is_graded_summed_up_and_explained_in_the_run_book() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    for alert in ALERTS:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert alert["annotations"]["summary"]
        assert f"`{alert['alert']}`" in page, f"docs/operations.md does not say what to do at {alert['alert']}"


def test_each_alert_is_tried_and_stays_quiet_on_a_quiet_day() -> None:
    quiet, *others = RULE_TESTS
    named = {alert["alert"] for alert in ALERTS}
    assert {tried["alertname"] for tried in quiet["alert_rule_test"]} == named
    assert not any(tried.get("exp_alerts") for tried in quiet["alert_rule_test"])
    fired = {tried["alertname"] for test in others for tried in test["alert_rule_test"] if tried.get("exp_alerts")}
    assert fired == named


def test_the_dashboard_has_what_grafana_needs_to_take_it() -> None:
    assert DASHBOARD["uid"] == "weft"
    assert DASHBOARD["title"]
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD.get("id") is None, "an id belongs to one Grafana"
    first, *others = DASHBOARD["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == ("datasource", "datasource", "prometheus")
    assert {variable["name"] for variable in others} == {"job", "instance"}


def test_every_panel_has_its_own_id_words_and_the_chosen_data_source() -> None:
    ids = Counter(panel["id"] for panel in DASHBOARD["panels"])
    assert max(ids.values()) == 1
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references)) > 0
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}


def cells(panel: dict[str, Any]) -> Iterator[tuple[int, int]]:
    at = panel["gridPos"]
    assert 0 <= at["x"] < at["x"] + at["w"] <= NUM_COLUMNS
    return ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"]))


def test_no_panel_lies_over_another() -> None:
    covered = Counter(cell for panel in DASHBOARD["panels"] for cell in cells(panel))
    assert max(covered.values()) == 1


def test_every_query_keeps_to_the_chosen_servers() -> None:
    for target in TARGETS:
        selected = re.findall(
            r"\b(?:weft_|process_)\w+(\{[^}]*\})?", target["expr"].replace("and on (job, instance) weft_ready", "")
        )
        assert selected
        assert all('job=~"$job", instance=~"$instance"' in labels for labels in selected), target["expr"]
