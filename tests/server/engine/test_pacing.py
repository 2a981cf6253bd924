"""Chunks of prompts that keep a step to its time, whatever the machine is."""

from __future__ import annotations

import pytest

from weft.server.engine.pacing import Pace

FLOOR = 32


class Machine:
    """Takes so long for a step, for each decode, and for each prompt token."""

    def __init__(self, step_s: float = 0.02, decode_s: float = 0.001, prompt_s: float = 0.001) -> None:
        self.step_s, self.decode_s, self.prompt_s = step_s, decode_s, prompt_s

    def run(self, pace: Pace, num_decodes: int, num_prompt_tokens: int) -> float:
        duration_s = self.step_s + num_decodes * self.decode_s + num_prompt_tokens * self.prompt_s
        pace.observe(num_prompt_tokens, duration_s)
        return duration_s

    def compute(self, pace: Pace, num_decodes: int, prompt: int, budget: int = 512) -> list[float]:
        """The times of the steps of a prompt beside decodes."""
        times = []
        while prompt:
            paced = pace.prompt_tokens(num_decodes)
            chunk = min(prompt, budget if paced is None else min(paced, budget))
            times.append(self.run(pace, num_decodes, chunk))
            prompt -= chunk
        return times


def measured(machine: Machine, target_s: float, num_decodes: int) -> Pace:
    pace = Pace(target_s, FLOOR)
    for _ in range(10):
        machine.run(pace, num_decodes, 0)
    machine.run(pace, num_decodes, 64)
    return pace


def test_nothing_is_paced_without_a_target_without_decodes_and_before_a_measurement() -> None:
    machine = Machine()
    assert measured(machine, 0.0, 4).prompt_tokens(4) is None
    assert measured(machine, 0.1, 4).prompt_tokens(0) is None
    assert Pace(0.1, FLOOR).prompt_tokens(4) is None


@pytest.mark.parametrize("num_decodes", [1, 40])
@pytest.mark.parametrize("prompt_s", [0.0002, 0.001, 0.0015])
def test_steps_take_as_long_as_they_should(num_decodes: int, prompt_s: float) -> None:
    machine = Machine(prompt_s=prompt_s)
    pace = measured(machine, 0.15, num_decodes)
    times = machine.compute(pace, num_decodes, 8192, budget=4096)
    assert all(0.14 <= seconds <= 0.16 for seconds in times[:-1])


def test_a_prompt_gets_as_long_as_decodes_that_alone_take_most_of_the_time() -> None:
    machine = Machine(decode_s=0.01)
    pace = measured(machine, 0.1, 40)
    times = machine.compute(pace, 40, 8192, budget=4096)
    assert all(0.8 <= seconds <= 0.9 for seconds in times[:-1])


def test_a_prompt_goes_on_by_a_few_tokens_where_each_is_dear() -> None:
    machine = Machine(step_s=0.0, prompt_s=0.05)
    pace = measured(machine, 0.1, 40)
    assert pace.prompt_tokens(40) == FLOOR
    assert len(machine.compute(pace, 40, 1024)) == 1024 // FLOOR


def test_it_follows_a_machine_that_becomes_slower_and_quicker() -> None:
    machine = Machine()
    pace = measured(machine, 0.2, 10)
    machine.prompt_s = 0.004
    assert max(machine.compute(pace, 10, 4096)[8:]) <= 0.25
    machine.prompt_s = 0.0005
    assert min(machine.compute(pace, 10, 8192)[20:-1]) >= 0.18


def test_a_step_that_hung_does_not_make_chunks_small_for_long() -> None:
    machine = Machine()
    pace = measured(machine, 0.2, 10)
    before = pace.prompt_tokens(10)
    pace.observe(64, 30.0)
    assert pace.prompt_tokens(10) >= before // 2
    pace.observe(0, 30.0)
    machine.compute(pace, 10, 1024)
    for _ in range(10):
        machine.run(pace, 10, 0)
    assert pace.prompt_tokens(10) >= before * 0.7


def test_short_prompts_say_nothing_about_the_time_of_a_token() -> None:
    pace = measured(Machine(), 0.1, 4)
    before = pace.prompt_token_s
    pace.observe(3, 1.0)
    assert pace.prompt_token_s == before
