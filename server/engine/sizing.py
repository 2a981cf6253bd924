"""Memory is measured: a dry run finds what a step takes, and the KV cache gets its share of what is then left.

The order is that in which sizes become known: the model is loaded, adapters get their room, a step is run on a cache as
small as will do, and the cache proper is made last.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

import torch

from weft.adapters.base import ModuleKind
from weft.errors import InvalidConfig
from weft.kernels.plan import PAGE_ROWS
from weft.kernels.site import bytes_of_page
from weft.server.config import EngineConfig
from weft.server.engine.batch import build_batch
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.memory import Memory, peak_of
from weft.server.engine.model import PagedModel
from weft.server.engine.pooling import pool as pool_rows
from weft.server.engine.reports import report
from weft.server.engine.request import Pooling, Request, Sampling
from weft.server.engine.sampler import sample
from weft.server.engine.scheduler import Scheduled
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText

_log = logging.getLogger(__name__)

MAX_AUTO_PAGES = 256
MAX_AUTO_HOST_BYTES = 1 << 30
_PAGES_SHARE = 1 / 4
_HOST_SHARE = 1 / 8
"""Of what is free with the model loaded, for adapters on the device and for their copies, if nobody says how much."""

KV_SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Of what is left in the end, for the KV cache, if nobody says how much: a host is seldom there for one server."""

_MAX_TRIAL_TOKENS = {"cpu": 512, "cuda": 8192}
_MAX_TRIAL_REQUESTS = 256
"""Beyond these, a step is measured at this size and reckoned in proportion: the start must not wait for minutes."""

_TRIAL_SAMPLING = Sampling(
    temperature=1.0, top_p=0.9, min_p=0.01, typical_p=0.9, repetition_penalty=1.1, presence_penalty=0.1, seed=0
)
"""All that takes memory when a token is chosen."""

_NUM_TOP = 20
"""Alternatives that are listed."""


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """pages: on the device, of page_bytes each. host_bytes: for copies in host memory."""

    pages: int
    page_bytes: int
    host_bytes: int

    @property
    def on_host_bytes(self) -> int:
        """What the host will hold of adapters, where pages are host memory too."""
        return self.pages * self.page_bytes + self.host_bytes


