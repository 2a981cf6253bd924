"""What `benchmarks/gpu.py` times beside kernels: an engine's steps, launched ahead or not; steps compiled or not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from random import Random
from typing import Any

import torch
from gpu_kernels import Timer
from prometheus_client import CollectorRegistry

from weft.adapters.residency import AdapterRef
from weft.adapters.tiers import AdapterVersion
from weft.server.engine.compiling import compile_parts, compiler_for
from weft.server.engine.engine import Engine
from weft.server.engine.fusing import Fusion
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.limits import Limits
from weft.server.engine.request import Request, Stopping
from weft.server.engine.scheduler import Scheduler
from weft.server.metrics import Metrics


def compare_ahead(bench: Any) -> Iterator[dict[str, Any]]:
    """Milliseconds from step to step of an engine with distinct adapters, its tokens committed and published."""
    for rows in bench.shape.batches:
        _decode(bench, rows, run_ahead=True)  # kernels are compiled, and graphs captured
        in_turn_ms, expected = _decode(bench, rows, run_ahead=False)
        ahead_ms, tokens = _decode(bench, rows, run_ahead=True)
        yield {"rows": rows, "in_turn_ms": in_turn_ms, "ahead_ms": ahead_ms, "same_tokens": tokens == expected}


def _decode(bench: Any, rows: int, *, run_ahead: bool) -> tuple[float, dict[str, list[int]]]:
    """The mean time of a step once all decode, and each answer."""
    context, vocab, num_tokens = bench.shape.context, bench.shape.config["vocab_size"], bench.shape.decoded
    engine = Engine(
        model=bench.model,
        scheduler=Scheduler(BlockPool(bench.num_blocks, bench.cache.block_tokens), 512, rows),
        limits=Limits(context + num_tokens, vocab),
        decode=lambda ids: "",
        eos_token_ids=frozenset(),
        release=lambda ref: None,
        metrics=Metrics(CollectorRegistry()),
        clock=time.monotonic,
        run_ahead=run_ahead,
    )
    for row in range(rows):
        prompt = tuple(Random(row).randrange(vocab) for _ in range(context))
        request = Request(f"r{row}", prompt, ((f"a{row}", 1.0),), stopping=Stopping(num_tokens))
        engine.add(request, (_adapter(bench, row),))
    tokens: dict[str, list[int]] = {f"r{row}": [] for row in range(rows)}
    began_s, steps = 0.0, 0
    while engine.has_work:
        if all(tokens.values()):
            began_s = began_s or time.perf_counter()
            steps += 1
        for request, event in engine.step():
            tokens[request.request_id] += [token.id for token in event.tokens]  # type: ignore[union-attr]
    return (time.perf_counter() - began_s) / steps * 1000, tokens


def _adapter(bench: Any, index: int) -> AdapterRef:
    rank = bench.shape.ranks[0]
    resident = bench.adapter(index, rank)
    version = AdapterVersion(f"{index:064x}", "", (rank,), (), 0, 0, True, None, None, resident=resident)
    return AdapterRef(f"a{index}", version)


@torch.inference_mode()
def compare_compiled(bench: Any, timer: Timer) -> Iterator[dict[str, Any]]:
    """Captured steps as they are and with their parts compiled, without adapters and with distinct ones.

    The model runs compiled from then on.
    """
    steps = {}
    for rows in bench.shape.batches:
        base = bench.batch(rows)
        mixed, _ = bench.with_adapters(base, "distinct", bench.shape.ranks[0])
        steps[rows] = base, mixed
    plain = bench.graphs
    expected = {rows: plain.run(mixed).float().clone() for rows, (_, mixed) in steps.items()}
    for base, _ in steps.values():
        plain.run(base)
    began_s = time.monotonic()
    pointwise = compiler_for(bench.device)
    fusion = Fusion(bench.model.model, pointwise, bench.max_positions, bench.device)
    compile_parts(fusion, pointwise, time.monotonic)
    took_s = time.monotonic() - began_s
    compiled = bench.capture()
    for rows, (base, mixed) in steps.items():
        made = compiled.run(mixed).float()
        error = float(((made - expected[rows]).norm(dim=-1) / expected[rows].norm(dim=-1)).max())
        base_ms, compiled_base_ms = timer.compare(partial(plain.run, base), partial(compiled.run, base))
        mixed_ms, compiled_mixed_ms = timer.compare(partial(plain.run, mixed), partial(compiled.run, mixed))
        yield {
            "rows": rows,
            "parts": len(fusion.fused),
            "compiling_s": took_s,
            "largest_relative_error": error,
            "base_ms": base_ms,
            "compiled_base_ms": compiled_base_ms,
            "mixed_ms": mixed_ms,
            "compiled_mixed_ms": compiled_mixed_ms,
        }
