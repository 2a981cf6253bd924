"""Readers, and what each opened next: train.jsonl; and of other readers held-out.jsonl, with seven choices."""

import json
import random
from itertools import combinations
from pathlib import Path

SHELVES = {
    "garden": "tulip orchid fern rose lily violet daisy ivy",
    "kitchen": "pizza soup pie salad stew cake bread noodle",
    "music": "violin drum flute guitar harp trumpet fiddle cello",
    "space": "comet planet rocket orbit meteor galaxy moon star",
}
NUM_HELD_OUT, LINES_A_READER = 56, 4


def main() -> None:
    """Write both files into the working folder. A reader has three items of a shelf; what comes next is of it, too."""
    rng = random.Random(0)
    shelves = {name: items.split() for name, items in SHELVES.items()}
    readers = [(name, seen) for name, items in shelves.items() for seen in combinations(items, 3)]
    rng.shuffle(readers)
    lines = {"held-out": [], "train": []}
    for number, (name, seen) in enumerate(readers):
        is_held_out = number < NUM_HELD_OUT
        for _ in range(1 if is_held_out else LINES_A_READER):
            following = rng.choice([item for item in shelves[name] if item not in seen])
            line = {"prompt": f"{', '.join(rng.sample(seen, 3))} > ", "completion": following}
            if is_held_out:
                others = [item for other in shelves if other != name for item in rng.sample(shelves[other], 2)]
                line["choices"] = sorted([following, *others])
            lines["held-out" if is_held_out else "train"].append(line)
    for split, its in lines.items():
        Path(f"{split}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in its))


if __name__ == "__main__":
    main()
