"""From configuration to a running engine: load, size, check, report."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from weft.adapters.base import ModuleKind
from weft.adapters.downloads import Limits as DownloadLimits
from weft.adapters.downloads import ProgressLog
from weft.adapters.pages import PageConfig, PagePool
from weft.adapters.reading import Policy
from weft.adapters.sources import RemoteSettings, Sources
from weft.adapters.store import AdapterStore
from weft.errors import InvalidConfig, InvalidModel, one_line
from weft.kernels.lora import BACKENDS
from weft.kernels.plan import PAGE_ROWS
from weft.server.config import EngineConfig, ServerConfig
from weft.server.engine.attention import KvCache
from weft.server.engine.constraints import Compiler, UnsupportedTokenizer, make_vocabulary
from weft.server.engine.engine import Engine, Limits
from weft.server.engine.fairness import FairQueue
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.model import PagedModel, check_path, load_model
from weft.server.engine.pacing import FLOOR_BLOCKS, Pace
from weft.server.engine.parity import AdapterProbe
from weft.server.engine.probe import expect, probe
from weft.server.engine.scheduler import Scheduler
from weft.server.engine.speculation import Speculation
from weft.server.engine.text import Decode
from weft.server.metrics import Metrics

_log = logging.getLogger(__name__)

_KV_SHARE = {"cpu": 0.25, "cuda": 0.8}
"""Share of the memory that is free after loading that the KV cache may take when nobody says how much."""

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
    if settings.lora_backend not in BACKENDS:
        raise InvalidConfig(f"--lora-backend is {settings.lora_backend!r}; must be one of {', '.join(BACKENDS)}")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    sources = _sources(config)
    check_path(config.model.path)
    tokenizer = _load_tokenizer(config.model.path)
    model = load_model(config.model)
    expected = expect(model)
    page_config = PageConfig(settings.adapter_pages + 1, model.dtype, model.device)
    _check_pages(model, page_config)
    pages = PagePool(model.base, page_config)
    pool = BlockPool(_num_blocks(model, settings), settings.block_tokens)
    least = sum(map(pool.blocks_for, map(len, expected.prompts))) * pool.block_tokens
    if pool.capacity * pool.block_tokens < least:
        raise InvalidConfig(f"--kv-tokens is {settings.kv_tokens}; must be at least {least}")
    model.attach(
        KvCache(model.kv_shapes, pool.num_blocks, pool.block_tokens, model.dtype, model.device),
        pages.sites,
        settings.lora_backend,
    )
    error = probe(model, pool, expected)
    adapter_probe = AdapterProbe(model, settings.lora_backend) if settings.adapter_probe else None
    policy = Policy(settings.allow_no_effect, adapter_probe)
    store = AdapterStore(pages, sources, time.time, settings.adapter_host_bytes, metrics, policy)
    kv_tokens = pool.capacity * pool.block_tokens
    context_length, allowed = (_context_length(model, settings, tokens) for tokens in (kv_tokens, 1 << 62))
    limits = Limits(context_length, model.vocab_size, is_by_cache=context_length < allowed)
    model.check_position(limits.context_length - 1)
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
            max_reported=max(1, _REPORTED_LOGITS // model.vocab_size),
        ),
        limits=limits,
        decode=_decoder(tokenizer),
        eos_token_ids=eos_token_ids,
        release=store.release,
        metrics=metrics,
        clock=time.monotonic,
        speculation=Speculation(pool, settings.speculative_tokens, limits.context_length),
    )
    dtype = str(model.dtype).removeprefix("torch.")
    info = EngineInfo(
        model=config.model.path,
        dtype=dtype,
        device=str(model.device),
        context_length=limits.context_length,
        vocab_size=limits.vocab_size,
        kv_tokens=kv_tokens,
        adapter_pages=settings.adapter_pages,
        page_rows=PAGE_ROWS,
        eos_token_ids=eos_token_ids,
        startup_line=(
            f"{type(model.model).__name__} in {dtype} on {model.device}, {error:.1e} from transformers' own; "
            f"fits {kv_tokens:,} tokens of KV cache ({_mib(kv_tokens * model.token_bytes)}), contexts up to "
            f"{limits.context_length:,}, and {settings.adapter_pages} adapter pages of {PAGE_ROWS} rank rows "
            f"({_mib(pages.page_bytes)} each) over {len(pages.sites)} modules"
        ),
    )
    return LoadedEngine(engine, store, tokenizer, info, _compiler(tokenizer, model.vocab_size, eos_token_ids))


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


def _num_blocks(model: PagedModel, settings: EngineConfig) -> int:
    """Blocks of the KV cache, the zero block included."""
    free_bytes, total_bytes = _memory(model.device)
    if settings.kv_tokens is not None:
        wanted_bytes = settings.kv_tokens * model.token_bytes
        if wanted_bytes > total_bytes:
            raise InvalidConfig(
                f"--kv-tokens is {settings.kv_tokens}, which takes {_mib(wanted_bytes)} of this model; "
                f"there are {_mib(total_bytes)}"
            )
        return 1 + -(-settings.kv_tokens // settings.block_tokens)
    fits = int(free_bytes * _KV_SHARE[model.device.type]) // model.token_bytes
    context = settings.context_length or model.context_length or fits
    wanted = min(fits, context * settings.max_running_requests)
    if wanted < settings.block_tokens:
        raise InvalidConfig(f"no memory is left for the KV cache ({_mib(free_bytes)} are free): use a smaller model")
    return 1 + -(-wanted // settings.block_tokens)


def _check_pages(model: PagedModel, config: PageConfig) -> None:
    """Raises InvalidConfig where the adapter pages alone are more than all memory."""
    sites = model.base.of_kind(ModuleKind.LINEAR).values()
    rank_row = sum(module.d_in + module.d_out for module in sites) * config.dtype.itemsize
    num_bytes = config.num_pages * PAGE_ROWS * rank_row
    _, total_bytes = _memory(model.device)
    if num_bytes > total_bytes:
        raise InvalidConfig(
            f"--adapter-pages is {config.num_pages - 1}, which takes {_mib(num_bytes)} with this model; "
            f"there are {_mib(total_bytes)}"
        )


def _memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free, and bytes that there are."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _context_length(model: PagedModel, settings: EngineConfig, kv_tokens: int) -> int:
    made_for = model.context_length
    if settings.context_length is not None and made_for is not None and settings.context_length > made_for:
        raise InvalidConfig(f"--context-length is {settings.context_length}; this model is exact up to {made_for}")
    return min(length for length in (settings.context_length, made_for, kv_tokens) if length is not None)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
