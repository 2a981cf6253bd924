"""docs/adapters.md says of every field what the code does with it; each honoured one is compared with peft's own."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from features import CLASSES, features
from peft import LoraConfig

from weft.adapters.peft_config import _HONOURED, _NO_EFFECT, _REFUSED_WHEN_SET

DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"
ROW = re.compile(r"\| `(\w+)` \| (honoured|refused|no effect) \| (.*?) ?\|")

ELSEWHERE = {
    "r": "every adapter of the parity tests has one",
    "lora_alpha": "every adapter of the parity tests has one",
    "peft_type": "every adapter of the parity tests has one",
    "task_type": "every adapter of the parity tests has one",
    "layers_pattern": "test_modules_are_targeted_as_peft_targets_them",
    "init_lora_weights": "says nothing of what is computed, where it is not refused",
}
"""Honoured fields that no feature of the parity tests is about, and why not."""


@pytest.fixture(scope="module")
def table() -> dict[str, tuple[str, str]]:
    rows = [match.groups() for line in DOCS.read_text().splitlines() if (match := ROW.fullmatch(line))]
    table = {name: (what, why) for name, what, why in rows}
    assert len(table) == len(rows), "a field has two rows"
    return table


def test_the_table_says_what_the_code_does(table: dict[str, tuple[str, str]]) -> None:
    said = {name: what for name, (what, _) in table.items()}
    does = {
        **dict.fromkeys(_HONOURED, "honoured"),
        **dict.fromkeys(_NO_EFFECT.keys() - {"ephemeral_gpu_offload"}, "no effect"),  # older: a part of runtime_config
        **dict.fromkeys(_REFUSED_WHEN_SET, "refused"),
    }
    assert said == does


def test_the_table_gives_the_reasons_that_refusals_give(table: dict[str, tuple[str, str]]) -> None:
    assert {name: why for name, (what, why) in table.items() if what == "refused"} == _REFUSED_WHEN_SET


def test_the_table_has_every_field_of_the_installed_peft(table: dict[str, tuple[str, str]]) -> None:
    assert {field.name for field in fields(LoraConfig)} - table.keys() == set()


def test_every_honoured_field_is_in_a_parity_test(table: dict[str, tuple[str, str]]) -> None:
    tested = {field for name in CLASSES for config in features(name).values() for field in config}
    assert _HONOURED - tested == ELSEWHERE.keys() - tested
