"""The example's data, as JSON lines: `lessons` for the clerk, and `questions`, which leave the answers to a teacher."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from weft.demo.tasks import NOUNS, TRAIN, plural, prompt, reverse, seeded, split_of

ANSWERS: dict[str, Callable[[str], str]] = {"sign-shop": str.upper, "stock-room": plural, "printer": reverse}
"""What each file of rules asks for."""
RULES = Path(__file__).parent / "rules"


def nouns() -> list[str]:
    """The nouns to train on, shuffled; the others are kept back."""
    found = [noun for noun in NOUNS if split_of(noun) == TRAIN]
    seeded("distilling").shuffle(found)
    return found


def lessons() -> Iterator[dict[str, str]]:
    """Each noun under each file of rules, with the right answer."""
    for noun in nouns():
        for name, answer in ANSWERS.items():
            rules = (RULES / f"{name}.txt").read_text(encoding="utf-8")
            yield {"prompt": rules + prompt(noun), "completion": answer(noun)}


def questions() -> Iterator[dict[str, str]]:
    """Each noun, without rules and without an answer."""
    for noun in nouns():
        yield {"prompt": prompt(noun)}


for row in {"lessons": lessons, "questions": questions}[sys.argv[1]]():
    print(json.dumps(row))
