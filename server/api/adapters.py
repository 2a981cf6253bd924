"""AdapterService: adapters as resources."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.timestamp_pb2 import Timestamp

from weft.adapters.store import AdapterInfo, AdapterState, AdapterStore, NewAdapter
from weft.errors import InvalidRequest
from weft.server.api.edge import Context
from weft.server.api.loading import AdapterLoader
from weft.server.api.translation import MAX_ADAPTER_ID_CHARACTERS, Range, Violations
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_LABELS = 64
MAX_LABEL_CHARACTERS = 256

_SET_BY_CLIENT = frozenset({"name", "source", "pinned", "labels"})
_STATES = {
    AdapterState.LOADING: pb2.ADAPTER_STATE_LOADING,
    AdapterState.DISK: pb2.ADAPTER_STATE_DISK,
    AdapterState.HOST: pb2.ADAPTER_STATE_HOST,
    AdapterState.DEVICE: pb2.ADAPTER_STATE_DEVICE,
    AdapterState.FAILED: pb2.ADAPTER_STATE_FAILED,
}


@dataclass(frozen=True, slots=True)
class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    """Answers from the store; loads through the loader."""

    store: AdapterStore
    loader: AdapterLoader

    async def CreateAdapter(self, request: pb2.CreateAdapterRequest, context: Context) -> pb2.CreateAdapterResponse:
        new = to_new_adapter(request.adapter)
        info = await self.loader.create(new) if request.wait else await self.loader.start(new)
        return pb2.CreateAdapterResponse(adapter=to_message(info))

    async def GetAdapter(self, request: pb2.GetAdapterRequest, context: Context) -> pb2.GetAdapterResponse:
        return pb2.GetAdapterResponse(adapter=to_message(self.store.get(_name(request))))

    async def ListAdapters(self, request: pb2.ListAdaptersRequest, context: Context) -> pb2.ListAdaptersResponse:
        violations = Violations()
        page_size = violations.number(request, "page_size", DEFAULT_PAGE_SIZE, Range(1, MAX_PAGE_SIZE))
        if request.state not in pb2.AdapterState.values():
            violations.add("state", f"is {request.state}, which is no state that this server knows")
        after = _after(request.page_token, violations)
        violations.raise_any()
        matching = [
            info
            for info in self.store.list()
            if info.name > after and request.state in (pb2.ADAPTER_STATE_UNSPECIFIED, _STATES[info.state])
        ]
        page = matching[:page_size]
        return pb2.ListAdaptersResponse(
            adapters=[to_message(info) for info in page],
            next_page_token=_page_token(page) if len(matching) > len(page) else "",
        )

    async def DeleteAdapter(self, request: pb2.DeleteAdapterRequest, context: Context) -> pb2.DeleteAdapterResponse:
        return pb2.DeleteAdapterResponse(adapter=to_message(await self.loader.delete(_name(request))))


def to_new_adapter(adapter: pb2.Adapter) -> NewAdapter:
    """Raises InvalidRequest with every violation but those of a name's or a source's form, which the store knows."""
    violations = Violations()
    for name in ("name", "source"):
        if not getattr(adapter, name):
            violations.add(f"adapter.{name}", "is empty; it is required")
    for descriptor, _ in adapter.ListFields():
        if descriptor.name not in _SET_BY_CLIENT:
            violations.add(f"adapter.{descriptor.name}", "is set by the server; leave it unset")
    labels = dict(adapter.labels) if violations.fits(adapter.labels, "adapter.labels", MAX_LABELS) else {}
    for key, value in labels.items():
        if not key or max(len(key), len(value)) > MAX_LABEL_CHARACTERS:
            violations.add(
                f"adapter.labels[{key!r}]",
                f"must have a key that is not empty, and at most {MAX_LABEL_CHARACTERS} characters in key and value",
            )
    violations.raise_any()
    return NewAdapter(adapter.name, adapter.source, labels, adapter.pinned)


def to_message(info: AdapterInfo) -> pb2.Adapter:
    """A snapshot as a resource."""
    return pb2.Adapter(
        name=info.name,
        source=info.source,
        digest=info.digest,
        state=_STATES[info.state],
        ranks=info.ranks,
        modules=_module_names(info.modules),
        device_bytes=info.device_bytes,
        disk_bytes=info.disk_bytes,
        pinned=info.pinned,
        labels=info.labels,
        error=info.error,
        create_time=_timestamp(info.created_s),
        last_used_time=_timestamp(info.last_used_s),
        requests_in_flight=info.num_in_flight,
    )


def _module_names(paths: Sequence[str]) -> list[str]:
    """`model.layers.0.self_attn.q_proj`, … as `q_proj`, each once."""
    return sorted({path.rpartition(".")[2] for path in paths})


def _timestamp(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(seconds * 1e9))
    return timestamp


def _name(request: pb2.GetAdapterRequest | pb2.DeleteAdapterRequest) -> str:
    if not request.name:
        raise InvalidRequest.of("name", "is empty; name an adapter")
    if len(request.name) > MAX_ADAPTER_ID_CHARACTERS:
        raise InvalidRequest.of(
            "name", f"has {len(request.name)} characters; no adapter's has more than {MAX_ADAPTER_ID_CHARACTERS}"
        )
    return request.name


def _page_token(page: Sequence[AdapterInfo]) -> str:
    return base64.urlsafe_b64encode(page[-1].name.encode()).decode()


def _after(token: str, violations: Violations) -> str:
    """The name that the page before ended with; "" for the first page."""
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        violations.add("page_token", "is not one that this server gave; start again without it")
        return ""
