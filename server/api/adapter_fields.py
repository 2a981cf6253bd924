"""What requests to AdapterService say -> what the store takes, or every violation at once."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from weft.adapters.names import MAX_NAME_CHARACTERS
from weft.adapters.records import AdapterChange, AdapterInfo, NewAdapter
from weft.errors import InvalidRequest, Problem
from weft.server.api.callers import ANYBODY, Caller, current_caller
from weft.server.api.resources import STATES
from weft.server.api.violations import Violations
from weft.v1 import adapter_pb2 as pb2

MAX_LABELS = 64
MAX_LABEL_CHARACTERS = 256
MAX_MASK_PATHS = 64

_MUTABLE = ("source", "pinned", "labels")
_SET_BY_CLIENT = frozenset({"name", *_MUTABLE})


@dataclass(frozen=True, slots=True)
class AdapterFilter:
    """Which adapters are asked for: those that match all of it. state: of `weft.v1`; unspecified, any.

    caller: who asks, and is told of no other adapters than it may use.
    """

    state: int
    labels: Mapping[str, str]
    name_prefix: str
    caller: Caller = ANYBODY

    def matches(self, info: AdapterInfo) -> bool:
        return (
            self.state in (pb2.ADAPTER_STATE_UNSPECIFIED, STATES[info.state])
            and info.name.startswith(self.name_prefix)
            and all(info.labels.get(key) == value for key, value in self.labels.items())
            and self.caller.may_use(info.name, info.labels)
        )


def to_filter(request: pb2.ListAdaptersRequest | pb2.WatchAdaptersRequest, violations: Violations) -> AdapterFilter:
    """Notes what is wrong with it."""
    if request.state not in pb2.AdapterState.values():
        violations.add("state", f"is {request.state}, which is no state that this server knows")
    _check_length(request.name_prefix, "name_prefix", violations)
    labels = _labels(request.labels, "labels", violations)
    return AdapterFilter(request.state, labels, request.name_prefix, current_caller.get())


def to_new_adapter(adapter: pb2.Adapter) -> NewAdapter:
    """Raises InvalidRequest with every violation but those of a name's or a source's form, which the store knows."""
    violations = Violations()
    for name in ("name", "source"):
        if not getattr(adapter, name):
            violations.add(f"adapter.{name}", "is empty; it is required")
    for name in _set_by_server(adapter):
        violations.add(f"adapter.{name}", "is set by the server; leave it unset")
    labels = _labels(adapter.labels, "adapter.labels", violations)
    violations.raise_any()
    return NewAdapter(adapter.name, adapter.source, labels, adapter.pinned)


def to_change(request: pb2.UpdateAdapterRequest) -> AdapterChange:
    """Raises InvalidRequest with every violation but those of a source's form, which the store knows."""
    violations = Violations()
    adapter = request.adapter
    _check_name(adapter.name, "adapter.name", violations)
    paths = _masked(request, violations)
    labels = _labels(adapter.labels, "adapter.labels", violations) if "labels" in paths else None
    if "source" in paths and not adapter.source:
        violations.add("adapter.source", "is empty, and update_mask names it; give one")
    violations.raise_any()
    return AdapterChange(
        source=adapter.source if "source" in paths else None,
        labels=labels,
        pinned=adapter.pinned if "pinned" in paths else None,
    )


def to_name(request: pb2.GetAdapterRequest | pb2.DeleteAdapterRequest) -> str:
    """Raises InvalidRequest for what can be no adapter's."""
    violations = Violations()
    _check_name(request.name, "name", violations)
    violations.raise_any()
    return request.name


def page_token(last_name: str) -> str:
    """What asks for the page after the one that ends with this name."""
    return base64.urlsafe_b64encode(last_name.encode()).decode()


def page_start(token: str, violations: Violations) -> str:
    """The name that the page before ended with; "" for the first page."""
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        violations.add("page_token", "is not one that this server gave; start again without it")
        return ""


def renamed(error: InvalidRequest, path: str) -> InvalidRequest:
    """The store's refusal of a source, for a request that has it in another field than `adapter.source`."""
    return InvalidRequest([Problem(path, problem.description) for problem in error.problems])


def _masked(request: pb2.UpdateAdapterRequest, violations: Violations) -> frozenset[str]:
    """The fields to change. Without a mask those that are set, as AIP-134 has it."""
    given = request.update_mask.paths
    if not given:
        for name in _set_by_server(request.adapter):
            violations.add(f"adapter.{name}", "is set by the server; leave it unset, or name others in update_mask")
        implied = frozenset(field.name for field, _ in request.adapter.ListFields()).intersection(_MUTABLE)
        if not implied:
            violations.add("update_mask", f"is empty, and none of {', '.join(_MUTABLE)} is set: nothing would change")
        return implied
    if list(given) == ["*"]:
        return frozenset(_MUTABLE)
    if violations.fits(given, "update_mask.paths", MAX_MASK_PATHS):
        for index, path in enumerate(given):
            if path not in _MUTABLE:
                violations.add(f"update_mask.paths[{index}]", f"is {path[:200]!r}, {_why_not(path)}")
    return frozenset(given)


def _why_not(path: str) -> str:
    """What is wrong with a path of a mask."""
    if path == "name":
        return "which can't be changed"
    if path == "*":
        return "which stands for all that can be changed: give no other path beside it"
    if path in pb2.Adapter.DESCRIPTOR.fields_by_name:
        return "which is set by the server"
    return f"which names nothing that can be changed; must be one of {', '.join(_MUTABLE)}"


def _set_by_server(adapter: pb2.Adapter) -> Iterator[str]:
    """The fields that a client has set and may not."""
    return (field.name for field, _ in adapter.ListFields() if field.name not in _SET_BY_CLIENT)


def _labels(given: Mapping[str, str], path: str, violations: Violations) -> dict[str, str]:
    labels = dict(given) if violations.fits(given, path, MAX_LABELS) else {}
    for key, value in labels.items():
        if not key or not (key + value).isprintable() or max(len(key), len(value)) > MAX_LABEL_CHARACTERS:
            violations.add(
                f"{path}[{key[:MAX_LABEL_CHARACTERS]!r}]",
                f"must have a key that is not empty, and in key and value at most {MAX_LABEL_CHARACTERS} characters, "
                "all printable",
            )
    return labels


def _check_name(name: str, path: str, violations: Violations) -> None:
    if not name:
        violations.add(path, "is empty; name an adapter")
    _check_length(name, path, violations)


def _check_length(name: str, path: str, violations: Violations) -> None:
    if len(name) > MAX_NAME_CHARACTERS:
        violations.add(path, f"has {len(name)} characters; no adapter's name has more than {MAX_NAME_CHARACTERS}")
