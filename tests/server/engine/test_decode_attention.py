"""Single rows over the paged cache: each way gives what PyTorch gives over copies."""

from __future__ import annotations

import pytest
import torch

from weft.server.engine.batch import Batch, Chunk
from weft.server.engine.decode_attention import InPlaceDecodes
from weft.server.engine.gathering import Gathering
from weft.server.engine.kv_cache import KvCache, KvShape
from weft.server.engine.step import AttentionOptions

HEADS, DIM, BLOCK_TOKENS = 4, 16, 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_batch(*, with_chunk: bool) -> Batch:
    """Decodes after 9 and 2 tokens, and between them perhaps the last three tokens of a prompt of five."""
    spans = [(1, 9, [1, 4, 2]), *([(3, 5, [3, 6])] if with_chunk else []), (1, 2, [5])]
    decodes, chunks, slots = [], [], []
    for count, context, blocks in spans:
        start = len(slots)
        slots += [blocks[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS for at in range(context)][-count:]
        if count == 1:
            decodes.append((start, context, blocks))
        else:
            chunks.append(Chunk(start, count, context, torch.tensor(blocks, device=DEVICE)))
    rows = torch.arange(len(slots), device=DEVICE)
    return Batch(
        input_ids=rows[None],
        positions=rows[None],
        slots=torch.tensor(slots, device=DEVICE),
        logit_rows=rows,
        sample_rows=(),
        prompt_rows=(),
        checked_rows=(),
        plan=None,
        logit_plan=None,
        chunks=tuple(chunks),
        decodes=tuple(decodes),
        block_tokens=BLOCK_TOKENS,
        wants_all=True,
    )


@pytest.mark.parametrize("with_chunk", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_decode_rows_are_read_in_place_beside_chunks(with_chunk: bool, window: int | None) -> None:
    pytest.importorskip("triton")
    torch.manual_seed(0)
    batch = make_batch(with_chunk=with_chunk)
    cache = KvCache({0: KvShape(2, DIM, DIM)}, 7, BLOCK_TOKENS, torch.float32, DEVICE)
    for tensor in cache.layers[0]:
        tensor.normal_()
    query = torch.randn(HEADS, batch.num_tokens, DIM, device=DEVICE)
    key, value = (torch.randn(2, batch.num_tokens, DIM, device=DEVICE) for _ in range(2))
    options = AttentionOptions(None, window, None, None)
    made, expected = (way(batch, cache).attend(0, query, key, value, options) for way in (InPlaceDecodes, Gathering))
    assert torch.allclose(made, expected, atol=1e-5)
