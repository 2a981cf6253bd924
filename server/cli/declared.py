"""The file of `weft sync`: which adapters there should be. TOML, or JSON where its name ends so."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from weft.adapters.names import check_name
from weft.errors import InvalidConfig, InvalidRequest
from weft.v1 import adapter_pb2 as pb2

OWNER_LABEL = "managed-by"
"""Of every adapter that is declared; what bears it and is declared no more may be deleted."""

_KEYS = ("name", "source", "labels", "pinned")


@dataclass(frozen=True, slots=True)
class Declaration:
    """wanted: by name, as they should be. problems: of entries that are left out, a line each.

    spared: names in entries that are left out; None where one's name can't be read, so that it may be anybody's.
    """

    wanted: Mapping[str, pb2.Adapter]
    problems: tuple[str, ...]
    spared: frozenset[str] | None


def read(path: Path, owner: str) -> Declaration:
    """owner: what OWNER_LABEL says. A bad entry keeps no other from being read. Raises InvalidConfig."""
    entries = _entries(path)
    wanted: dict[str, pb2.Adapter] = {}
    problems: list[str] = []
    spared: set[str] | None = set()
    for index, entry in enumerate(entries):
        found = list(_problems(entry))
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and name in wanted:
            found.append(f"{name!r} is declared before: give each name once")
        if not found:
            wanted[name] = _adapter(entry, owner)  # type: ignore[index]  # without problems it is a text
            continue
        problems += [f"{path}: adapters[{index}]: {problem}" for problem in found]
        if not isinstance(name, str):
            spared = None
        elif spared is not None:
            spared.add(name)
    return Declaration(wanted, tuple(problems), None if spared is None else frozenset(spared))


def _entries(path: Path) -> list[Any]:
    is_json = path.suffix == ".json"
    try:
        text = path.read_text(encoding="utf-8")
        raw: Any = json.loads(text) if is_json else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidConfig(f"{path} can't be read as {'JSON' if is_json else 'TOML'} ({reason})") from None
    entries = raw.get("adapters") if isinstance(raw, dict) else None
    if not isinstance(entries, list):
        raise InvalidConfig(f"{path} has no list 'adapters'; an empty one is written adapters = []")
    for key in raw:
        if key != "adapters":
            raise InvalidConfig(f"{path}: {key!r} is no key; there is 'adapters' alone")
    return entries


def _problems(entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"is {entry!r}; must be a table with {', '.join(_KEYS)}"
        return
    for key in entry:
        if key not in _KEYS:
            close = get_close_matches(key, _KEYS, n=1)
            yield f"{key!r} is no key; " + (f"did you mean {close[0]!r}?" if close else f"they are {', '.join(_KEYS)}")
    for key in ("name", "source"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            yield f"{key!r} is {entry[key]!r}; must be a text" if key in entry else f"has no {key!r}"
    if isinstance(entry.get("name"), str):
        try:
            check_name(entry["name"])
        except InvalidRequest as error:
            yield f"'name' {error.problems[0].description}"
    if not isinstance(entry.get("pinned", False), bool):
        yield f"'pinned' is {entry['pinned']!r}; must be true or false"
    labels = entry.get("labels", {})
    if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
        yield f"'labels' is {labels!r}; must be texts by key"
    elif OWNER_LABEL in labels:
        yield f"'labels' holds {OWNER_LABEL!r}, which is set by `weft sync`: leave it out"


def _adapter(entry: Mapping[str, Any], owner: str) -> pb2.Adapter:
    source = entry["source"]
    return pb2.Adapter(
        name=entry["name"],
        source=f"file:{source}" if source.startswith("/") else source,
        labels={**entry.get("labels", {}), OWNER_LABEL: owner},
        pinned=entry.get("pinned", False),
    )
