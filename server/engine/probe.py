"""Is this model served right? Two prompts through the engine's own path, against transformers run eagerly."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.errors import InvalidModel
from weft.server.engine.attention import ATTENTION
from weft.server.engine.batch import build_batch
from weft.server.engine.encoders import Encoder, pooled_by
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.model import PagedModel
from weft.server.engine.request import Pooling, Request
from weft.server.engine.scheduler import Scheduled
from weft.server.engine.sequence import Sequence
from weft.server.engine.survey import refusing
from weft.server.engine.text import OutputText

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest error allowed, as ‖ours - eager‖ / ‖eager‖ over all logits. Wrong masks or mixed-up rows give 0.1 to 1."""

_MAX_PROBED_WINDOW = 256


@dataclass(frozen=True, slots=True)
class Expectation:
    """Prompts, and what transformers itself makes of them: the logits, [all tokens, vocab].

    Of an encoder the last hidden states in their place, [all tokens, hidden], and the labels' logits, [2, labels].
    """

    prompts: list[list[int]]
    rows: torch.Tensor
    labels: torch.Tensor | None = None


def expect(paged: PagedModel) -> Expectation:
    """Run two prompts eagerly, each alone; to be called before the model is attached to anything of ours.

    They are longer than the model's attention window where that is short. Raises InvalidModel where the model fails.
    """
    windows = [window for window in paged.windows if window <= _MAX_PROBED_WINDOW]
    longest = min(max([11, *(window + 5 for window in windows)]), paged.context_length or 1 << 30)
    rng = random.Random(0)
    tokens = [token for token in range(paged.vocab_size) if token != paged.config.get_text_config().pad_token_id]
    prompts = [[rng.choice(tokens) for _ in range(max(1, longest - cut))] for cut in (0, 3)]
    with refusing(type(paged.model).__name__):
        if paged.encoder is None:
            return Expectation(prompts, torch.cat([_eager(paged, paged.model, prompt).logits[0] for prompt in prompts]))
        hidden = [_eager(paged, paged.model.base_model, prompt).last_hidden_state[0] for prompt in prompts]
        labels = [_eager(paged, paged.model, prompt).logits for prompt in prompts]
    return Expectation(prompts, torch.cat(hidden), torch.cat(labels))


def probe(paged: PagedModel, pool: BlockPool, expected: Expectation) -> float:
    """Run the prompts as one flat row, in two uneven chunks where they may be cut, and compare all logits.

    Catches what can't be seen from the config: attention that bypasses the interface, state that leaks from one
    sequence into its neighbour, positions that are not taken from `position_ids`. Returns the relative error; raises
    InvalidModel where it is above `TOLERANCE`. The blocks used are free again, and zero, afterwards.
    """
    name = type(paged.model).__name__
    with refusing(name):
        rows = _flat(paged, pool, expected.prompts)
        error = _error(rows, expected.rows)
        if paged.encoder is not None and expected.labels is not None:
            error = max(error, _error(_labels(paged, paged.encoder, rows, expected.prompts), expected.labels))
    limit = TOLERANCE[paged.dtype]
    if not error <= limit:
        raise InvalidModel(
            f"{name} can't be served exactly: what it gives in a mixed row differs from transformers' "
            f"own by {error:.2g} (relative; at most {limit:g} is allowed)"
        )
    return error


@torch.inference_mode()
def _eager(paged: PagedModel, part: nn.Module, prompt: list[int]) -> Any:
    """part: the model, or its backbone."""
    paged.model.set_attn_implementation("eager")
    try:
        return part(input_ids=torch.tensor([prompt], device=paged.device), use_cache=False, return_dict=True)
    finally:
        paged.model.set_attn_implementation(ATTENTION)


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


@torch.inference_mode()
def _labels(paged: PagedModel, encoder: Encoder, hidden: torch.Tensor, prompts: list[list[int]]) -> torch.Tensor:
    """What the checkpoint's own classifier makes of the last hidden states of all prompts, [prompts, labels]."""
    rows = torch.split(hidden.float(), [len(prompt) for prompt in prompts])
    features = [paged.features(pooled_by(each)[encoder.pooling], (1, [])) for each in rows]
    return encoder.head()(torch.stack(features))


def _flat(paged: PagedModel, pool: BlockPool, prompts: list[list[int]]) -> torch.Tensor:
    """What there is of each token of all prompts, computed in two steps: some tokens of each, then the rest of each."""
    sequences = [_sequence(prompt, pool, Pooling.MEAN if paged.runs_whole else None) for prompt in prompts]
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    try:
        for share in (1.0,) if paged.runs_whole else (0.4, 1.0):
            counts = [math.ceil(sequence.num_pending * share) for sequence in sequences]
            picked = [Scheduled(sequence, n) for sequence, n in zip(sequences, counts, strict=True) if n]
            batch = build_batch(picked, pool.block_tokens, paged.device, every_row=not paged.runs_whole)
            made = paged.forward(batch)
            for i, rows in enumerate(torch.split(made.logits if made.hidden is None else made.hidden, counts)):
                parts[i].append(rows)
                sequences[i].num_computed += counts[i]
    finally:
        for sequence in sequences:
            paged.scrub(sequence.blocks)
            pool.free(sequence.blocks)
    return torch.cat([rows for part in parts for rows in part])


def _sequence(prompt: list[int], pool: BlockPool, pooling: Pooling | None) -> Sequence:
    sequence = Sequence(
        request=Request(request_id="probe", prompt=tuple(prompt), pooling=pooling),
        adapters=(),
        text=OutputText(lambda ids: ""),
        rng=random.Random(0),
        arrived_s=0.0,
    )
    sequence.blocks = pool.allocate(pool.blocks_for(len(prompt)))
    return sequence
