"""Is this model served right? Two prompts through the engine's own path, against transformers run eagerly."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from weft.errors import InvalidModel
from weft.server.engine.attention import ATTENTION
from weft.server.engine.batch import build_batch
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.model import PagedModel
from weft.server.engine.request import Request
from weft.server.engine.scheduler import Scheduled
from weft.server.engine.sequence import Sequence
from weft.server.engine.survey import refusing
from weft.server.engine.text import OutputText

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 5e-2}
"""Largest error allowed, as ‖ours - eager‖ / ‖eager‖ over all logits. Wrong masks or mixed-up rows give 0.1 to 1."""

_MAX_PROBED_WINDOW = 256


@dataclass(frozen=True, slots=True)
class Expectation:
    """Prompts, and their logits [all tokens, vocab] by transformers itself."""

    prompts: list[list[int]]
    logits: torch.Tensor


def expect(paged: PagedModel) -> Expectation:
    """Run two prompts eagerly, each alone; to be called before the model is attached to anything of ours.

    They are longer than the model's attention window where that is short. Raises InvalidModel where the model fails.
    """
    windows = [window for window in paged.windows if window <= _MAX_PROBED_WINDOW]
    longest = min(max([11, *(window + 5 for window in windows)]), paged.context_length or 1 << 30)
    rng = random.Random(0)
    prompts = [[rng.randrange(paged.vocab_size) for _ in range(max(1, longest - cut))] for cut in (0, 3)]
    with refusing(type(paged.model).__name__):
        logits = torch.cat([_eager(paged.model, prompt, paged.device) for prompt in prompts])
    return Expectation(prompts, logits.float())


def probe(paged: PagedModel, pool: BlockPool, expected: Expectation) -> float:
    """Run the prompts as one flat row, in two uneven chunks, and compare all logits.

    Catches what can't be seen from the config: attention that bypasses the interface, state that leaks from one
    sequence into its neighbour, positions that are not taken from `position_ids`. Returns the relative error; raises
    InvalidModel where it is above `TOLERANCE`. The blocks used are free again, and zero, afterwards.
    """
    name = type(paged.model).__name__
    with refusing(name):
        actual = _flat(paged, pool, expected.prompts).float()
    error: float = ((actual - expected.logits).norm() / expected.logits.norm()).item()
    limit = TOLERANCE[paged.dtype]
    if not error <= limit:
        raise InvalidModel(
            f"{name} can't be served exactly: its logits in a mixed row differ from transformers' "
            f"own by {error:.2g} (relative; at most {limit:g} is allowed)"
        )
    return error


@torch.inference_mode()
def _eager(model: PreTrainedModel, prompt: list[int], device: torch.device) -> torch.Tensor:
    model.set_attn_implementation("eager")
    try:
        ids = torch.tensor([prompt], device=device)
        logits: torch.Tensor = model(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        return logits
    finally:
        model.set_attn_implementation(ATTENTION)


def _flat(paged: PagedModel, pool: BlockPool, prompts: list[list[int]]) -> torch.Tensor:
    """All logits of all prompts, computed in two steps: some tokens of each, then the rest of each."""
    sequences = [_sequence(prompt, pool) for prompt in prompts]
    parts: list[list[torch.Tensor]] = [[] for _ in prompts]
    try:
        for share in (0.4, 1.0):
            counts = [math.ceil(sequence.num_pending * share) for sequence in sequences]
            picked = [Scheduled(sequence, n) for sequence, n in zip(sequences, counts, strict=True) if n]
            logits = paged.forward(build_batch(picked, pool.block_tokens, paged.device, every_row=True)).logits
            for i, rows in enumerate(torch.split(logits, counts)):
                parts[i].append(rows)
                sequences[i].num_computed += counts[i]
    finally:
        for sequence in sequences:
            paged.scrub(sequence.blocks)
            pool.free(sequence.blocks)
    return torch.cat([rows for part in parts for rows in part])


def _sequence(prompt: list[int], pool: BlockPool) -> Sequence:
    sequence = Sequence(
        request=Request(request_id="probe", prompt=tuple(prompt)),
        adapters=(),
        text=OutputText(lambda ids: ""),
        rng=random.Random(0),
        arrived_s=0.0,
    )
    sequence.blocks = pool.allocate(pool.blocks_for(len(prompt)))
    return sequence
