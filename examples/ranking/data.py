"""What readers opened, and what next: train.jsonl; and on other subjects held-out.jsonl, with seven choices."""

import json
import random
from pathlib import Path

from weft.demo.words import NOUNS

KINDS = ("news", "photos", "quiz", "guide")
NUM_TRAIN, NUM_HELD_OUT = 640, 100


def main() -> None:
    """Write both files into the working folder: who has left one subject for another goes on with that."""
    rng = random.Random(0)
    subjects = rng.sample([noun for noun in NOUNS if len(noun) <= 6], 400)
    for name, size, known in (("train", NUM_TRAIN, subjects[100:]), ("held-out", NUM_HELD_OUT, subjects[:100])):
        with Path(f"{name}.jsonl").open("w") as file:
            for _ in range(size):
                left, now, *others = rng.sample(known, 7)
                kind, following = rng.sample(KINDS, 2)
                line = {
                    "prompt": f"{left} {rng.choice(KINDS)}, {now} {kind}=",
                    "completion": f"{now} {following}",
                }
                if name == "held-out":
                    line["choices"] = sorted(f"{subject} {following}" for subject in (left, now, *others))
                file.write(f"{json.dumps(line)}\n")


if __name__ == "__main__":
    main()
