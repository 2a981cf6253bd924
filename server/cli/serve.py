"""`weft serve`: options, environment and file -> configuration -> server."""

from __future__ import annotations

import asyncio
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from weft.adapters.names import check_name
from weft.errors import InvalidRequest
from weft.server.config import EngineConfig, ModelConfig, ServerConfig, is_prefix
from weft.server.logs import FORMATS, configure
from weft.server.tracing import check_endpoint

_PATH = click.Path(path_type=Path)


class _Root(click.ParamType[Path | str]):
    """A folder or a prefix of sources. In an environment variable, spaces part several: prefixes hold colons."""

    name = "folder or prefix"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        return value if is_prefix(value) else Path(value)


class _Weight(click.ParamType[tuple[str, float]]):
    """NAME=WEIGHT. In an environment variable, spaces part several; in the file, they are a list."""

    name = "name=weight"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        adapter, _, weight = value.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not adapter or "=" in adapter or math.isnan(number):
            self.fail(
                f"{value!r} is not NAME=WEIGHT, as in my-adapter=2; several are options of their own, parted by spaces "
                "in the environment, a list in the file",
                param,
                ctx,
            )
        try:
            check_name(adapter)
        except InvalidRequest as error:
            self.fail(f"{value!r} names an adapter that {error.problems[0].description}", param, ctx)
        return adapter, number


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of the configuration as an option, an environment variable and a key of the file."""

    option: str
    owner: type
    field: str
    type: Any
    help: str
    multiple: bool = False

    @property
    def name(self) -> str:
        return self.option.replace("-", "_")

    @property
    def default(self) -> str:
        """How the help shows the default; empty where there is none to show."""
        (field,) = (field for field in fields(self.owner) if field.name == self.field)
        return "" if field.default in (MISSING, None, ()) else str(field.default)

    def to_option(self) -> Callable[[Any], Any]:
        return click.option(
            f"--{self.option}/--no-{self.option}" if self.type is bool else f"--{self.option}",
            self.name,
            type=self.type,
            multiple=self.multiple,
            default=None,
            envvar=f"WEFT_{self.name.upper()}",
            show_envvar=True,
            help=self.help + (f"  [default: {self.default}]" if self.default else ""),
        )


@dataclass(frozen=True)
class LogConfig:
    """What of the log is shown, and how."""

    level: str = "info"
    format: str = "text"


LOG_LEVEL = Setting(
    "log-level", LogConfig, "level", click.Choice(["debug", "info", "warning", "error"]), "How much to log on stderr."
)
LOG_FORMAT = Setting(
    "log-format", LogConfig, "format", click.Choice(FORMATS), "Lines for people, or JSON objects for machines."
)
LOG_SETTINGS = (LOG_LEVEL, LOG_FORMAT)
SETTINGS = (
    Setting("model", ModelConfig, "path", str, "The base: a folder in Hugging Face's format, or a hub id."),
    Setting("dtype", ModelConfig, "dtype", str, "auto, float32, bfloat16 or float16."),
    Setting("device", ModelConfig, "device", str, "auto, cpu, cuda or cuda:N."),
    Setting("adapters", ServerConfig, "adapters", _PATH, "A folder of PEFT folders, each loaded at the start."),
    Setting(
        "source-root",
        ServerConfig,
        "source_roots",
        _Root(),
        "What adapters may be loaded from later: a folder, or a prefix such as hf:org/, https://host/folder/, s3://bucket/.",
        True,
    ),
    Setting("watch", ServerConfig, "watch", bool, "Load, update and unload as the folders of --adapters change."),
    Setting("cache", ServerConfig, "cache", _PATH, "A folder for downloads; else weft in the user's cache."),
    Setting("max-adapter-bytes", ServerConfig, "max_adapter_bytes", int, "The largest adapter_model.safetensors."),
    Setting("state", ServerConfig, "state", _PATH, "A file that keeps over a restart what was created over the API."),
    Setting("host", ServerConfig, "host", str, "The address to listen on."),
    Setting("port", ServerConfig, "port", int, "For gRPC; 0 takes any free one."),
    Setting("metrics-host", ServerConfig, "metrics_host", str, "The address for Prometheus; else that of --host."),
    Setting("metrics-port", ServerConfig, "metrics_port", int, "For Prometheus; 0 takes any free one."),
    Setting("health-port", ServerConfig, "health_port", int, "For probes: health alone, without TLS; else none."),
    Setting(
        "otlp-endpoint", ServerConfig, "otlp_endpoint", str, "Send traces to it by OTLP over gRPC: http://HOST:PORT."
    ),
    Setting(
        "tls-cert", ServerConfig, "tls_cert", _PATH, "The server's certificate and its chain in PEM: turns TLS on."
    ),
    Setting("tls-key", ServerConfig, "tls_key", _PATH, "Its private key in PEM. Both are read again when they change."),
    Setting(
        *("tls-client-ca", ServerConfig, "tls_client_ca", _PATH),
        "Who signs the certificates that every client must show then: mutual TLS.",
    ),
    Setting("access", ServerConfig, "access", _PATH, "A TOML file that says who may call and what they may do."),
    Setting(
        *("allow-anonymous", ServerConfig, "allow_anonymous", bool),
        "Let anybody call who can reach another address than loopback.",
    ),
    Setting("max-batch-tokens", EngineConfig, "max_batch_tokens", int, "The most tokens that a step computes."),
    Setting("max-running-requests", EngineConfig, "max_running_requests", int, "The most requests in a step."),
    Setting("max-queued-requests", EngineConfig, "max_queued_requests", int, "The most requests that wait."),
    Setting("max-queued-tokens", EngineConfig, "max_queued_tokens", int, "The most prompt tokens that wait; 0: any."),
    Setting(
        "max-queued-per-adapter", EngineConfig, "max_queued_per_adapter", int, "The most that wait for one; 0: any."
    ),
    Setting("max-queue-ms", EngineConfig, "max_queue_ms", int, "The longest that a request may have to wait; 0: any."),
    Setting("target-step-ms", EngineConfig, "target_step_ms", int, "A step with decodes should take; 0: any time."),
    Setting(
        "adapter-weight",
        EngineConfig,
        "adapter_weights",
        _Weight(),
        "An adapter's share of a busy server, as NAME=WEIGHT; others weigh 1.",
        True,
    ),
    Setting("context-length", EngineConfig, "context_length", int, "Prompt and answer in tokens; else the model's."),
    Setting("kv-tokens", EngineConfig, "kv_tokens", int, "Tokens that the KV cache holds; else what memory allows."),
    Setting("memory-share", EngineConfig, "memory_share", float, "Of what is left in the end, for the KV cache."),
    Setting("block-tokens", EngineConfig, "block_tokens", int, "Tokens in a KV block."),
    Setting("prefix-cache", EngineConfig, "prefix_cache", bool, "Compute what prompts begin with alike only once."),
    Setting("adapter-pages", EngineConfig, "adapter_pages", int, "Pages of rank rows for adapters on the device."),
    Setting("adapter-host-bytes", EngineConfig, "adapter_host_bytes", int, "For copies of adapters in host memory."),
    Setting("adapter-dtype", EngineConfig, "adapter_dtype", str, "Of adapters' rank rows: auto, the base's, or int8."),
    Setting(
        "lora-backend",
        EngineConfig,
        "lora_backend",
        str,
        "What computes the adapters' part: auto, reference, torch, cpu or triton.",
    ),
    Setting("adapter-probe", EngineConfig, "adapter_probe", bool, "Compare each adapter with a plain reference."),
    Setting("allow-no-effect", EngineConfig, "allow_no_effect", bool, "Take adapters that change nothing."),
    Setting(
        "speculative-tokens", EngineConfig, "speculative_tokens", int, "The most tokens a step guesses for a request."
    ),
    Setting(
        "threads",
        EngineConfig,
        "threads",
        int,
        "That a step computes with on a CPU; else as many as pay (measured).",
    ),
    Setting("cuda-graphs", EngineConfig, "cuda_graphs", bool, "Capture decode steps on a GPU once, and replay them."),
    Setting(
        "run-ahead",
        EngineConfig,
        "run_ahead",
        bool,
        "Begin with a step before the tokens of the one before are read; else on a GPU only.",
    ),
    Setting("compile", EngineConfig, "compile", bool, "Compile norms, rotary embeddings and activations at the start."),
    Setting("max-request-seconds", ServerConfig, "max_request_s", float, "For a request without a deadline."),
    Setting("drain-grace-seconds", ServerConfig, "drain_grace_s", float, "For requests in flight at the end."),
    Setting("stall-seconds", ServerConfig, "stall_s", float, "For a client that takes nothing of its answer; 0: any."),
    Setting("max-prompt-bytes", ServerConfig, "max_prompt_bytes", int, "The longest text that is taken as a prompt."),
    Setting("metrics-adapters", ServerConfig, "metrics_adapters", int, "Adapters with a metrics label of their own."),
)


def build_config(values: Mapping[str, Any]) -> ServerConfig:
    """The configuration from option values by name; what is None or missing keeps its default.

    Raises InvalidConfig, and click.UsageError without a model.
    """

    def given(owner: type) -> dict[str, Any]:
        return {
            setting.field: values[setting.name]
            for setting in SETTINGS
            if setting.owner is owner and values.get(setting.name) not in (None, ())
        }

    model = given(ModelConfig)
    if "path" not in model:
        raise click.UsageError("--model is missing: give a folder or a hub id")
    return ServerConfig(ModelConfig(**model), EngineConfig(**given(EngineConfig)), **given(ServerConfig))


def read_file(path: Path) -> dict[str, Any]:
    """Option values from a TOML file; a key is an option's name. Raises click.UsageError."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise click.UsageError(f"--config {path} can't be read as TOML ({reason})") from None
    known = {setting.option: setting for setting in (*SETTINGS, *LOG_SETTINGS)}
    values = {}
    for key, value in raw.items():
        setting = known.get(key.replace("_", "-"))
        if setting is None:
            close = get_close_matches(key.replace("_", "-"), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "the keys are the options of `weft serve --help`"
            raise click.UsageError(f"--config {path}: {key!r} is no key; {hint}")
        values[setting.name] = _as_given(value, f"--config {path}: {key!r}", setting)
    return values


def _as_given(value: Any, subject: str, setting: Setting) -> str | list[str]:
    """As the command line would give it, so that both are read alike."""
    if setting.type is bool:
        if not isinstance(value, bool):
            raise click.UsageError(f"{subject} is {value!r}; must be true or false")
        return str(value).lower()
    items = value if setting.multiple and isinstance(value, list) else [value]
    is_number = setting.type in (int, float)
    kinds = (str, int, float) if is_number else (str,)
    if any(isinstance(item, bool) or not isinstance(item, kinds) for item in items):
        wanted = "a number" if is_number else "a text or a list of texts" if setting.multiple else "a text"
        raise click.UsageError(f"{subject} is {value!r}; must be {wanted}")
    return [str(item) for item in items] if setting.multiple else str(value)


def _use_file(context: click.Context, _option: click.Parameter, path: Path | None) -> None:
    if path is not None:
        context.default_map = read_file(path)


def _with_settings(function: Callable[..., Any]) -> Callable[..., Any]:
    for setting in reversed((*SETTINGS, *LOG_SETTINGS)):
        function = setting.to_option()(function)
    return function


@click.command()
@click.option(
    "--config",
    type=_PATH,
    is_eager=True,
    expose_value=False,
    callback=_use_file,
    envvar="WEFT_CONFIG",
    help="A TOML file whose keys are these options. The command line and the environment go before it.",
)
@_with_settings
def serve(log_level: str | None, log_format: str | None, **values: Any) -> None:
    """Serve a base model and its adapters until SIGTERM or Ctrl-C; then finish what is in flight."""
    config = build_config(values)
    check_endpoint(config.otlp_endpoint)
    configure(log_format or LogConfig.format, log_level or LogConfig.level)
    # Bring torch and transformers, which no other command should wait for.
    from weft.server import app  # noqa: PLC0415
    from weft.server.cli.quiet import quiet_transformers, share_log  # noqa: PLC0415
    from weft.server.transport import raise_file_limit  # noqa: PLC0415

    raise_file_limit()
    quiet_transformers()
    share_log()
    asyncio.run(app.serve(config))
