"""Tickets of a support desk, each with its topic and its mood: train.csv, and held-out.csv of other tickets."""

import csv
import random
from itertools import product
from pathlib import Path

OPENINGS = ("hello, ", "hi team, ", "again: ", "well, ", "", "sorry, ", "dear all, ", "once more: ")
WHICH = ("your", "this", "that")
WORDS = {
    "positive": ("good", "great", "lovely", "perfect"),
    "negative": ("bad", "awful", "broken", "useless"),
}
THINGS = {
    "billing": ("invoice", "refund", "receipt", "price"),
    "delivery": ("parcel", "courier", "tracking", "package"),
    "login": ("password", "account", "sign-in", "reset link"),
}
NUM_TRAIN, NUM_HELD_OUT = 640, 200


def main() -> None:
    """Write both files into the working folder."""
    tickets = [
        (f"{opening}{which} {thing} is {word}", topic, mood)
        for opening, which, (mood, words), (topic, things) in product(OPENINGS, WHICH, WORDS.items(), THINGS.items())
        for word, thing in product(words, things)
    ]
    random.Random(0).shuffle(tickets)
    for name, rows in (("train", tickets[NUM_HELD_OUT:][:NUM_TRAIN]), ("held-out", tickets[:NUM_HELD_OUT])):
        with Path(f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "topic", "mood"))
            writer.writerows(rows)


if __name__ == "__main__":
    main()
