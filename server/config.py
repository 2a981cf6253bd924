"""Everything that can be set, in one frozen tree, checked once."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from weft.errors import InvalidConfig

LORA_BACKENDS = ("auto", "reference", "torch", "cpu", "triton")
"""As `weft.kernels.lora` has them, which brings torch: a wrong name should not wait for that."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which base model, and how it is held.

    path: a local Hugging Face folder, or a hub id. dtype: auto (float32 on a CPU, the checkpoint's own on a GPU),
    float32, bfloat16 or float16. device: auto, cpu, cuda, cuda:N.
    """

    path: str
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        _one_of("--dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise InvalidConfig(f"--device is {self.device!r}; must be auto, cpu, cuda or cuda:N")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Budgets of the engine; tokens and requests are counts, None means measured or taken from the model.

    threads: how many a step computes with on a CPU; None measures how many pay. memory_share: of what is left in the
    end, for the KV cache. adapter_host_bytes: what copies of adapters may take in host memory. adapter_dtype: of
    adapters' rank rows; auto is the base's dtype, int8 takes a quarter of float32's memory and half of bfloat16's, and
    rounds them. lora_backend: auto goes by what `weft bench kernels` measured. prefix_cache: keep what was computed for
    prompts that begin alike.
    speculative_tokens: how many tokens a step guesses ahead for a request at most; 0 for none. cuda_graphs: capture
    decode steps where the device can, and replay them. run_ahead: launch a step before the tokens of the one before are
    on the host; None: on a GPU. compile: run what is between the products compiled by PyTorch.
    max_queued_tokens, max_queued_per_adapter, max_queue_ms: 0 is no limit. target_step_ms: of steps that compute
    prompts beside decodes, 0 is no target. adapter_weights: shares of adapters by name, 1 for those that are not named.
    """

    max_batch_tokens: int = 512
    max_running_requests: int = 64
    max_queued_requests: int = 4096
    max_queued_tokens: int = 0
    max_queued_per_adapter: int = 0
    max_queue_ms: int = 0
    target_step_ms: int = 100
    adapter_weights: tuple[tuple[str, float], ...] = ()
    context_length: int | None = None
    kv_tokens: int | None = None
    block_tokens: int = 16
    prefix_cache: bool = True
    memory_share: float | None = None
    adapter_pages: int | None = None
    adapter_host_bytes: int | None = None
    adapter_dtype: str = "auto"
    lora_backend: str = "auto"
    adapter_probe: bool = True
    allow_no_effect: bool = False
    speculative_tokens: int = 4
    threads: int | None = None
    cuda_graphs: bool = True
    run_ahead: bool | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        _between("--max-batch-tokens", self.max_batch_tokens, 1, 1 << 20)
        _between("--max-running-requests", self.max_running_requests, 1, 1 << 16)
        _between("--max-queued-requests", self.max_queued_requests, 0, 1 << 20)
        _between("--max-queued-tokens", self.max_queued_tokens, 0, 1 << 40)
        _between("--max-queued-per-adapter", self.max_queued_per_adapter, 0, 1 << 20)
        _between("--max-queue-ms", self.max_queue_ms, 0, 3600_000)
        _between("--target-step-ms", self.target_step_ms, 0, 3600_000)
        self._check_weights()
        _between("--context-length", self.context_length, 2, 1 << 24)
        _between("--kv-tokens", self.kv_tokens, 2, 1 << 40)
        _between("--block-tokens", self.block_tokens, 1, 1024)
        _between("--memory-share", self.memory_share, 0.01, 1)
        _between("--adapter-pages", self.adapter_pages, 0, 1 << 20)
        _between("--adapter-host-bytes", self.adapter_host_bytes, 0, 1 << 50)
        _one_of("--adapter-dtype", self.adapter_dtype, ("auto", "int8"))
        _one_of("--lora-backend", self.lora_backend, LORA_BACKENDS)
        _between("--speculative-tokens", self.speculative_tokens, 0, 64)
        _between("--threads", self.threads, 1, 1024)
        if self.max_batch_tokens < self.max_running_requests:
            raise InvalidConfig(
                f"--max-batch-tokens is {self.max_batch_tokens}, less than --max-running-requests "
                f"({self.max_running_requests}): every running request needs a token a step"
            )

    def _check_weights(self) -> None:
        named = Counter(name for name, _ in self.adapter_weights)
        for name, weight in self.adapter_weights:
            if named[name] > 1:
                raise InvalidConfig(f"--adapter-weight {name} is given {named[name]} times; give it once")
            _between(f"--adapter-weight {name}", weight, 0.01, 100)

    @property
    def max_requests(self) -> int:
        """To one adapter that can be queued and running at once: as many as one request can ask answers for."""
        queued = min(self.max_queued_requests, self.max_queued_per_adapter or self.max_queued_requests)
        return self.max_running_requests + queued


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where the server listens, what it loads at start and later, and how long it waits. Port 0 takes any free port.

    source_roots: folders, and prefixes such as hf:org/ or https://host/folder/, that adapters may come from.
    tls_cert, tls_key: PEM files, without which there is no TLS; tls_client_ca: who signs the certificates that every
    client must show then. access: the file that says who may call. allow_anonymous: anybody may, from anywhere.
    cache: where downloads go, in place of the user's cache. state: the file that keeps what was created over the API.
    watch: whether the adapters folder is looked at after the start. metrics_host: None is host. health_port: for
    probes, plain; None has none. otlp_endpoint: where traces go; None leaves that to OpenTelemetry's own variables.
    stall_s: how long a client may take nothing of an answer while there is some; 0 is as long as it likes.
    """

    model: ModelConfig
    engine: EngineConfig = field(default_factory=EngineConfig)
    host: str = "127.0.0.1"
    port: int = 50051
    metrics_host: str | None = None
    metrics_port: int = 9090
    health_port: int | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    access: Path | None = None
    allow_anonymous: bool = False
    otlp_endpoint: str | None = None
    adapters: Path | None = None
    source_roots: tuple[Path | str, ...] = ()
    cache: Path | None = None
    max_adapter_bytes: int = 4 << 30
    state: Path | None = None
    watch: bool = True
    max_request_s: float = 600.0
    drain_grace_s: float = 30.0
    stall_s: float = 30.0
    max_prompt_bytes: int = 1 << 20
    metrics_adapters: int = 32

    def __post_init__(self) -> None:
        _between("--port", self.port, 0, 65535)
        _between("--metrics-port", self.metrics_port, 0, 65535)
        _between("--health-port", self.health_port, 0, 65535)
        _between("--max-request-seconds", self.max_request_s, 0.001, 86400 * 7)
        _between("--drain-grace-seconds", self.drain_grace_s, 0, 86400)
        _between("--stall-seconds", self.stall_s, 0, 86400)
        _between("--max-prompt-bytes", self.max_prompt_bytes, 1, 1 << 28)
        _between("--metrics-adapters", self.metrics_adapters, 0, 10000)
        _between("--max-adapter-bytes", self.max_adapter_bytes, 1, 1 << 50)
        self._check_access()
        for option, folder in (
            ("--adapters", self.adapters),
            *(("--source-root", root) for root in self._source_folders),
        ):
            if folder is not None and not folder.is_dir():
                raise InvalidConfig(f"{option} is {str(folder)!r}; must be an existing folder")

    def _check_access(self) -> None:
        for given, missing in (("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_client_ca", "tls_cert")):
            if getattr(self, given) is not None and getattr(self, missing) is None:
                raise InvalidConfig(f"{_option(given)} is given without {_option(missing)}: TLS needs both")
        closed_by = next((name for name in ("access", "tls_client_ca") if getattr(self, name) is not None), None)
        if closed_by is not None and self.allow_anonymous:
            raise InvalidConfig(f"--allow-anonymous and {_option(closed_by)} contradict each other: choose one")
        if closed_by is None and not self.allow_anonymous and not is_loopback(self.host):
            raise InvalidConfig(
                f"--host is {self.host!r}, which other machines can reach, and nothing says who may call: give "
                "--access FILE or --tls-client-ca FILE, or --allow-anonymous to let anybody"
            )

    @property
    def all_source_roots(self) -> tuple[Path, ...]:
        """Folders that `file:` sources may lie under."""
        return (*([self.adapters] if self.adapters else []), *self._source_folders)

    @property
    def source_prefixes(self) -> tuple[str, ...]:
        """What remote sources may begin with."""
        return tuple(str(root) for root in self.source_roots if is_prefix(root))

    @property
    def _source_folders(self) -> tuple[Path, ...]:
        return tuple(Path(root) for root in self.source_roots if not is_prefix(root))


def is_prefix(root: Path | str) -> bool:
    """Whether it begins as a URL does; a folder of such a name can be written ./hf:name."""
    return isinstance(root, str) and re.match(r"[A-Za-z][A-Za-z0-9+-]*:", root) is not None


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _between(option: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise InvalidConfig(f"{option} is {value}; must be from {low} to {high}")


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidConfig(f"{option} is {value!r}; must be one of {', '.join(allowed)}")
