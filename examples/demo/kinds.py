"""What the demo's classifier is trained on: short texts, and the kind of each, as `weft train` reads them.

`python -m weft.demo.kinds > kinds.jsonl`, then `weft train --model examples/demo/base --data kinds.jsonl --output kind
--rank 4 --modules q_proj,v_proj --learning-rate 2e-3 --batch-size 32 --max-steps 150`, made the adapter `kind`.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType

import click

from weft.demo.tasks import HELD_OUT, TASKS, TRAIN, Example, Split, seeded

ADAPTER = "kind"
"""The classifier's folder among the adapters."""

KINDS: Mapping[str, str] = MappingProxyType(
    {"date": "iso-date", "number": "roman", "opinion": "sentiment", "phrase": "acronym", "sum": "add", "word": "rot13"}
)
"""Each kind of text, by the task whose inputs are of it."""


def examples(split: Split, num_each: int, seed: int) -> list[Example]:
    """Return as many texts of each kind, shuffled; the answer is the kind. The same ones for the same arguments."""
    found = [
        Example(example.text, kind)
        for kind, task in KINDS.items()
        for example in TASKS[task].examples(split, num_each, seed)
    ]
    seeded(f"kinds/{split}/{seed}").shuffle(found)
    return found


@click.command()
@click.option("--held-out", is_flag=True, help="Texts that nothing was trained on.")
@click.option("--each", type=click.IntRange(1), default=500, show_default=True, help="Texts of each kind.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the texts.")
def main(*, held_out: bool, each: int, seed: int) -> None:
    """Print texts and their kinds as JSON lines."""
    for example in examples(HELD_OUT if held_out else TRAIN, each, seed):
        click.echo(json.dumps({"text": example.text, "label": example.answer}))


if __name__ == "__main__":
    main()
