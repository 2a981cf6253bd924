"""Mutated messages to every method: each ends with a code that says whose fault it is, and nobody else notices.

What was once found, and an example of each way to end, lies in tests/fuzz/corpus/METHOD/CODE-HASH and is sent again
each time. `make fuzz` goes on for as long as WEFT_FUZZ_MINUTES says, and adds to it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fuzzing import CODES, CONTROL, METHODS, ODD, end_of, make, spoil
from house import House, generate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parents[2] / "fuzz" / "corpus"
KEPT = sorted(CORPUS.glob("*/*"))
KEPT_BYTES = 512
CONTROL_EVERY = 20
MINUTES = float(os.environ.get("WEFT_FUZZ_MINUTES", "0"))

_ANY = list(HealthCheck)


@pytest.fixture
def control(house: House, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], None]]:
    """Asserts that a request is answered as ever; at the end also that nothing failed or was left behind."""
    names = {info.name for info in house.store.list()}
    request = generate(adapter_id=CONTROL, text="hello", stopping={"max_tokens": 8, "ignore_eos": True})
    expected = house.inference.Generate(request).tokens
    caplog.clear()

    def ask() -> None:
        assert house.inference.Generate(request, timeout=60).tokens == expected

    yield ask
    ask()
    for info in house.store.list():
        if info.name not in names:
            house.delete(info.name)
    house.audit()
    assert [record.getMessage() for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_what_was_found_before_ends_as_it_should(house: House, control: Callable[[], None]) -> None:
    assert {path.parent.name for path in KEPT} == {method.rpartition("/")[2] for method in METHODS}
    by_name = {method.rpartition("/")[2]: method for method in METHODS}
    for number, path in enumerate(KEPT):
        code, words = send(house, by_name[path.parent.name], path.read_bytes())
        assert code == path.name.partition("-")[0], f"{path}: {words}"
        if number % CONTROL_EVERY == 0:
            control()


@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=_ANY)
@given(method=st.sampled_from(sorted(METHODS)), rng=st.randoms(use_true_random=True))
def test_whatever_is_sent_the_answer_says_whose_fault_it_is(
    house: House, control: Callable[[], None], method: str, rng: random.Random
) -> None:
    for _ in range(CONTROL_EVERY):
        send(house, method, spoil(rng, make(rng, METHODS[method]).SerializeToString()))
    control()


def send(house: House, method: str, payload: bytes) -> tuple[str, str]:
    if ODD not in {info.name for info in house.store.list()}:
        house.create(ODD, "three")
    code, words = end_of(house.channel, method, payload)
    assert code in CODES, f"{method} of {payload!r} ended with {code}: {words}"
    return code, words


@pytest.mark.skipif(not MINUTES, reason="WEFT_FUZZ_MINUTES is not set")
def test_for_as_long_as_is_asked(house: House, control: Callable[[], None]) -> None:
    """Each new way to end is kept, by its method, its code, and its words without numbers."""
    end_s = time.monotonic() + 60 * MINUTES
    seen: set[tuple[str, str, str]] = set()
    rng = random.Random()
    for number in itertools.count():
        if time.monotonic() > end_s:
            break
        method = rng.choice(sorted(METHODS))
        payload = spoil(rng, make(rng, METHODS[method]).SerializeToString())
        code, words = send(house, method, payload)
        kind = "".join(letter for letter in words.partition(":")[0] if letter.isalpha())
        if len(payload) <= KEPT_BYTES and (method, code, kind) not in seen and code != "DEADLINE_EXCEEDED":
            seen.add((method, code, kind))
            keep(method, code, payload)
        if number % CONTROL_EVERY == 0:
            control()


def keep(method: str, code: str, payload: bytes) -> None:
    folder = CORPUS / method.rpartition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{code}-{hashlib.sha256(payload).hexdigest()[:12]}").write_bytes(payload)
