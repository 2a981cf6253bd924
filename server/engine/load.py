"""From configuration to a running engine: load, size, check, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weft.adapters.downloads import Limits as DownloadLimits
from weft.adapters.downloads import ProgressLog
from weft.adapters.pages import PageConfig, PagePool
from weft.adapters.reading import Policy
from weft.adapters.sources import RemoteSettings, Sources
from weft.adapters.store import AdapterStore
from weft.errors import InvalidConfig, InvalidModel, one_line
from weft.kernels.native import Native, find_native
from weft.kernels.plan import PAGE_ROWS
from weft.server.config import EngineConfig, ServerConfig
from weft.server.engine.compiling import compile_parts, compiler_for
from weft.server.engine.constraints import Compiler, UnsupportedTokenizer, make_vocabulary
from weft.server.engine.engine import Engine
from weft.server.engine.fairness import FairQueue
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.kv_cache import KvCache
from weft.server.engine.limits import Abilities, Limits
from weft.server.engine.means import backend_for, means_of
from weft.server.engine.memory import host_memory, memory_of
from weft.server.engine.model import PagedModel, check_path, load_model, resolve_device
from weft.server.engine.pacing import FLOOR_BLOCKS, Pace
from weft.server.engine.parity import AdapterProbe
from weft.server.engine.probe import Expectation, expect, probe
from weft.server.engine.scheduler import Scheduler
from weft.server.engine.sequence import NEVER
from weft.server.engine.sizing import (
    AdapterRoom,
    Trial,
    adapter_room,
    describe_pages,
    fit_kv_tokens,
    mask_bytes,
    mib,
    row_dtype,
)
from weft.server.engine.speculation import SMALL_STEP, Speculation
from weft.server.engine.text import Decode
from weft.server.engine.threads import fastest_threads
from weft.server.metrics import Metrics

_log = logging.getLogger(__name__)

_REPORTED_LOGITS = 1 << 25
"""Logits that a step computes for the sake of prompts' log-probabilities: 128 MiB in float32."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What was loaded, and what fits."""

    model: str
    dtype: str
    device: str
    context_length: int
    vocab_size: int
    kv_tokens: int
    adapter_pages: int
    page_rows: int
    eos_token_ids: frozenset[int]
    abilities: Abilities
    max_batch_tokens: int
    startup_line: str


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """An engine that is ready to run, and what belongs to it."""

    engine: Engine
    store: AdapterStore
    tokenizer: PreTrainedTokenizerBase
    info: EngineInfo
    compiler: Compiler


