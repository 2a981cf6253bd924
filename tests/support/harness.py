"""An engine on a tiny model, driven step by step without threads."""

from __future__ import annotations

import queue
import random
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import torch
from prometheus_client import CollectorRegistry

from weft.adapters.records import NewAdapter
from weft.adapters.sources import Sources
from weft.adapters.store import AdapterStore
from weft.errors import WeftError
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.server.engine.batch import build_batch
from weft.server.engine.engine import Engine
from weft.server.engine.load import load_engine
from weft.server.engine.request import Delta, Finish, Request, Token
from weft.server.engine.scheduler import Scheduled
from weft.server.engine.sequence import Sequence
from weft.server.engine.text import OutputText
from weft.server.metrics import Metrics


@dataclass
class Answer:
    """What an engine gave to one request."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    vector: torch.Tensor | None = None
    finish: Finish | None = None
    error: WeftError | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.error is not None

    def take(self, event: Delta | WeftError) -> None:
        assert not self.ended, "an answer goes on after its end"
        if isinstance(event, WeftError):
            self.error = event
        else:
            self.text += event.text
            assert not (event.prompt and self.tokens), "the prompt comes with the first delta"
            self.tokens += event.tokens
            self.prompt += event.prompt
            self.vector = event.vector
            self.finish = event.finish


class Harness:
    """Loads a folder as the server does, and steps the engine by hand."""

    def __init__(
        self,
        model: Path,
        adapters: Mapping[str, Path] | None = None,
        device: str = "cpu",
        sources: Sources | None = None,
        dtype: str = "float32",
        **engine: object,
    ) -> None:
        """sources: instead of those that read the adapters' parent folders."""
        settings = {
            "max_batch_tokens": 64,
            "max_running_requests": 16,
            "kv_tokens": 2048,
            "adapter_pages": 64,
            "target_step_ms": 0,  # so that chunks do not depend on the time
        }
        roots = tuple({folder.parent for folder in (adapters or {}).values()})
        config = ServerConfig(
            model=ModelConfig(str(model), dtype=dtype, device=device),
            engine=EngineConfig(**{**settings, **engine}),
            source_roots=roots,
        )
        self.registry = CollectorRegistry()
        loaded = load_engine(config, Metrics(self.registry))
        self.engine: Engine = loaded.engine
        self.store: AdapterStore = loaded.store
        self.info = loaded.info
        self.tokenizer = loaded.tokenizer
        self.compiler = loaded.compiler
        if sources is not None:
            self.store._reader._sources = sources
        self.answers: dict[Request, Answer] = {}
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.store.wake_with(lambda: self._wakes.put(None))
        for name, folder in (adapters or {}).items():
            self.store.create(NewAdapter(name, f"file:{folder}"))

    def submit(self, request: Request) -> Answer:
        self.engine.check(request)
        adapters = self.store.acquire_all(request.adapters)
        self.engine.add(request, adapters)
        self.answers[request] = Answer()
        return self.answers[request]

    def step(self) -> None:
        """One step; where nothing can be done before an adapter comes, wait for it first."""
        if self.engine.has_work and self.engine.idle_s != 0.0:
            self.wait()
        for request, event in self.engine.step():
            self.answers[request].take(event)
        self.engine.check_pools()
        self.store.check()

    def wait(self) -> None:
        """Until an adapter came, or left."""
        self._wakes.get(timeout=60)

    def wake(self) -> None:
        """Let the next step go on although no adapter came."""
        self._wakes.put(None)

    def finish(self) -> None:
        """Step until every request has ended."""
        while self.engine.has_work:
            self.step()

    def logits(self, requests: Seq[Request], chunk: int) -> list[torch.Tensor]:
        """Logits [len(prompt), vocab] of each prompt, all in one row a step, `chunk` tokens of each at a time."""
        pool, model = self.engine._scheduler.pool, self.engine._model
        sequences = []
        for request in requests:
            refs = self.store.acquire_all(request.adapters)
            sequence = Sequence(request, refs, OutputText(lambda ids: ""), random.Random(0), 0.0)
            sequence.blocks = pool.allocate(pool.blocks_for(len(request.prompt)))
            sequences.append(sequence)
        parts: list[list[torch.Tensor]] = [[] for _ in sequences]
        while any(sequence.num_pending for sequence in sequences):
            counts = [min(chunk, sequence.num_pending) for sequence in sequences]
            picked = [Scheduled(s, n) for s, n in zip(sequences, counts, strict=True) if n]
            rows = model.forward(build_batch(picked, pool.block_tokens, model.device, every_row=True)).logits
            for part, sequence, count, logits in zip(parts, sequences, counts, rows.split(counts), strict=True):
                part.append(logits)
                sequence.num_computed += count
        for sequence in sequences:
            pool.free(sequence.blocks)
            for ref in sequence.adapters:
                self.store.release(ref)
        return [torch.cat(part) for part in parts]

    def run(self, requests: Seq[Request], arrivals: Seq[int] | None = None) -> list[Answer]:
        """Run requests to their ends; request i is submitted before step arrivals[i]."""
        due = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
        answers: dict[int, Answer] = {}
        at = 0
        while due or self.engine.has_work:
            while due and due[0][0] <= at:
                index = due.pop(0)[1]
                answers[index] = self.submit(requests[index])
            self.step()
            at += 1
        self.store.check()
        return [answers[i] for i in range(len(requests))]
