"""JSON schemas before they are compiled: what would be ignored is refused, and so is what nothing can match.

The compiler takes keywords that it doesn't know for annotations. Here each keyword is either honoured by it, an
annotation by the specification (JSON Schema 2020-12, sections 8 and 9 of the validation part), or refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from weft.server.engine.regexes import check_regex

Schema = dict[str, Any]

MAX_DEPTH = 4096
"""Schemas inside each other, those behind references included: as deep as the compiler may have to go at once."""

_MAX_LEVELS = 128
_TOO_DEEP = f"is nested too deeply; at most {_MAX_LEVELS} schemas inside each other are taken"

_ONE = frozenset({"additionalProperties", "items", "additionalItems"})
_MANY = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_PLAIN = frozenset(
    {
        *("$ref", "$id", "$anchor", "$schema", "const", "enum", "type", "required", "pattern", "format"),
        *("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength"),
        *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    }
)
_ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly"),
        *("contentMediaType", "contentEncoding", "contentSchema"),
    }
)
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f]")
_CONTROL_RANGE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})-\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4})")
_CONTROL_ESCAPE = re.compile(
    r"(?<!\\)(?:\\\\)*\\(?:[av0]|c[A-Za-z]|(?:x|u00|x\{0*|u\{0*)(?:0?[0-7bBeEfF]|1[0-9a-fA-F])(?![0-9a-fA-F]))"
)


class InvalidSchema(ValueError):
    """Says where in the schema and what."""

    def __init__(self, pointer: str, reason: str) -> None:
        super().__init__(f"{f'at {pointer}: ' if pointer else ''}{reason}")


def parse_schema(text: str) -> Any:
    """The schema as Python values. Raises InvalidSchema for text that is no JSON, or not the same to every reader."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise InvalidSchema("", _TOO_DEEP) from None
    except InvalidSchema:
        raise
    except ValueError as error:
        raise InvalidSchema("", f"is not JSON: {error}") from None


def check_schema(schema: Any) -> None:
    """Raises InvalidSchema for what the compiler would ignore, what is too deep, and what has no finite value."""
    nodes = _visit(schema)
    heights: dict[str, int] = {}
    for pointer, node in reversed(nodes.items()):  # children come after their parents
        heights[pointer] = 1
        if isinstance(node, dict):
            _check_keywords(node, pointer)
            heights[pointer] += max((heights[child] for child, _ in _children(node, pointer)), default=0)
    references = {pointer: node["$ref"] for pointer, node in nodes.items() if isinstance(node, dict) and "$ref" in node}
    one_document = not any(pointer and isinstance(node, dict) and "$id" in node for pointer, node in nodes.items())
    targets = {
        pointer: _target(reference, pointer, nodes) if one_document else None
        for pointer, reference in references.items()
    }
    depth = heights[""] + sum(heights[""] if target is None else heights[target] for target in set(targets.values()))
    if not one_document or None in targets.values():
        depth = heights[""] * (1 + len(set(references.values())))
    if depth > MAX_DEPTH:
        raise InvalidSchema("", f"is up to {depth} schemas deep, references included; at most {MAX_DEPTH} are taken")
    if one_document and not _is_finite(nodes, targets):
        raise InvalidSchema("", "refers to itself without an end: no value matches it")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for name, value in pairs:
        if name in items:
            raise InvalidSchema("", f"has the key {name!r} twice in one object")
        items[name] = value
    return items


def _refuse_constant(name: str) -> None:
    raise InvalidSchema("", f"is not JSON: {name} is no JSON number")


def _visit(root: Any) -> dict[str, Any]:
    """Every schema by its JSON pointer, the root's is empty; parents first."""
    nodes: dict[str, Any] = {}
    pending = [("", root, 1)]
    while pending:
        pointer, node, level = pending.pop()
        if level > _MAX_LEVELS:
            raise InvalidSchema("", _TOO_DEEP)
        if not isinstance(node, dict | bool):
            raise InvalidSchema(pointer, "must be an object or a boolean")
        nodes[pointer] = node
        if isinstance(node, dict):
            pending += [(at, child, level + 1) for at, child in _children(node, pointer)]
    return nodes


