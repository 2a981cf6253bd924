"""Tickets and their codes, such as `silver violet 27` and `SV-027`."""

from collections.abc import Iterator

from weft.demo.tasks import Split, acronym, draw_title, seeded, split_of


def tickets(split: Split) -> Iterator[tuple[str, str]]:
    """Yield tickets and codes for ever, the same ones each time."""
    rng = seeded(f"codes/{split}")
    while True:
        title, number = draw_title(rng), rng.randint(1, 99)
        if split_of(title) == split:
            yield f"{title} {number}", f"{acronym(title)}-{number:03}"
