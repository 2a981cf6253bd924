"""Which name was meant."""

from __future__ import annotations

from unittest.mock import patch

import pytest

from weft.adapters import names
from weft.adapters.names import MAX_COMPARED_CHARACTERS, NUM_BESIDE, nearest


@pytest.mark.parametrize("typo", ["sentimant", "entiment", "sentiment2", "Sentiment"])
def test_of_a_few_the_most_similar_one(typo: str) -> None:
    assert nearest(typo, ["upper", "sentiment", "support", "acronym"]) == "sentiment"


def test_none_where_none_is_similar() -> None:
    assert nearest("nothing", ["upper", "sentiment"]) is None
    assert nearest("nothing", []) is None


def test_of_many_one_that_begins_alike() -> None:
    many = [f"tenant-{i:04d}/support-reply-v3" for i in range(2000)]
    assert nearest("tenant-0700/suport-reply-v3", many) == "tenant-0700/support-reply-v3"


def test_a_few_are_compared_and_none_that_is_long() -> None:
    with patch.object(names, "get_close_matches", wraps=names.get_close_matches) as compare:
        nearest("tenant-9999/x", (f"tenant-{i:04d}/{'x' * (i % 2 * 100)}" for i in range(9000, 11_000)))
        nearest("tenant-9999/" + "x" * MAX_COMPARED_CHARACTERS, ["tenant"])
    ((_, compared), _) = compare.call_args
    assert compare.call_count == 1
    assert 0 < len(compared) <= 2 * NUM_BESIDE
    assert max(map(len, compared)) <= MAX_COMPARED_CHARACTERS
