"""AdapterService: adapters as resources."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from weft.adapters.report import AdapterReport
from weft.adapters.store import AdapterStore
from weft.errors import InvalidRequest
from weft.server.api.access.rights import Rights
from weft.server.api.adapter_fields import (
    page_start,
    page_token,
    renamed,
    to_change,
    to_filter,
    to_name,
    to_new_adapter,
)
from weft.server.api.callers import current_caller
from weft.server.api.edge import Context
from weft.server.api.loading import AdapterLoader
from weft.server.api.planning import to_plan, to_wanted
from weft.server.api.resources import EVENT_KINDS, to_message, to_report
from weft.server.api.violations import Range, Violations
from weft.server.api.watching import Watchers
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000


class AdapterServicer(adapter_pb2_grpc.AdapterServiceServicer):
    """Answers from the store; loads through the loader, and ends the watches when that drains."""

    def __init__(self, store: AdapterStore, loader: AdapterLoader, rights: Rights) -> None:
        self.store = store
        self.loader = loader
        self.rights = rights
        self.watchers = Watchers(store)
        loader.when_draining(self.watchers.close)

    async def CreateAdapter(self, request: pb2.CreateAdapterRequest, context: Context) -> pb2.CreateAdapterResponse:
        new = to_new_adapter(request.adapter)
        self.rights.check_new(new)
        info = await self.loader.create(new) if request.wait else await self.loader.start(new)
        return pb2.CreateAdapterResponse(adapter=to_message(info))

    async def GetAdapter(self, request: pb2.GetAdapterRequest, context: Context) -> pb2.GetAdapterResponse:
        name = to_name(request)
        self.rights.check_name(name)
        return pb2.GetAdapterResponse(adapter=to_message(self.store.get(name)))

    async def ListAdapters(self, request: pb2.ListAdaptersRequest, context: Context) -> pb2.ListAdaptersResponse:
        violations = Violations()
        page_size = violations.number(request, "page_size", DEFAULT_PAGE_SIZE, Range(1, MAX_PAGE_SIZE))
        wanted = to_filter(request, violations)
        after = page_start(request.page_token, violations)
        violations.raise_any()
        matching = self.store.list(after, page_size + 1, wanted.matches)
        page = matching[:page_size]
        return pb2.ListAdaptersResponse(
            adapters=[to_message(info, in_list=True) for info in page],
            next_page_token=page_token(page[-1].name) if len(matching) > len(page) else "",
        )

    async def UpdateAdapter(self, request: pb2.UpdateAdapterRequest, context: Context) -> pb2.UpdateAdapterResponse:
        change = to_change(request)
        self.rights.check_change(request.adapter.name, change)
        name = request.adapter.name
        return pb2.UpdateAdapterResponse(
            adapter=to_message(await self.loader.update(name, change, self.rights.still(name)))
        )

    async def DeleteAdapter(self, request: pb2.DeleteAdapterRequest, context: Context) -> pb2.DeleteAdapterResponse:
        name = to_name(request)
        self.rights.check_name(name)
        return pb2.DeleteAdapterResponse(adapter=to_message(await self.loader.delete(name, self.rights.still(name))))

    async def WatchAdapters(
        self, request: pb2.WatchAdaptersRequest, context: Context
    ) -> AsyncIterator[pb2.WatchAdaptersResponse]:
        violations = Violations()
        wanted = to_filter(request, violations)
        violations.raise_any()
        async with aclosing(self.watchers.watch(wanted)) as told:
            async for event in told:
                if event is None:
                    yield pb2.WatchAdaptersResponse(kind=pb2.ADAPTER_EVENT_KIND_LISTED)
                else:
                    kind, info = event
                    yield pb2.WatchAdaptersResponse(kind=EVENT_KINDS[kind], adapter=to_message(info))

    async def CheckAdapter(self, request: pb2.CheckAdapterRequest, context: Context) -> pb2.CheckAdapterResponse:
        if not request.source:
            raise InvalidRequest.of("source", "is empty; it is required")
        self.rights.check_source(request.source)
        return pb2.CheckAdapterResponse(report=to_report(await self._inspect(request.source, "source")))

    async def PlanCapacity(self, request: pb2.PlanCapacityRequest, context: Context) -> pb2.PlanCapacityResponse:
        wanted, caller = to_wanted(request), current_caller.get()
        for source in wanted.sources:
            self.rights.check_source(source)
        reports = [await self._inspect(source, f"sources[{i}]") for i, source in enumerate(wanted.sources)]
        present = self.store.list(wanted=lambda info: caller.may_use(info.name, info.labels))
        return to_plan(wanted, reports, present, self.store.capacity(), self.loader.metrics.kv_tokens)

    async def _inspect(self, source: str, path: str) -> AdapterReport:
        """path: of the field that holds the source."""
        try:
            return await self.loader.inspect(source)
        except InvalidRequest as error:
            raise renamed(error, path) from error
