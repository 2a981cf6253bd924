"""The example's data, as JSON lines: `lessons` for the clerk, or `questions`, which leave the answers to a teacher."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from weft.demo.tasks import NOUNS, TRAIN, Split, plural, prompt, seeded, split_of

ANSWERS: Mapping[str, Callable[[str], str]] = {"sign-shop": str.upper, "stock-room": plural}
"""What each file of rules asks for."""


def rules(name: str) -> str:
    """What goes before a question."""
    return (Path(__file__).parent / "rules" / f"{name}.txt").read_text(encoding="utf-8")


def nouns(split: Split) -> list[str]:
    """The demo's nouns of a split, shuffled."""
    found = [noun for noun in NOUNS if split_of(noun) == split]
    seeded("distilling").shuffle(found)
    return found


def lessons() -> Iterator[dict[str, str]]:
    """Each noun under each file of rules, with the right answer."""
    for noun in nouns(TRAIN):
        for name, answer in ANSWERS.items():
            yield {"prompt": rules(name) + prompt(noun), "completion": answer(noun)}


def questions() -> Iterator[dict[str, str]]:
    """Some nouns, without rules and without an answer."""
    for noun in nouns(TRAIN)[:320]:
        yield {"prompt": prompt(noun)}


if __name__ == "__main__":
    for row in {"lessons": lessons, "questions": questions}[sys.argv[1]]():
        print(json.dumps(row))
