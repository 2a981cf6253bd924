"""What of a step is not the model's forward pass, with many requests running and as many waiting."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from prometheus_client import CollectorRegistry
from report import Samples, table

from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.server.engine import engine as engine_module
from weft.server.engine.load import load_engine
from weft.server.engine.request import Request, Stopping
from weft.server.metrics import Metrics

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass
class Overhead:
    """Seconds of each part of a step, by its name; "step" is all of it."""

    parts: dict[str, Samples] = field(default_factory=dict)

    def share(self, part: str) -> float:
        return self.parts[part].median / self.parts["step"].median

    @property
    def rest(self) -> float:
        """Share of the step that is neither the forward pass nor sampling."""
        return 1 - self.share("forward") - self.share("sample")

    def show(self) -> str:
        rows = [[part, samples.show(1e3, 2), f"{self.share(part) * 100:.1f} %"] for part, samples in self.parts.items()]
        return table(
            ["part", "ms a step", "of the step"],
            [*rows, ["all but forward and sample", "", f"{self.rest * 100:.1f} %"]],
        )

    def to_json(self) -> dict[str, object]:
        return {part: samples.to_json() for part, samples in self.parts.items()}


def measure_overhead(base: Path, vocab_size: int, num_running: int, steps: int = 12) -> Overhead:
    """Decode steps of `num_running` requests while as many wait, from a warm start. On one thread."""
    torch.set_num_threads(1)
    config = ServerConfig(
        ModelConfig(str(base), device="cpu"),
        EngineConfig(
            max_batch_tokens=8192, max_running_requests=num_running, kv_tokens=num_running * 64, target_step_ms=0
        ),
    )
    loaded = load_engine(config, Metrics(CollectorRegistry()))
    engine, overhead = loaded.engine, Overhead()

    def timed(part: str, work: Callable[_P, _T]) -> Callable[_P, _T]:
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            started = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                overhead.parts.setdefault(part, Samples()).values.append(time.perf_counter() - started)

        return run

    rng = random.Random(0)
    for _ in range(2 * num_running):
        prompt = tuple(rng.randrange(1, vocab_size) for _ in range(16))
        engine.add(Request("r", prompt, stopping=Stopping(max_tokens=40, ignore_eos=True)), ())
    for _ in range(4):
        engine.step()
    scheduler, model = engine._scheduler, engine._model  # noqa: SLF001 - its parts are what is timed
    scheduler.schedule = timed("schedule", scheduler.schedule)  # type: ignore[method-assign]
    model.forward = timed("forward", model.forward)  # type: ignore[method-assign]
    build = engine_module.build_batch
    engine_module.build_batch = timed("build", build)
    engine._sample = timed("sample", engine._sample)  # type: ignore[method-assign]  # noqa: SLF001
    engine._commit = timed("commit", engine._commit)  # type: ignore[method-assign]  # noqa: SLF001
    try:
        step = timed("step", engine.step)
        for _ in range(steps):
            step()
    finally:
        engine_module.build_batch = build
    commits = overhead.parts["commit"].values
    overhead.parts["commit"] = Samples([sum(commits[i : i + num_running]) for i in range(0, len(commits), num_running)])
    return overhead
