"""Headlines and what they mean for the share: train.csv, and held-out.csv of other companies."""

import csv
import random
from pathlib import Path

from weft.demo.words import NOUNS

EVENTS = {
    "up": ("raises forecast", "beats estimates", "cuts debt", "profit rises", "losses narrow", "wins order"),
    "down": ("cuts forecast", "misses estimates", "raises debt", "profit falls", "losses widen", "loses order"),
    "flat": ("keeps forecast", "meets estimates", "names chairman", "profit unchanged", "moves office"),
}
NUM_HELD_OUT = 200


def main() -> None:
    """Write both files into the working folder."""
    rng = random.Random(0)
    companies = rng.sample(NOUNS, len(NOUNS))
    for name, its in (("train", companies[NUM_HELD_OUT:]), ("held-out", companies[:NUM_HELD_OUT])):
        with Path(f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            for company in its:
                label = rng.choice(list(EVENTS))
                writer.writerow((f"{company.title()} {rng.choice(EVENTS[label])}", label))


if __name__ == "__main__":
    main()
