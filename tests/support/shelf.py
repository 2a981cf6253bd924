"""Small adapters on disk, a store of few pages for them, and sources that a test can hold up or break."""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from bases import linear_base
from tiny import make_adapter, make_model

from weft.adapters.pages import PageConfig, PagePool
from weft.adapters.records import AdapterInfo, NewAdapter
from weft.adapters.sources import Sources
from weft.adapters.store import AdapterStore

SHAPES = {
    f"model.layers.{i}.self_attn.{name}": (64, d) for i in range(3) for name, d in (("q_proj", 64), ("v_proj", 32))
}


def make_shelf(root: Path, ranks: dict[str, int]) -> Path:
    """A folder that holds an adapter of each name and rank, each of another content."""
    model = make_model("llama", root / "base")
    for seed, (name, rank) in enumerate(ranks.items()):
        make_adapter(model, root / "adapters" / name, seed, r=rank, target_modules=["q_proj", "v_proj"])
    return root / "adapters"


def replace_weights(folder: Path, other: Path) -> None:
    """Put another adapter's weights and config in a folder's place, as one that is trained anew would."""
    for file in other.glob("adapter_*"):
        (folder / (file.name + ".new")).write_bytes(file.read_bytes())
        (folder / (file.name + ".new")).replace(folder / file.name)


class SlowSources(Sources):
    """Sources that wait, where a test says so, until it lets them go on."""

    def __init__(self, root: Path) -> None:
        super().__init__([root])
        self.may_read = threading.Event()
        self.may_read.set()
        self.reached = threading.Semaphore(0)
        self.num_fetches = 0
        self.slow: Callable[[str], bool] = lambda source: True
        self.error: Exception | None = None

    def hold(self, slow: Callable[[str], bool] = lambda source: True) -> None:
        self.slow = slow
        self.may_read.clear()

    def fetch(self, source: str) -> Path:
        self.num_fetches += 1
        if not self.may_read.is_set() and self.slow(source):
            self.reached.release()
            assert self.may_read.wait(60)
        if self.error is not None and self.slow(source):
            raise self.error
        return super().fetch(source)


class Shelf:
    """A store on `num_pages` pages for the adapters in a folder of its own, a copy that tests may break."""

    def __init__(self, origin: Path, root: Path, num_pages: int, host_bytes: int = 1 << 30) -> None:
        self.folder = root / "shelf"
        shutil.copytree(origin, self.folder)
        self.sources = SlowSources(self.folder)
        self.pool = PagePool(linear_base(SHAPES), PageConfig(num_pages + 1, torch.float32, torch.device("cpu")))
        self.evicted: list[str] = []
        self.moved: list[tuple[str, str]] = []
        self.store = AdapterStore(self.pool, self.sources, lambda: 1000.0, host_bytes, self)
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.store.wake_with(lambda: self._wakes.put(None))

    def adapter_moved(self, tier: str, seconds: float, outcome: str) -> None:
        self.moved.append((tier, outcome))

    def adapter_evicted(self, tier: str) -> None:
        self.evicted.append(tier)

    def source(self, folder: str) -> str:
        return f"file:{self.folder / folder}"

    def create(self, name: str, folder: str | None = None, *, pinned: bool = False) -> AdapterInfo:
        return self.store.create(NewAdapter(name, self.source(folder or name), pinned=pinned))

    def states(self) -> dict[str, str]:
        return {info.name: info.state.value for info in self.store.list()}

    def wait(self) -> None:
        """Until something moved."""
        self._wakes.get(timeout=60)

    def settle(self) -> None:
        """Until nothing moves."""
        while self.store.is_moving:
            self.wait()


def equally(names: Iterable[str]) -> list[tuple[str, float]]:
    """Adapters of one request, each with its whole weight."""
    return [(name, 1.0) for name in names]
