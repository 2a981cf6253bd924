"""What the outputs of a sequence classifier's head stand for: transformers' `config.json` beside the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from weft.adapters.json_files import read_object, shown
from weft.errors import InvalidAdapter, Problem

CLASSES_FILE = "config.json"
MAX_LABEL_CHARACTERS = 256
_SHOWN_LABELS = 16


class ProblemType(Enum):
    """How scores come of logits; the names are transformers'.

    SINGLE_LABEL: a softmax over all. MULTI_LABEL: a sigmoid of each. REGRESSION: the logits are what was asked for.
    """

    SINGLE_LABEL = "single_label_classification"
    MULTI_LABEL = "multi_label_classification"
    REGRESSION = "regression"


@dataclass(frozen=True, slots=True)
class Classes:
    """The labels of a head's outputs, in its order."""

    labels: tuple[str, ...]
    problem_type: ProblemType

    def __str__(self) -> str:
        shown_labels = ", ".join([*self.labels[:_SHOWN_LABELS], *["…"] * (len(self.labels) > _SHOWN_LABELS)])
        return f"{self.problem_type.value} of {len(self.labels)}: {shown_labels}"


def read_classes(folder: Path, source: str, num_labels: int) -> Classes:
    """num_labels: outputs of the head. Raises InvalidAdapter where the file says what can't be so of it.

    Without the file, or without names in it, labels are LABEL_0, LABEL_1, … as transformers names them.
    """
    path = folder / CLASSES_FILE
    return to_classes(read_object(path, source) if path.exists() else {}, source, num_labels)


def to_classes(raw: Mapping[str, Any], source: str, num_labels: int) -> Classes:
    """As `read_classes`, of what the file holds."""
    problems: list[Problem] = []
    labels = _labels(raw, num_labels, problems)
    problem_type = _problem_type(raw, num_labels, problems)
    if problems:
        raise InvalidAdapter(source, problems)
    return Classes(labels, problem_type)


def _labels(raw: Mapping[str, Any], num_labels: int, problems: list[Problem]) -> tuple[str, ...]:
    def refuse(field: str, words: str) -> None:
        problems.append(Problem(f"{CLASSES_FILE}: {field}", words))

    count = raw.get("num_labels")
    if count is not None and (type(count) is not int or count != num_labels):
        refuse("num_labels", f"is {shown(count)}; the head has {num_labels} outputs")
    names = raw.get("id2label")
    if names is None:
        return tuple(f"LABEL_{index}" for index in range(num_labels))
    if not isinstance(names, dict) or {*names} != {str(index) for index in range(num_labels)}:
        given = f"{len(names)} keys" if isinstance(names, dict) else shown(names)
        refuse("id2label", f"has {given}; must name the head's {num_labels} outputs, from 0 to {num_labels - 1}")
        return ()
    labels = tuple(names[str(index)] for index in range(num_labels))
    for label in labels:
        if not isinstance(label, str) or not label or not label.isprintable() or len(label) > MAX_LABEL_CHARACTERS:
            words = f"must be printable, and 1 to {MAX_LABEL_CHARACTERS} characters long"
            refuse("id2label", f"holds {shown(label)}, which is no label: it {words}")
            return ()
    twins = sorted({label for label in labels if labels.count(label) > 1})
    if twins:
        refuse("id2label", f"names several outputs {shown(twins[0])}: give each its own label")
    return labels


def _problem_type(raw: Mapping[str, Any], num_labels: int, problems: list[Problem]) -> ProblemType:
    """As transformers takes it: one output is a regression where nothing else is said."""
    given = raw.get("problem_type")
    if given is None:
        return ProblemType.REGRESSION if num_labels == 1 else ProblemType.SINGLE_LABEL
    known = {problem_type.value: problem_type for problem_type in ProblemType}
    found = known.get(given) if isinstance(given, str) else None
    where = f"{CLASSES_FILE}: problem_type"
    if found is None:
        problems.append(Problem(where, f"is {shown(given)}; must be one of {', '.join(known)}"))
    elif found is ProblemType.SINGLE_LABEL and num_labels == 1:
        problems.append(Problem(where, f"is {given}, and the head has one output, so that nothing is to choose"))
    return found or ProblemType.SINGLE_LABEL
