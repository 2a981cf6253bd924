"""How long adapters take from tier to tier, beside the plain time to read and copy as many bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from report import Samples, table
from shapes import write_adapters

from weft.adapters.pages import HostAdapter, PageConfig, PagePool
from weft.adapters.reading import Policy, Reader
from weft.adapters.sources import Sources
from weft.kernels.native import find_native
from weft.kernels.plan import PAGE_ROWS
from weft.server.config import ModelConfig
from weft.server.engine.kv_blocks import BlockPool
from weft.server.engine.kv_cache import KvCache
from weft.server.engine.model import load_model
from weft.server.engine.parity import AdapterProbe

WEIGHTS = "adapter_model.safetensors"
SETTLING_S = 3.5
"""A server takes files that changed only just now for ones that may change again."""

MOVES = {
    "register": "read, copy",
    "register, probed": "read, copy",
    "disk to host": "read, copy",
    "host to device": "copy",
    "disk to device": "read, copy, copy",
}
"""What is timed, and the plain work that it is held against."""


@dataclass
class Timed:
    """One adapter's moves and the plain work of the same round; seconds."""

    rank: int
    num_bytes: int
    seconds: dict[str, Samples] = field(default_factory=dict)
    plain: dict[str, Samples] = field(default_factory=dict)

    def ratio(self, move: str) -> float:
        return self.seconds[move].median / self.plain[MOVES[move]].median

    def to_json(self) -> dict[str, object]:
        return {
            "rank": self.rank,
            "file_bytes": self.num_bytes,
            "seconds": {name: samples.to_json() for name, samples in self.seconds.items()},
            "plain_seconds": {name: samples.to_json() for name, samples in self.plain.items()},
            "ratios": {move: self.ratio(move) for move in self.seconds},
        }


class Plain:
    """The same bytes read and copied by nobody's rules: into memory that is there already, in one piece."""

    def __init__(self, path: Path, device: torch.device) -> None:
        size = path.stat().st_size
        pinned = device.type == "cuda"
        self._path = path
        self._file = torch.ones(size, dtype=torch.uint8)
        self._host = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
        self._device = torch.ones(size, dtype=torch.uint8, device=device)

    def read(self) -> None:
        with self._path.open("rb", buffering=0) as file:
            view, at = memoryview(self._file.numpy()), 0
            while at < len(view):
                at += file.readinto(view[at:])

    def copy_to_host(self) -> None:
        self._host.copy_(self._file)

    def copy_to_device(self) -> None:
        self._device.copy_(self._host)
        if self._device.is_cuda:
            torch.cuda.synchronize()


class Mover:
    """A page pool on the base, and readers for it, as a server has them."""

    def __init__(self, base: Path, adapters: Path, device: str) -> None:
        model = load_model(ModelConfig(str(base), dtype="float32", device=device), find_native(1))
        self.device = model.device
        self.pool = PagePool(model.base, PageConfig(2 * 64 // PAGE_ROWS + 1, model.dtype, model.device))
        blocks = BlockPool(2, 16)
        cache = KvCache(model.kv_shapes, blocks.num_blocks, blocks.block_tokens, model.dtype, model.device)
        model.attach(cache, self.pool.groups, "torch")
        sources = Sources([adapters])
        self.plain_reader = Reader(self.pool, sources, Policy())
        self.probing_reader = Reader(self.pool, sources, Policy(probe=AdapterProbe(model, "torch")))

    def move(self, source: str, timed: Timed, plain: Plain) -> None:
        """One round: every move and every plain copy once, one after the other."""
        clock = _Clock(timed)
        with clock.of(timed.plain, "read, copy"):
            plain.read()
            plain.copy_to_host()
        with clock.of(timed.plain, "copy"):
            plain.copy_to_device()
        with clock.of(timed.plain, "read, copy, copy"):
            plain.read()
            plain.copy_to_host()
            plain.copy_to_device()
        with clock.of(timed.seconds, "register, probed"):
            self.probing_reader.read(source)
        with clock.of(timed.seconds, "register"):
            host = self.plain_reader.read(source)
        again = clock.run(
            timed.seconds, "disk to host", lambda: self.plain_reader.read_again([source], host.digest, host.recall)
        )
        runs = self.pool.allocate(again)
        with clock.of(timed.seconds, "host to device"):
            self.pool.write(runs, again)
        with clock.of(timed.seconds, "disk to device"):
            self.pool.write(runs, self.plain_reader.read_again([source], host.digest, host.recall))
        self.pool.free(runs)


class _Clock:
    def __init__(self, timed: Timed) -> None:
        self._timed = timed

    @contextmanager
    def of(self, samples: dict[str, Samples], name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        samples.setdefault(name, Samples()).values.append(time.perf_counter() - started)

    def run(self, samples: dict[str, Samples], name: str, work: Callable[[], HostAdapter]) -> HostAdapter:
        with self.of(samples, name):
            return work()


def measure_moves(
    shape: str, ranks: tuple[int, ...], rounds: int, base: Path, folder: Path, device: str
) -> list[Timed]:
    """Adapters of these ranks on all seven linear modules, in turns; the first round only warms up."""
    names: Mapping[str, int] = {f"rank{rank}": rank for rank in ranks}
    write_adapters(shape, folder / "adapters", names)
    mover = Mover(base, folder / "adapters", device)
    paths = {name: folder / "adapters" / name / WEIGHTS for name in names}
    plains = {name: Plain(path, mover.device) for name, path in paths.items()}
    timed: dict[str, Timed] = {}
    time.sleep(SETTLING_S)
    for turn in range(rounds + 1):
        if turn <= 1:
            timed = {name: Timed(rank, paths[name].stat().st_size) for name, rank in names.items()}
        for name, plain in plains.items():
            mover.move(f"file:{folder / 'adapters' / name}", timed[name], plain)
    return list(timed.values())


def show_moves(timed: list[Timed]) -> str:
    head = ["rank (file)", *(f"{move}, ms (÷ {plain})" for move, plain in MOVES.items())]
    rows = [
        [
            f"{each.rank} ({each.num_bytes / 1e6:.1f} MB)",
            *(f"{each.seconds[move].show(1e3)}; {each.ratio(move):.2f}x" for move in MOVES),
        ]
        for each in timed
    ]
    plain = [
        "plain",
        *(f"{', '.join(f'{each.plain[plain].median * 1e3:.1f}' for each in timed)}" for plain in MOVES.values()),
    ]
    return table(head, [*rows, plain])