def _children(node: Schema, pointer: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        at = f"{pointer}/{key}"
        if key in _NAMED and isinstance(value, dict):
            yield from ((f"{at}/{_escaped(name)}", child) for name, child in value.items())
        elif (key in _MANY or key == "items") and isinstance(value, list):
            yield from ((f"{at}/{index}", child) for index, child in enumerate(value))
        elif key in _ONE:
            yield at, value


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
"""Reads JSON that is the same to every reader; raises InvalidSchema for other, and what json raises."""


def _target(reference: Any, pointer: str, nodes: dict[str, Any]) -> str | None:
    """The pointer that a reference means; None for one by name, which the compiler resolves or refuses."""
    if not isinstance(reference, str):
        raise InvalidSchema(f"{pointer}/$ref", "must be a string")
    if reference != "#" and not reference.startswith("#/"):
        return None
    target = unquote(reference[1:])
    if target not in nodes:
        raise InvalidSchema(f"{pointer}/$ref", f"is {reference!r}, where no schema is")
    return target


def _check_keywords(node: Schema, pointer: str) -> None:
    for key, value in node.items():
        if key in _NAMED and not isinstance(value, dict):
            raise InvalidSchema(f"{pointer}/{key}", "must be an object")
        if key in _MANY and not isinstance(value, list):
            raise InvalidSchema(f"{pointer}/{key}", "must be an array")
        known = key in _ONE or key in _MANY or key in _NAMED or key in _PLAIN or key in _ANNOTATIONS
        if not known and (not key.startswith("x-") or key == "x-guidance"):
            raise InvalidSchema(pointer, f"has the keyword {key!r}, which is not supported")
    if "additionalItems" in node and not isinstance(node.get("items"), list):
        raise InvalidSchema(pointer, "has additionalItems without an array of items, where it means nothing")
    _check_min_properties(node, pointer)
    _check_characters(node, pointer)
    _check_patterns(node, pointer)


def _check_min_properties(node: Schema, pointer: str) -> None:
    """Keys that the schema doesn't list may come twice in the grammar, and count once in the value."""
    least = node.get("minProperties", 0)
    required = node.get("required", [])
    if isinstance(least, int) and least > 1 and least > (len(set(required)) if isinstance(required, list) else 0):
        raise InvalidSchema(
            f"{pointer}/minProperties", f"is {least}; above 1 it is supported only where as many keys are required"
        )


def _check_characters(node: Schema, pointer: str) -> None:
    r"""JSON writes most control characters only as \u escapes, which answers don't have."""
    named = [node.get("const"), node.get("enum"), node.get("required"), [*node.get("properties", ())]]
    patterns = [node.get("pattern"), *node.get("patternProperties", ())]
    texts = [*_texts(named), *(text for text in patterns if isinstance(text, str))]
    if any(_CONTROL.search(text) for text in texts) or any(
        _CONTROL_ESCAPE.search(_CONTROL_RANGE.sub("", text)) for text in patterns if isinstance(text, str)
    ):
        raise InvalidSchema(pointer, "names a control character that JSON can't write without a \\u escape")


def _check_patterns(node: Schema, pointer: str) -> None:
    for text in (node.get("pattern"), *node.get("patternProperties", ())):
        if isinstance(text, str):
            try:
                check_regex(text)
            except ValueError as error:
                raise InvalidSchema(pointer, f"has a pattern that {error}") from None


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, dict):
            pending += [*item, *item.values()]


def _is_finite(nodes: dict[str, Any], targets: dict[str, str | None]) -> bool:
    """Whether some finite value may match: false only where every way to build one leads through itself for ever.

    The least fixed point: a schema has a finite value once one of each of its needs has.
    """
    needs = {pointer: _needs(node, pointer, targets.get(pointer)) for pointer, node in nodes.items()}
    users: dict[str, list[tuple[str, int]]] = {}
    for pointer, groups in needs.items():
        for index, group in enumerate(groups):
            for member in group:
                users.setdefault(member, []).append((pointer, index))
    unmet = {pointer: set(range(len(groups))) for pointer, groups in needs.items()}
    ready = [pointer for pointer, groups in unmet.items() if not groups]
    while ready:
        for pointer, index in users.get(ready.pop(), ()):
            if index in unmet[pointer]:
                unmet[pointer].remove(index)
                if not unmet[pointer]:
                    ready.append(pointer)
    return not unmet[""]


def _needs(node: Any, pointer: str, target: str | None) -> list[list[str]]:
    """Groups of schemas; a value can't be built before one of each group has a value."""
    if not isinstance(node, dict):
        return []
    groups = [[f"{pointer}/allOf/{index}"] for index in range(len(node.get("allOf", ())))]
    if target is not None:
        groups.append([target])
    groups += [
        [f"{pointer}/{key}/{index}" for index in range(len(node[key]))] for key in ("anyOf", "oneOf") if key in node
    ]
    if node.get("type") == "object":
        groups += [[child] for child in _required(node, pointer)]
    if node.get("type") == "array":
        groups += [[child] for child in _least_items(node, pointer)]
    return groups


def _required(node: Schema, pointer: str) -> Iterator[str]:
    properties, required = node.get("properties", {}), node.get("required", ())
    for name in required if isinstance(required, list) else ():
        if isinstance(name, str) and name in properties:
            yield f"{pointer}/properties/{_escaped(name)}"
        elif "additionalProperties" in node and "patternProperties" not in node:
            yield f"{pointer}/additionalProperties"


def _least_items(node: Schema, pointer: str) -> Iterator[str]:
    least, prefix = node.get("minItems", 0), node.get("prefixItems", ())
    if isinstance(least, int):
        yield from (f"{pointer}/prefixItems/{index}" for index in range(min(least, len(prefix))))
        if least > len(prefix) and isinstance(node.get("items"), dict):
            yield f"{pointer}/items"
