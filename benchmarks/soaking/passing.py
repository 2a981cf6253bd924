"""Adapters that are loaded, updated and deleted while a soak goes on."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
from soaking.clients import OPTIONS, PATIENCE_S

from weft.v1 import adapter_pb2, adapter_pb2_grpc

NAMES = tuple(f"passing-{number}" for number in range(6))
EVERY_S = 0.05

_CODE = grpc.StatusCode
_EXPECTED: Mapping[str, tuple[grpc.StatusCode, ...]] = {
    "created": (_CODE.ALREADY_EXISTS,),
    "updated": (_CODE.NOT_FOUND,),
    "relabelled": (_CODE.NOT_FOUND,),
    "deleted": (_CODE.NOT_FOUND,),
    "refused": (_CODE.FAILED_PRECONDITION, _CODE.ALREADY_EXISTS, _CODE.INVALID_ARGUMENT),
}
"""What each change may be refused with: names are drawn at random, so that some are taken and some are gone."""


_CHANGES = (*["created"] * 4, *["updated"] * 3, *["deleted"] * 2, "relabelled", "refused")


@dataclass
class Passing:
    """Changes the adapters of NAMES again and again, to and from these sources, until `stop`.

    patience_s: a change that has no end by then is lost.
    """

    address: str
    sources: Sequence[str]
    seed: int
    patience_s: float = PATIENCE_S
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._over = asyncio.Event()

    def stop(self) -> None:
        self._over.set()

    def go_on(self) -> None:
        """Let it run once more."""
        self._over.clear()

    async def run(self) -> None:
        """Until `stop`; then none of them is left."""
        async with grpc.aio.insecure_channel(self.address, OPTIONS) as channel:
            stub = adapter_pb2_grpc.AdapterServiceStub(channel)
            while not self._over.is_set():
                await self._change(stub)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._over.wait(), EVERY_S)
            for name in NAMES:
                with suppress(grpc.aio.AioRpcError):
                    await stub.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=name))

    async def _change(self, stub: Any) -> None:
        kind = self._rng.choice(_CHANGES)
        name, source = self._rng.choice(NAMES), self._rng.choice(self.sources)
        try:
            async with asyncio.timeout(self.patience_s):
                await self._make(stub, kind, name, source)
        except TimeoutError:
            self.wrong.append(f"an adapter was not {kind}: no end after {self.patience_s:g} s")
        except grpc.aio.AioRpcError as error:
            if error.code() not in _EXPECTED[kind]:
                self.wrong.append(f"an adapter was not {kind}: {error.code().name}: {error.details()}")
        else:
            self.done[f"adapters {kind}"] += 1

    async def _make(self, stub: Any, kind: str, name: str, source: str) -> None:
        adapter = {"name": name, "source": source}
        match kind:
            case "created":
                await stub.CreateAdapter(adapter_pb2.CreateAdapterRequest(adapter=adapter, wait=True))
            case "updated":
                await stub.UpdateAdapter(_update("source", **adapter))
            case "relabelled":
                labels = {"turn": str(self._rng.random())}
                await stub.UpdateAdapter(_update("labels", name=name, labels=labels))
            case "deleted":
                await stub.DeleteAdapter(adapter_pb2.DeleteAdapterRequest(name=name))
            case _:
                elsewhere = {"name": name, "source": self._rng.choice(["file:/etc", f"{source}-is-not-there"])}
                await stub.CreateAdapter(adapter_pb2.CreateAdapterRequest(adapter=elsewhere, wait=True))


def _update(path: str, **adapter: Any) -> adapter_pb2.UpdateAdapterRequest:
    return adapter_pb2.UpdateAdapterRequest(adapter=adapter, update_mask={"paths": [path]})
