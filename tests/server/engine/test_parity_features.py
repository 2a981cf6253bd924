"""Everything that PEFT's LoRA can hold, against transformers and peft: alone, and all in one mixed row."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from features import CLASSES, EXPERTS, INVOCATION, make_all
from harness import Harness
from parity import Case
from tiny import VOCAB, peft_generate, peft_logits

NEW_TOKENS = 16


@pytest.fixture(scope="module", params=CLASSES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    model, adapters = make_all(request.param, folder)
    served = {f"a{i}": path for i, path in enumerate(adapters.values())}
    return Case(model, Harness(folder / "base", served, adapter_pages=256), {None: None, **served})


def prompt_for(rng: random.Random) -> list[int]:
    prompt = [rng.choice([5, 7, 9, 30, rng.randrange(3, VOCAB)]) for _ in range(rng.randint(1, 24))]
    return [*prompt, *INVOCATION, *prompt[:4]]


def test_logits_of_every_position_equal_pefts_in_one_mixed_row(case: Case) -> None:
    rng = random.Random(5)
    wanted = [(prompt_for(rng), name, folder) for name, folder in case.adapters.items()]
    expected = [peft_logits(case.model, folder, [prompt])[0] for prompt, _, folder in wanted]
    for chunk in (64, 3):
        actual = case.harness.logits([case.request(prompt, name) for prompt, name, _ in wanted], chunk)
        for mine, theirs, (_, name, folder) in zip(actual, expected, wanted, strict=True):
            assert ((mine - theirs).norm() / theirs.norm()).item() < 1e-4, (name, folder)


def test_greedy_tokens_equal_pefts_mixed_with_all_others(case: Case) -> None:
    rng = random.Random(6)
    wanted = [(prompt_for(rng), name, folder) for name, folder in case.adapters.items()]
    expected = [peft_generate(case.model, folder, prompt, NEW_TOKENS) for prompt, _, folder in wanted]
    requests = [
        case.request(prompt, name, f"r{i}", max_tokens=NEW_TOKENS) for i, (prompt, name, _) in enumerate(wanted)
    ]
    arrivals = [rng.randrange(12) for _ in requests]
    assert [answer.ids for answer in case.harness.run(requests, arrivals)] == expected


@pytest.mark.parametrize("case", [name for name in CLASSES if name not in EXPERTS], indirect=True)
def test_base_rows_are_bit_identical_whatever_the_others_use(case: Case) -> None:
    """Of experts it would not hold: which rows share an expert's product depends on every row's route."""
    rng = random.Random(8)
    prompts = [prompt_for(rng) for _ in case.adapters]
    with_none = case.harness.logits([case.request(prompt, None) for prompt in prompts], 64)
    mixed = case.harness.logits(
        [case.request(prompt, name) for prompt, name in zip(prompts, case.adapters, strict=True)], 64
    )
    assert torch.equal(mixed[0], with_none[0])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_in_bfloat16_each_is_as_near_as_its_rounding_and_base_rows_nearly_the_same(name: str, tmp_path: Path) -> None:
    _, adapters = make_all(name, tmp_path)
    served = {f"a{i}": path for i, path in enumerate(adapters.values())}
    harness = Harness(tmp_path / "base", served, adapter_pages=256, dtype="bfloat16")
    assert all(info.probe_error is not None and info.probe_error < 3e-2 for info in harness.store.list())
    case = Case(harness.engine._model.model, harness, {None: None, **served})
    rng = random.Random(7)
    mixed = [case.request(prompt_for(rng), name) for name, folder in case.adapters.items()]
    alone = harness.logits([request for request in mixed if not request.adapters], 64)
    together = harness.logits(mixed, 64)
    assert (together[0] - alone[0]).abs().max() < 0.2
    assert all(logits.isfinite().all() for logits in together)
