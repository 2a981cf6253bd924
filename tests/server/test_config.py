"""The configuration: what is refused, and that the refusal names the option, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from weft.errors import InvalidConfig
from weft.kernels.lora import BACKENDS
from weft.server.config import LORA_BACKENDS, EngineConfig, ModelConfig, ServerConfig

MODEL = ModelConfig("model")

RANGES = [
    (EngineConfig, "max_batch_tokens", "--max-batch-tokens", 1, 1 << 20),
    (EngineConfig, "max_running_requests", "--max-running-requests", 1, 1 << 16),
    (EngineConfig, "max_queued_requests", "--max-queued-requests", 0, 1 << 20),
    (EngineConfig, "max_queued_tokens", "--max-queued-tokens", 0, 1 << 40),
    (EngineConfig, "max_queued_per_adapter", "--max-queued-per-adapter", 0, 1 << 20),
    (EngineConfig, "max_queue_ms", "--max-queue-ms", 0, 3_600_000),
    (EngineConfig, "target_step_ms", "--target-step-ms", 0, 3_600_000),
    (EngineConfig, "context_length", "--context-length", 2, 1 << 24),
    (EngineConfig, "kv_tokens", "--kv-tokens", 2, 1 << 40),
    (EngineConfig, "block_tokens", "--block-tokens", 1, 1024),
    (EngineConfig, "memory_share", "--memory-share", 0.01, 1),
    (EngineConfig, "adapter_pages", "--adapter-pages", 0, 1 << 20),
    (EngineConfig, "adapter_host_bytes", "--adapter-host-bytes", 0, 1 << 50),
    (EngineConfig, "speculative_tokens", "--speculative-tokens", 0, 64),
    (EngineConfig, "threads", "--threads", 1, 1024),
    (ServerConfig, "port", "--port", 0, 65535),
    (ServerConfig, "metrics_port", "--metrics-port", 0, 65535),
    (ServerConfig, "health_port", "--health-port", 0, 65535),
    (ServerConfig, "max_request_s", "--max-request-seconds", 0.001, 604800),
    (ServerConfig, "drain_grace_s", "--drain-grace-seconds", 0, 86400),
    (ServerConfig, "stall_s", "--stall-seconds", 0, 86400),
    (ServerConfig, "max_prompt_bytes", "--max-prompt-bytes", 1, 1 << 28),
    (ServerConfig, "max_adapter_bytes", "--max-adapter-bytes", 1, 1 << 50),
    (ServerConfig, "metrics_adapters", "--metrics-adapters", 0, 10000),
]


def build(owner: type[EngineConfig | ServerConfig], **fields: Any) -> EngineConfig | ServerConfig:
    if owner is ServerConfig:
        return ServerConfig(MODEL, **fields)
    largest = {"max_batch_tokens": 1 << 20} if "max_running_requests" in fields else {}
    smallest = {"max_running_requests": 1} if "max_batch_tokens" in fields else {}
    return EngineConfig(**{**largest, **smallest, **fields})


@pytest.mark.parametrize(("owner", "field", "option", "low", "high"), RANGES, ids=[row[2] for row in RANGES])
def test_numbers_have_a_range_that_the_refusal_names(
    owner: type[EngineConfig | ServerConfig], field: str, option: str, low: float, high: float
) -> None:
    for value in (low, high):
        assert getattr(build(owner, **{field: value}), field) == value
    for value in (low - 1, high + 1):
        with pytest.raises(InvalidConfig, match=re.escape(f"{option} is {value}; must be from {low} to {high}")):
            build(owner, **{field: value})


@pytest.mark.parametrize("field", ["max_request_s", "drain_grace_s", "stall_s"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_seconds_are_finite(field: str, value: float) -> None:
    with pytest.raises(InvalidConfig, match=f"is {value}; must be from"):
        build(ServerConfig, **{field: value})


def test_every_number_has_a_range() -> None:
    tested = {(owner, field) for owner, field, *_ in RANGES}
    for owner in (EngineConfig, ServerConfig):
        types = {field.name: str(field.type) for field in dataclasses.fields(owner)}
        numbers = {name for name, kind in types.items() if re.search("int|float", kind) and "tuple" not in kind}
        assert numbers == {field for tested_owner, field in tested if tested_owner is owner}


@pytest.mark.parametrize("weight", [0.0, 0.009, 100.1, float("nan"), float("inf")])
def test_a_weight_has_a_range_that_the_refusal_names_with_the_adapter(weight: float) -> None:
    assert EngineConfig(adapter_weights=(("a", 0.01), ("b", 100))).adapter_weights == (("a", 0.01), ("b", 100))
    with pytest.raises(InvalidConfig, match=f"--adapter-weight gold is {weight}; must be from 0.01 to 100"):
        EngineConfig(adapter_weights=(("a", 1.0), ("gold", weight)))


def test_a_weight_that_is_given_twice_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="--adapter-weight a is given 2 times; give it once"):
        EngineConfig(adapter_weights=(("a", 1.0), ("b", 1.0), ("a", 2.0)))


@pytest.mark.parametrize(
    "field", ["context_length", "kv_tokens", "memory_share", "adapter_pages", "adapter_host_bytes", "threads"]
)
def test_numbers_without_a_value_are_left_to_the_model_and_the_machine(field: str) -> None:
    assert getattr(EngineConfig(**{field: None}), field) is None


def test_a_step_must_have_a_token_for_every_running_request() -> None:
    assert EngineConfig(max_batch_tokens=8, max_running_requests=8).max_batch_tokens == 8
    with pytest.raises(InvalidConfig, match=r"--max-batch-tokens is 7, less than --max-running-requests \(8\)"):
        EngineConfig(max_batch_tokens=7, max_running_requests=8)


def test_the_lora_backends_are_those_of_the_kernels() -> None:
    assert BACKENDS == LORA_BACKENDS
    for backend in BACKENDS:
        assert EngineConfig(lora_backend=backend).lora_backend == backend
    with pytest.raises(InvalidConfig, match="--lora-backend is 'zzz'; must be one of auto, reference, torch, cpu, t"):
        EngineConfig(lora_backend="zzz")


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtypes(dtype: str) -> None:
    assert ModelConfig("model", dtype=dtype).dtype == dtype


def test_another_dtype_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidConfig, match="--dtype is 'float64'; must be one of auto, float32, bfloat16, float16"):
        ModelConfig("model", dtype="float64")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices(device: str) -> None:
    assert ModelConfig("model", device=device).device == device


@pytest.mark.parametrize("device", ["", "gpu", "CPU", "mps", "cuda:", "cuda:x", "cpu:0"])
def test_another_device_is_refused_with_those_there_are(device: str) -> None:
    with pytest.raises(InvalidConfig, match=f"--device is '{device}'; must be auto, cpu, cuda or cuda:N"):
        ModelConfig("model", device=device)


def test_folders_must_exist(tmp_path: Path) -> None:
    file, nowhere = tmp_path / "file", tmp_path / "nowhere"
    file.touch()
    for folder in (file, nowhere):
        refusal = re.escape(f"{str(folder)!r}; must be an existing folder")
        with pytest.raises(InvalidConfig, match=f"--adapters is {refusal}"):
            ServerConfig(MODEL, adapters=folder)
        with pytest.raises(InvalidConfig, match=f"--source-root is {refusal}"):
            ServerConfig(MODEL, source_roots=(tmp_path, folder))


def test_sources_may_lie_under_the_adapters_and_every_source_root(tmp_path: Path) -> None:
    adapters, more = tmp_path / "adapters", tmp_path / "more"
    adapters.mkdir()
    more.mkdir()
    assert ServerConfig(MODEL).all_source_roots == ()
    assert ServerConfig(MODEL, source_roots=(more,)).all_source_roots == (more,)
    assert ServerConfig(MODEL, adapters=adapters, source_roots=(more,)).all_source_roots == (adapters, more)


def test_a_source_root_may_be_a_prefix_of_remote_sources(tmp_path: Path) -> None:
    config = ServerConfig(MODEL, source_roots=("hf:org/", str(tmp_path), "https://host/folder/"))
    assert config.source_prefixes == ("hf:org/", "https://host/folder/")
    assert config.all_source_roots == (tmp_path,)


def test_nothing_changes_it() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ServerConfig(MODEL).port = 1  # type: ignore[misc]


def test_one_request_can_ask_for_as_many_answers_as_may_wait_and_run() -> None:
    assert EngineConfig(max_running_requests=4, max_queued_requests=8).max_requests == 12
    assert EngineConfig(max_running_requests=4, max_queued_requests=8, max_queued_per_adapter=2).max_requests == 6
    assert EngineConfig(max_running_requests=4, max_queued_requests=8, max_queued_per_adapter=9).max_requests == 12


class TestAccess:
    CERT, KEY, CA, ACCESS = Path("cert"), Path("key"), Path("ca"), Path("access")

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
    def test_on_loopback_nobody_has_to_say_who_they_are(self, host: str) -> None:
        assert ServerConfig(MODEL, host=host).access is None

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "weft.example", ""])  # noqa: S104 - refused
    def test_another_address_needs_to_know_or_to_be_told_not_to(self, host: str) -> None:
        words = f"--host is {host!r}, which other machines can reach, .*--access FILE .*or --allow-anonymous"
        with pytest.raises(InvalidConfig, match=words):
            ServerConfig(MODEL, host=host)
        with pytest.raises(InvalidConfig, match=words):
            ServerConfig(MODEL, host=host, tls_cert=self.CERT, tls_key=self.KEY)
        ServerConfig(MODEL, host=host, allow_anonymous=True)
        ServerConfig(MODEL, host=host, access=self.ACCESS)
        ServerConfig(MODEL, host=host, tls_cert=self.CERT, tls_key=self.KEY, tls_client_ca=self.CA)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"tls_cert": CERT}, "--tls-cert is given without --tls-key: TLS needs both"),
            ({"tls_key": KEY}, "--tls-key is given without --tls-cert: TLS needs both"),
            ({"tls_client_ca": CA}, "--tls-client-ca is given without --tls-cert: TLS needs both"),
            ({"access": ACCESS, "allow_anonymous": True}, "--allow-anonymous and --access contradict each other"),
            (
                {"tls_cert": CERT, "tls_key": KEY, "tls_client_ca": CA, "allow_anonymous": True},
                "--allow-anonymous and --tls-client-ca contradict each other: choose one",
            ),
        ],
    )
    def test_options_that_contradict_each_other_are_named(self, fields: dict[str, Any], words: str) -> None:
        with pytest.raises(InvalidConfig, match=re.escape(words)):
            ServerConfig(MODEL, **fields)
