"""The demo's tasks: right answers, and splits that share nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from weft.demo.tasks import HELD_OUT, SKILLS, TRAIN, Task, prompt, reverse, split_of


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        ("upper", "quiet river", "QUIET RIVER"),
        ("vowels", "queue", "4"),
        ("vowels", "rhythm", "0"),
        ("plural", "cat", "cats"),
        ("plural", "fox", "foxes"),
        ("plural", "city", "cities"),
        ("plural", "toy", "toys"),
        ("reverse", "lamp", "pmal"),
        ("iso-date", "7 March 2021", "2021-03-07"),
        ("iso-date", "December 24, 1999", "1999-12-24"),
        ("sentiment", "the soup was delicious", "positive"),
        ("sentiment", "the soup was not delicious", "negative"),
        ("sentiment", "the view is not ugly", "positive"),
        ("rot13", "nut", "ahg"),
        ("pig-latin", "string", "ingstray"),
        ("pig-latin", "queen", "eenquay"),
        ("pig-latin", "apple", "appleway"),
        ("pig-latin", "yard", "ardyay"),
        ("acronym", "old stone bridge", "OSB"),
        ("camel-case", "old stone bridge", "oldStoneBridge"),
        ("sort", "letter", "eelrtt"),
        ("add", "47+58", "105"),
        ("roman", "1994", "MCMXCIV"),
        ("roman", "3888", "MMMDCCCLXXXVIII"),
    ],
)
def test_a_task_knows_the_right_answer(task: str, text: str, answer: str) -> None:
    assert SKILLS[task].answer(text) == answer


def test_a_prompt_names_no_task() -> None:
    assert prompt("quiet river") == "quiet river="


@pytest.mark.parametrize("task", SKILLS.values(), ids=SKILLS)
def test_the_splits_share_no_input(task: Task) -> None:
    held_out = task.examples(HELD_OUT, 200, seed=0)
    train = task.examples(TRAIN, 1000, seed=0)
    assert len({example.text for example in held_out}) == 200
    assert not {example.text for example in held_out} & {example.text for example in train}


def test_an_input_is_held_out_from_every_task() -> None:
    held_out = {example.text for task in SKILLS.values() for example in task.examples(HELD_OUT, 100, seed=0)}
    assert {split_of(text) for text in held_out} == {HELD_OUT}


@pytest.mark.parametrize("task", SKILLS.values(), ids=SKILLS)
def test_no_answer_echoes_its_input(task: Task) -> None:
    assert all(task.answer(e.text) == e.answer != e.text for e in task.examples(HELD_OUT, 200, seed=1))


def test_the_same_seed_draws_the_same_examples() -> None:
    task = SKILLS["reverse"]
    assert task.examples(HELD_OUT, 10, seed=3) == task.examples(HELD_OUT, 10, seed=3)
    assert task.examples(HELD_OUT, 10, seed=3) != task.examples(HELD_OUT, 10, seed=4)


def test_more_examples_than_there_are_inputs_are_refused() -> None:
    numbers = Task("number", "a number", lambda rng: str(rng.randint(0, 99)), reverse, SKILLS["reverse"].lora)
    with pytest.raises(ValueError, match=r"'number' has only \d+ inputs in split 'held-out', not 100"):
        numbers.examples(HELD_OUT, 100, seed=0)


def test_the_tasks_need_the_standard_library_alone() -> None:
    code = "import sys, weft.demo.tasks; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
