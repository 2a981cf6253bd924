"""Patterns match as Python's `re` does where PEFT uses it, and are bounded where `re` is not."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.adapters import patterns
from weft.adapters.patterns import Patterns

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.experts.3.up_proj", "lm_head", "q_proj", "h.1.attn"]


@given(
    st.sampled_from(NAMES),
    st.sampled_from([r"(q|v)_proj", r".*\.[01]\..*", "layers.1", r"a{1,3}", "(?i)Q_PROJ", "", "."])
    | st.text("qpro_j.layers01", max_size=8)
    | st.sampled_from([name[at:] for name in NAMES for at in range(len(name))]),
)
def test_ends_and_whole_names_match_as_peft_matches_them(name: str, pattern: str) -> None:
    ours = Patterns()
    try:
        ours.add_end(pattern)
        ours.add_whole(pattern)
    except ValueError:
        assert pattern == "(?i)Q_PROJ"  # which PEFT can't put inside another pattern either
        return
    assert ours.is_end(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name))
    assert ours.is_whole(pattern, name) == bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([], [0, 11, None, None, None]),
        (["layers"], [0, 11, None, None, None]),
        (["x", "experts|h"], [None, None, None, None, 1]),
    ],
)
def test_the_number_of_a_layer(layers: list[str], expected: list[int | None]) -> None:
    ours = Patterns()
    for pattern in layers:
        ours.add_layers(pattern)
    assert [ours.layer(layers, name) for name in NAMES] == expected


@pytest.mark.parametrize(
    "pattern", ["(", "a{2", "(?R)", r"\p{L}", "x{e<=1}", "a{100}" * 4, "(" * 5000 + ")" * 5000, "ab?" * 50_000]
)
def test_what_only_one_library_takes_or_neither_could_afford_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"is|holds"):
        Patterns().add_end(pattern)


def test_many_patterns_share_one_budget_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "MATCH_BUDGET_S", 0.0)
    ours = Patterns()
    ours.add_end("(q|v)_proj")
    with pytest.raises(TimeoutError):
        ours.is_end("(q|v)_proj", "q_proj" * 1000)
