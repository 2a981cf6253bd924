"""From the adapters that there are to those that there should be: the steps, and taking them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from weft.server.cli.declared import OWNER_LABEL, Declaration
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc

NUM_AT_ONCE = 4
"""Steps taken at a time: as many as the server downloads at once."""


class Verb(StrEnum):
    """CREATE and the others, as they are written before and after."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"

    @property
    def done(self) -> str:
        return f"{self.value}d"


@dataclass(frozen=True, slots=True)
class Step:
    """One change of one adapter. paths: the fields that an update changes."""

    verb: Verb
    adapter: pb2.Adapter
    paths: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """The name, and what becomes of it."""
        match self.verb:
            case Verb.CREATE:
                return f"{self.adapter.name} from {self.adapter.source}"
            case Verb.UPDATE:
                return f"{self.adapter.name}: {', '.join(map(self._field, self.paths))}"
            case Verb.DELETE:
                return self.adapter.name

    def take(self, stub: adapter_pb2_grpc.AdapterServiceStub) -> None:
        """Return once it is done. Raises grpc.RpcError."""
        match self.verb:
            case Verb.CREATE:
                stub.CreateAdapter(pb2.CreateAdapterRequest(adapter=self.adapter, wait=True))
            case Verb.UPDATE:
                mask = FieldMask(paths=self.paths)
                stub.UpdateAdapter(pb2.UpdateAdapterRequest(adapter=self.adapter, update_mask=mask))
            case Verb.DELETE:
                stub.DeleteAdapter(pb2.DeleteAdapterRequest(name=self.adapter.name))

    def _field(self, path: str) -> str:
        match path:
            case "source":
                return f"source {self.adapter.source}"
            case "pinned":
                return "pinned" if self.adapter.pinned else "not pinned"
            case _:
                return path


def steps_to(declaration: Declaration, there: Mapping[str, pb2.Adapter], owner: str, *, prune: bool) -> list[Step]:
    """Creations, then updates, then deletions: a name that is another's successor is there before that goes."""
    wanted, spared = declaration.wanted, declaration.spared
    created = [Step(Verb.CREATE, adapter) for name, adapter in wanted.items() if name not in there]
    differing = ((adapter, _differing(adapter, there[name])) for name, adapter in wanted.items() if name in there)
    updated = [Step(Verb.UPDATE, adapter, paths) for adapter, paths in differing if paths]
    if not prune or spared is None:
        return [*created, *updated]
    gone = [
        adapter
        for name, adapter in there.items()
        if adapter.labels.get(OWNER_LABEL) == owner and name not in wanted and name not in spared
    ]
    return [*created, *updated, *(Step(Verb.DELETE, adapter) for adapter in gone)]


def take_all(
    steps: Iterable[Step],
    stub: adapter_pb2_grpc.AdapterServiceStub,
    describe: Callable[[grpc.RpcError], str],
) -> Iterator[tuple[Step, str]]:
    """Take each step, some at a time, whatever becomes of the others; each with what went wrong, "" for nothing."""

    def take(step: Step) -> tuple[Step, str]:
        try:
            step.take(stub)
        except grpc.RpcError as error:
            return step, describe(error)
        return step, ""

    pool = ThreadPoolExecutor(NUM_AT_ONCE, thread_name_prefix="weft-sync")
    try:
        yield from pool.map(take, steps)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # the channel's end cancels what goes on


def _differing(wanted: pb2.Adapter, there: pb2.Adapter) -> tuple[str, ...]:
    """The fields to change; the source of one that failed, too, so that it is read again."""
    differs = {
        "source": wanted.source != there.source or there.state == pb2.ADAPTER_STATE_FAILED,
        "labels": dict(wanted.labels) != dict(there.labels),
        "pinned": wanted.pinned != there.pinned,
    }
    return tuple(path for path, is_so in differs.items() if is_so)