def adapter_room(model: PagedModel, settings: EngineConfig, device: Memory, host: Memory) -> AdapterRoom:
    """How much adapters may take: what the options say, else up to a share of what is free.

    Raises InvalidConfig where the pages alone are more than all memory.
    """
    sites = model.base.of_kind(ModuleKind.LINEAR).values()
    dtype = row_dtype(model.dtype, settings)
    page_bytes = sum(bytes_of_page(module.d_in, module.d_out, dtype) for module in sites)
    pages = settings.adapter_pages
    if pages is None:
        pages = min(MAX_AUTO_PAGES, int(device.free_bytes * _PAGES_SHARE) // max(page_bytes, 1))
    elif pages * page_bytes > device.total_bytes:
        raise InvalidConfig(
            f"--adapter-pages is {pages}, which takes {mib(pages * page_bytes)} with this model; "
            f"there are {mib(device.total_bytes)}"
        )
    host_bytes = settings.adapter_host_bytes
    if host_bytes is None:
        host_bytes = min(MAX_AUTO_HOST_BYTES, int(host.free_bytes * _HOST_SHARE))
    return AdapterRoom(pages, page_bytes, host_bytes)


def row_dtype(base: torch.dtype, settings: EngineConfig) -> torch.dtype:
    """Of adapters' rank rows."""
    return torch.int8 if settings.adapter_dtype == "int8" else base


@dataclass(frozen=True, slots=True)
class Trial:
    """The largest step: the second halves of prompts that are being computed, and answers on their way beside them.

    chunks: tokens of each of the halves, and 1 of each answer. block_tokens: of the cache. max_reported: tokens of
    prompts that a step reports on. scale: how many times as large a step may be in earnest. whole: whether the prompts
    are run whole, for one vector each.
    """

    chunks: tuple[int, ...]
    block_tokens: int
    max_reported: int
    scale: float
    whole: bool = False

    @classmethod
    def of(
        cls, settings: EngineConfig, device: torch.device, longest: int, max_reported: int, *, whole: bool = False
    ) -> Trial:
        """longest: prompt that there can be, in tokens."""
        num_tokens = min(settings.max_batch_tokens, _MAX_TRIAL_TOKENS[device.type])
        num_requests = min(settings.max_running_requests, _MAX_TRIAL_REQUESTS, num_tokens)
        scale = max(settings.max_batch_tokens / num_tokens, settings.max_running_requests / num_requests)
        chunks: list[int] = []
        rest = num_tokens - num_requests + 1
        while rest > 0 and len(chunks) < num_requests:
            chunks.append(max(1, min(longest if whole else longest // 2, rest)))
            rest -= chunks[-1]
        answers = min(num_requests - len(chunks), num_tokens - sum(chunks))
        return cls((*chunks, *[1] * answers), settings.block_tokens, max_reported, scale, whole)

    def pool(self, least_tokens: int) -> BlockPool:
        """Blocks for all of it at once, or for so many tokens if that is more."""
        num_blocks = sum(-(-self._length(chunk) // self.block_tokens) for chunk in self.chunks)
        return BlockPool(1 + max(num_blocks, -(-least_tokens // self.block_tokens)), self.block_tokens)

    @property
    def _num_reported(self) -> int:
        """Of each prompt."""
        return self.max_reported // max(1, sum(chunk > 1 for chunk in self.chunks))

    @torch.inference_mode()
    def run(self, model: PagedModel, pool: BlockPool) -> int:
        """The bytes that a step takes at the most, beside the model and the cache, which is the one for `pool`."""
        picked = [Scheduled(self._sequence(chunk, model.vocab_size, pool), chunk) for chunk in self.chunks]
        model.scrub(list(range(1, pool.num_blocks)))  # on a CPU, memory is taken when it is first written
        with peak_of(model.device) as peak:
            batch = build_batch(picked, self.block_tokens, model.device)
            made = model.forward(batch)
            logits = made.logits
            if made.hidden is not None:
                pool_rows(made.hidden, batch.pooled, model)
            for rows in batch.prompt_rows:
                tokens = rows.sequence.tokens[rows.positions.start : rows.positions.stop]
                report(logits[rows.first_row : rows.first_row + len(tokens)], tokens, _NUM_TOP)
            sampled = [item.sequence for item in picked if not self.whole]
            sample(logits[list(batch.sample_rows)], sampled, frozenset())
        for item in picked:
            pool.free(item.sequence.blocks)
        return int(peak.num_bytes * self.scale)

    def _length(self, chunk: int) -> int:
        """Of the prompt that this is computed of, at its end."""
        return chunk if self.whole else 2 * chunk

    def _sequence(self, chunk: int, vocab_size: int, pool: BlockPool) -> Sequence:
        """One of which all before the chunk is in the cache."""
        rng = random.Random(chunk)
        length = self._length(chunk)
        request = Request(
            request_id="dry run",
            prompt=tuple(rng.randrange(vocab_size) for _ in range(length)),
            sampling=_TRIAL_SAMPLING,
            logprobs=True,
            top_logprobs=_NUM_TOP,
            prompt_logprobs_from=max(1, length - self._num_reported) if chunk > 1 and not self.whole else None,
            pooling=Pooling.MEAN if self.whole else None,
        )
        sequence = Sequence(request, (), OutputText(lambda ids: ""), rng, 0.0)
        sequence.num_computed = length - chunk
        sequence.blocks = pool.allocate(pool.blocks_for(length))
        return sequence


def mask_bytes(num_queries: int, context: int, itemsize: int) -> int:
    """What says which tokens of a long prompt a chunk of it sees, as booleans and as the numbers they are made into.

    Reckoned, not measured: a dry run at the end of the longest context might take minutes.
    """
    return num_queries * context * (1 + itemsize)


def fit_kv_tokens(model: PagedModel, settings: EngineConfig, memory: Memory, step_bytes: int, owed_bytes: int) -> int:
    """Tokens of the KV cache: what the option says, else the KV cache's share of what is left.

    memory: as it is once all but the KV cache has been made. owed_bytes: that others have been promised of it. A model
    that runs prompts whole keeps nothing beyond a step, and gets what the largest takes. A step
    that does not attend in place reads the cache layer by layer into copies, which padding doubles at the most. Raises
    InvalidConfig.
    """
    if model.runs_whole:
        return settings.max_batch_tokens + settings.max_running_requests * settings.block_tokens
    left_bytes = max(0, memory.free_bytes - step_bytes - owed_bytes)
    wanted = settings.kv_tokens
    if wanted is not None:
        if wanted * model.token_bytes > memory.total_bytes:
            raise InvalidConfig(
                f"--kv-tokens is {wanted}, which takes {mib(wanted * model.token_bytes)} of this model; "
                f"there are {mib(memory.total_bytes)}"
            )
        if wanted * model.token_bytes > left_bytes:
            _log.warning(
                "--kv-tokens is %d, which takes %s, but %s are left: as the cache fills up, memory may run out",
                *(wanted, mib(wanted * model.token_bytes), mib(left_bytes)),
            )
        return wanted
    share = settings.memory_share or KV_SHARE[model.device.type]
    largest = max(shape.numbers for shape in model.kv_shapes.values())
    copied_bytes = 0 if model.attends_in_place else 2 * largest * model.dtype.itemsize
    fits = int(left_bytes * share) // (model.token_bytes + copied_bytes)
    context = settings.context_length or model.context_length or fits
    wanted = min(fits, context * settings.max_running_requests)
    if wanted < settings.block_tokens:
        raise InvalidConfig(
            f"no memory is left for the KV cache: {mib(memory.free_bytes)} are free, of which a step takes "
            f"{mib(step_bytes)} and adapters may take {mib(owed_bytes)}: lower --max-batch-tokens, --adapter-pages or "
            f"--adapter-host-bytes, or use a smaller model"
        )
    return wanted


def describe_pages(pages: int) -> str:
    """How many adapters that is."""
    counts = ", ".join(f"{pages // -(-rank // PAGE_ROWS)} of rank {rank}" for rank in (8, 16, 64))
    return f"{pages} adapter pages (adapters at once: {counts})"


def mib(num_bytes: float) -> str:
    """As text."""
    return f"{num_bytes / 2**20:,.1f} MiB"