def load_engine(config: ServerConfig, metrics: Metrics) -> LoadedEngine:
    """Load the model, size its cache and pages, and prove that it is served as transformers serves it.

    Raises InvalidModel, InvalidConfig.
    """
    settings = config.engine
    native = _native(config)
    sources = _sources(config)
    check_path(config.model.path)
    tokenizer = _load_tokenizer(config.model.path)
    model = load_model(config.model, native)
    settings = _for_whole_prompts(settings, model) if model.runs_whole else settings
    expected = expect(model)
    room = adapter_room(model, settings, memory_of(model.device), host_memory())
    rows = row_dtype(model.dtype, settings)
    pages = PagePool(model.base, PageConfig(room.pages + 1, model.dtype, model.device, rows, native))
    backend = backend_for(model.device, settings.lora_backend, has_native=native is not None)
    fitted = _fit(model, settings, pages, room, expected, backend)
    pool, kv_tokens = fitted.pool, fitted.pool.capacity * settings.block_tokens
    adapter_probe = AdapterProbe(model, backend, rows) if settings.adapter_probe else None
    policy = Policy(settings.allow_no_effect, adapter_probe)
    store = AdapterStore(pages, sources, time.time, room.host_bytes, metrics, policy)
    context_length, allowed = (_context_length(model, settings, tokens) for tokens in (kv_tokens, 1 << 62))
    limits = Limits(context_length, model.vocab_size, context_length < allowed, model.abilities)
    model.check_position(limits.context_length - 1)
    means = means_of(model.device, backend) if settings.cuda_graphs and not model.runs_whole else None
    if means is not None:
        width = pool.blocks_for(limits.context_length)
        model.capture(means, settings.max_running_requests, width).warm_up()
    eos_token_ids = _eos_token_ids(model, tokenizer)
    engine = Engine(
        model=model,
        scheduler=Scheduler(
            pool,
            settings.max_batch_tokens,
            settings.max_running_requests,
            model.scrub,
            store.residency,
            FairQueue(dict(settings.adapter_weights)),
            Pace(settings.target_step_ms / 1000, FLOOR_BLOCKS * settings.block_tokens),
            prefix_cache=settings.prefix_cache,
            max_reported=_max_reported(model),
            whole_prompts=model.runs_whole,
        ),
        limits=limits,
        decode=_decoder(tokenizer),
        eos_token_ids=eos_token_ids,
        release=store.release,
        metrics=metrics,
        clock=time.monotonic,
        speculation=Speculation(
            pool, settings.speculative_tokens, limits.context_length, min(SMALL_STEP, settings.max_batch_tokens)
        ),
        max_wait_s=settings.max_queue_ms / 1000,
        run_ahead=model.device.type == "cuda" if settings.run_ahead is None else settings.run_ahead,
    )
    dtype = _name(model.dtype)
    info = EngineInfo(
        model=config.model.path,
        dtype=dtype,
        device=str(model.device),
        context_length=limits.context_length,
        vocab_size=limits.vocab_size,
        kv_tokens=0 if model.runs_whole else kv_tokens,
        adapter_pages=room.pages,
        page_rows=PAGE_ROWS,
        eos_token_ids=eos_token_ids,
        abilities=limits.abilities,
        max_batch_tokens=settings.max_batch_tokens,
        startup_line=(
            f"{type(model.model).__name__} in {dtype} on {_describe(model)}, {fitted.error:.1e} from transformers' "
            f"own; {_capacity(model, kv_tokens)} up to {limits.context_length:,}, and {describe_pages(room.pages)} of "
            f"{PAGE_ROWS} rank rows in {_name(rows)} ({mib(pages.page_bytes)} each) over {len(pages.sites)} modules; a "
            f"step takes up to {mib(fitted.step_bytes)}"
        ),
    )
    if limits.abilities.generates:
        compiler = _compiler(tokenizer, model.vocab_size, eos_token_ids)
    else:
        compiler = Compiler(UnsupportedTokenizer("an encoder gives no answers"))
    return LoadedEngine(engine, store, tokenizer, info, compiler)


def _for_whole_prompts(settings: EngineConfig, model: PagedModel) -> EngineConfig:
    """The settings of a model that runs each prompt in one step: the longest fits in it. Raises InvalidConfig."""
    if settings.kv_tokens is not None:
        name = type(model.model).__name__
        raise InvalidConfig(f"--kv-tokens is {settings.kv_tokens}; {name} keeps no KV cache: leave the option out")
    longest = settings.context_length or model.context_length or settings.max_batch_tokens
    return replace(
        settings,
        context_length=longest,
        max_batch_tokens=max(settings.max_batch_tokens, longest),
        prefix_cache=False,
        speculative_tokens=0,
    )


def _capacity(model: PagedModel, kv_tokens: int) -> str:
    if model.runs_whole:
        return "an encoder: no KV cache, prompts"
    return f"fits {kv_tokens:,} tokens of KV cache ({mib(kv_tokens * model.token_bytes)}), contexts"


def _native(config: ServerConfig) -> Native | None:
    """The C library, with as many threads as are wanted or worth it; PyTorch then keeps to one.

    None where all of the model is PyTorch's: on a GPU, in float16, and without the library.
    """
    threads = config.engine.threads
    is_served = resolve_device(config.model.device) == "cpu" and config.model.dtype != "float16"
    if not is_served or find_native(1) is None:
        torch.set_num_threads(threads or torch.get_num_threads())
        return None
    native = find_native(threads or fastest_threads(find_native, torch.get_num_threads()))
    torch.set_num_threads(1)
    return native


def _describe(model: PagedModel) -> str:
    if model.device.type != "cpu":
        return str(model.device)
    native = model.native
    library, threads = ("no C library", torch.get_num_threads()) if native is None else (native.level, native.threads)
    return f"{model.device} ({library}, {threads} thread{'s' * (threads != 1)})"


@dataclass(frozen=True, slots=True)
class _Fitted:
    """pool: of the cache that the model has. step_bytes: what a step takes beside it. error: of the model's probe."""

    pool: BlockPool
    step_bytes: int
    error: float


