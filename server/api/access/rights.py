"""Which adapters a caller may use and know of.

A name that it has no right to is refused in the same words, and after the same work, whether or not there is such an
adapter. Rights are checked on the names that will be served, just before they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from weft.adapters.locations import without_secrets
from weft.adapters.names import what_was_meant
from weft.adapters.records import AdapterChange, Allow, NewAdapter
from weft.errors import AdapterNotFound, PermissionDenied
from weft.server.api.callers import Caller, current_caller


@dataclass(frozen=True, slots=True)
class Rights:
    """Of whoever calls. labels_of: an adapter's labels, none where there is no such adapter."""

    labels_of: Callable[[str], Mapping[str, str]]

    def check_mix(self, adapter_ids: Iterable[str]) -> None:
        """Raises PermissionDenied unless all may be used; without any, the base."""
        caller, is_base = current_caller.get(), True
        for adapter_id in adapter_ids:
            self._check(caller, adapter_id, adapter_id.partition("@")[0])
            is_base = False
        if is_base and not caller.base:
            raise PermissionDenied(f"caller {caller.name!r} may not use the base without an adapter")

    def check_name(self, name: str) -> None:
        """Raises PermissionDenied."""
        self._check(current_caller.get(), name, name)

    def check_new(self, new: NewAdapter) -> None:
        """By its name alone, for who may choose labels could choose any. Raises PermissionDenied."""
        caller = current_caller.get()
        if not caller.may_name(new.name):
            raise _denied(caller, new.name)
        self.check_source(new.source)

    def check_change(self, name: str, change: AdapterChange) -> None:
        """Raises PermissionDenied, also where the caller would lose its own right."""
        self.check_name(name)
        caller = current_caller.get()
        if change.source is not None:
            self.check_source(change.source)
        if change.labels is not None and not caller.may_use(name, change.labels):
            raise PermissionDenied(f"caller {caller.name!r} may not take the labels away that it goes by")

    def still(self, name: str) -> Allow:
        """For when the change is made: by then somebody else may have given the adapter other labels."""
        caller = current_caller.get()

        def check(labels: Mapping[str, str]) -> None:
            if not caller.may_use(name, labels):
                raise _denied(caller, name)

        return check

    def check_source(self, source: str) -> None:
        """Raises PermissionDenied, before anything is looked at."""
        caller = current_caller.get()
        if not caller.may_load(source):
            raise PermissionDenied(f"caller {caller.name!r} may not use the source {without_secrets(source)!r}")

    def _check(self, caller: Caller, adapter_id: str, name: str) -> None:
        if not caller.may_name(name) and not (caller.labels and caller.may_use(name, self.labels_of(name))):
            raise _denied(caller, adapter_id)


def concealed(error: AdapterNotFound, caller: Caller) -> AdapterNotFound:
    """The error with a hint that goes by the adapters alone that the caller may use: others must not show in it."""
    if error.names is None or caller.patterns is None:
        return error
    name = error.adapter_id.partition("@")[0]
    return AdapterNotFound(error.adapter_id, what_was_meant(name, filter(caller.may_name, error.names)))


def _denied(caller: Caller, adapter_id: str) -> PermissionDenied:
    return PermissionDenied(f"caller {caller.name!r} may not use adapter {adapter_id!r}")
