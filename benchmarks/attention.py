"""Attention over the paged cache, in C where it lies and by PyTorch over gathered blocks, on one thread.

    python benchmarks/attention.py

Layers of the 135M shape (9 heads, 3 KV heads, head size 64) and of a wide one (32, 8, 128), float32. Times are the
thread's own, so that what else runs on the machine counts for less.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
from report import Samples, machine, table

from weft.kernels.native import Native, find_native
from weft.server.engine.attention import attention_of
from weft.server.engine.batch import Batch, Chunk
from weft.server.engine.kv_cache import KvCache, KvShape
from weft.server.engine.step import AttentionOptions

BLOCK, LAYERS, ROUNDS = 16, 8, 7
SHAPES = {"9 heads of 64, 3 KV": (9, 3, 64), "32 heads of 128, 8 KV": (32, 8, 128)}
STEPS = {
    "1 decode at 128": [(1, 128)],
    "16 decodes at 128": [(1, 128)] * 16,
    "16 decodes at 1,024": [(1, 1024)] * 16,
    "512 rows of a new prompt": [(512, 512)],
    "64 rows at 2,048": [(64, 2048)],
    "256 rows at 2,048": [(256, 2048)],
}
"""Rows of each sequence, and its tokens with them."""


def make_batch(runs: list[tuple[int, int]]) -> tuple[Batch, int]:
    """The step, and how many blocks its cache has."""
    num_blocks = 1 + sum(-(-context // BLOCK) for _, context in runs)
    free = list(range(1, num_blocks))
    random.Random(0).shuffle(free)
    slots: list[int] = []
    chunks, decodes = [], []
    for rows, context in runs:
        blocks = [free.pop() for _ in range(-(-context // BLOCK))]
        if rows == 1:
            decodes.append((len(slots), context, blocks))
        else:
            chunks.append(Chunk(len(slots), rows, context, torch.tensor(blocks)))
        slots += [blocks[i // BLOCK] * BLOCK + i % BLOCK for i in range(context - rows, context)]
    ids = torch.zeros(1, len(slots), dtype=torch.int64)
    batch = Batch(
        input_ids=ids,
        positions=ids,
        slots=torch.tensor(slots),
        logit_rows=ids[0],
        sample_rows=(),
        prompt_rows=(),
        checked_rows=(),
        plan=None,
        logit_plan=None,
        chunks=tuple(chunks),
        decodes=tuple(decodes),
        block_tokens=BLOCK,
        wants_all=True,
    )
    return batch, num_blocks


def timed(work: Callable[[], None]) -> Samples:
    work()
    samples = Samples()
    for _ in range(ROUNDS):
        started_s = time.thread_time()
        work()
        samples.values.append(time.thread_time() - started_s)
    return samples


def measure(shape: tuple[int, int, int], runs: list[tuple[int, int]], native: Native) -> list[Samples]:
    """A layer's seconds in C, and by PyTorch; the layers have caches of their own, as in a model."""
    heads, kv_heads, d = shape
    batch, num_blocks = make_batch(runs)
    shapes = {layer: KvShape(kv_heads, d, d) for layer in range(LAYERS)}
    cache = KvCache(shapes, num_blocks, BLOCK, torch.float32, torch.device("cpu"))
    for tensors in cache.layers.values():
        for tensor in tensors:
            tensor.normal_()
    joint = torch.randn(batch.num_tokens, heads + 2 * kv_heads, d).transpose(0, 1)
    query, key, value = joint.split([heads, kv_heads, kv_heads])
    options = AttentionOptions(None, None, None, None)

    def step(way: Native | None) -> None:
        attend = attention_of(batch, cache, way)
        for layer in range(LAYERS):
            attend(layer, query, key, value, options)

    return [timed(lambda way=way: step(way)) for way in (native, None)]  # type: ignore[misc]


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(1)
    native = find_native(1)
    if native is None:
        raise SystemExit("the C library was not built: pip install -e . with a C compiler at hand")
    rows = []
    for shape_name, shape in SHAPES.items():
        for step_name, runs in STEPS.items():
            mine, theirs = measure(shape, runs, native)
            ratio = f"{theirs.median / mine.median:.2f}"
            rows.append((shape_name, step_name, *(each.show(1e3 / LAYERS, 2) for each in (mine, theirs)), ratio))
    print(f"{machine()}; C library at {native.level}\n")
    print(table(("layer", "step", "C, ms a layer", "PyTorch, ms a layer", "PyTorch over C"), rows))


if __name__ == "__main__":
    main()