def _fit(
    model: PagedModel, settings: EngineConfig, pages: PagePool, room: AdapterRoom, expected: Expectation, backend: str
) -> _Fitted:
    """Prove on a small cache that the model is served right, measure a step, and make the cache of what is left."""
    blocks = [-(-len(prompt) // settings.block_tokens) for prompt in expected.prompts]
    least = sum(blocks) * settings.block_tokens
    if settings.kv_tokens is not None and settings.kv_tokens <= least - settings.block_tokens:
        raise InvalidConfig(f"--kv-tokens is {settings.kv_tokens}; must be at least {least}")
    longest = min(n for n in (settings.context_length, model.context_length, settings.kv_tokens, NEVER) if n) - 1
    trial = Trial.of(settings, model.device, longest, _max_reported(model), whole=model.runs_whole)
    small = trial.pool(least)
    compiler = compiler_for(model.device) if settings.compile else None
    model.attach(_cache(model, small), pages.groups, backend, compiler)
    if compiler is not None and model.fusion is not None:
        compile_parts(model.fusion, compiler, time.monotonic)
    error = _probe(model, small, expected)
    step_bytes = trial.run(model, small)
    if longest < NEVER - 1 and not model.attends_in_place:
        step_bytes += mask_bytes(min(settings.max_batch_tokens, longest), longest, model.dtype.itemsize)
    owed_bytes = room.on_host_bytes if model.device.type == "cpu" else 0
    num_tokens = fit_kv_tokens(model, settings, memory_of(model.device), step_bytes, owed_bytes)
    pool = BlockPool(1 + -(-max(num_tokens, least) // settings.block_tokens), settings.block_tokens)
    model.use(_cache(model, pool))
    return _Fitted(pool, step_bytes, error)


def _probe(model: PagedModel, pool: BlockPool, expected: Expectation) -> float:
    """As `probe`; a model that fails with faster functions in it gets its own back."""
    try:
        return probe(model, pool, expected)
    except InvalidModel:
        if model.fusion is None or not model.fusion.fused:
            raise
        model.fusion.undo()
        error = probe(model, pool, expected)
        _log.warning("%s is right only without faster functions for its parts", type(model.model).__name__)
        return error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _max_reported(model: PagedModel) -> int:
    """Tokens of prompts that a step reports on."""
    return max(1, _REPORTED_LOGITS // model.vocab_size)


def _sources(config: ServerConfig) -> Sources:
    limits = DownloadLimits(config.max_adapter_bytes, ProgressLog(time.monotonic))
    return Sources(config.all_source_roots, RemoteSettings(config.source_prefixes, config.cache, limits))


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # as in load_model: one line, whatever the files hold
        raise InvalidModel(f"{path} has no tokenizer that transformers can load: {one_line(error)}") from error
    return tokenizer


def _compiler(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: frozenset[int]) -> Compiler:
    try:
        return Compiler(make_vocabulary(tokenizer, vocab_size, eos_token_ids))
    except UnsupportedTokenizer as error:
        _log.warning("answers can't be constrained with this model's tokenizer: %s", error)
        return Compiler(error)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    def decode(ids: Seq[int]) -> str:
        text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    return decode


def _eos_token_ids(model: PagedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end an answer: the generation config's, else the model's, else the tokenizer's."""
    generation = getattr(model.model, "generation_config", None)
    owners = (generation, model.config.get_text_config(), tokenizer)
    for ids in (getattr(owner, "eos_token_id", None) for owner in owners):
        if ids is not None:
            return frozenset(i for i in ([ids] if isinstance(ids, int) else ids) if 0 <= i < model.vocab_size)
    return frozenset()


def _cache(model: PagedModel, pool: BlockPool) -> KvCache:
    return KvCache(
        model.kv_shapes, pool.num_blocks, pool.block_tokens, model.dtype, model.device, in_turn=model.runs_whole
    )


def _context_length(model: PagedModel, settings: EngineConfig, kv_tokens: int) -> int:
    made_for = model.context_length
    if settings.context_length is not None and made_for is not None and settings.context_length > made_for:
        raise InvalidConfig(f"--context-length is {settings.context_length}; this model is exact up to {made_for}")
    return min(length for length in (settings.context_length, made_for, kv_tokens) if length is not None)
