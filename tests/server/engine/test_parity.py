"""Weft against transformers and peft, class by class: the same logits, the same tokens, alone and mixed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness import Harness
from parity import NEW_TOKENS, Case
from tiny import (
    ARCHITECTURES,
    VOCAB,
    linear_names,
    make_adapter,
    make_model,
    peft_generate,
    peft_logits,
    save_tokenizer,
)

RANKS = {"r1": 1, "r8": 8, "r12": 12, "r64": 64}


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "gpt2", "gpt_oss", "gemma2", "mixtral"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    model = make_model(kind, folder / "base")
    save_tokenizer(folder / "base")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if kind in ("gpt_oss", "mixtral") else linear_names(kind)
    adapters: dict[str | None, Path | None] = {
        name: make_adapter(model, folder / name, seed=i, r=rank, lora_alpha=2 * rank, target_modules=targets)
        for i, (name, rank) in enumerate(RANKS.items())
    }
    harness = Harness(folder / "base", {name: path for name, path in adapters.items() if name and path})
    return Case(model, harness, {None: None, **adapters})


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 40))] for _ in range(count)]


def test_logits_of_every_position_equal_pefts_in_one_mixed_row(case: Case) -> None:
    wanted = list(zip(prompts(5, seed=3), case.adapters.items(), strict=True))
    expected = [peft_logits(case.model, folder, [prompt])[0] for prompt, (_, folder) in wanted]
    for chunk in (64, 7, 1):
        actual = case.harness.logits([case.request(prompt, name) for prompt, (name, _) in wanted], chunk)
        for mine, theirs in zip(actual, expected, strict=True):
            assert ((mine - theirs).norm() / theirs.norm()).item() < 1e-4


def test_greedy_tokens_equal_pefts_alone_and_mixed(case: Case) -> None:
    names = list(case.adapters)
    wanted = [(prompt, names[i % len(names)]) for i, prompt in enumerate(prompts(12, seed=1))]
    expected = [peft_generate(case.model, case.adapters[name], prompt, NEW_TOKENS) for prompt, name in wanted]
    alone = [case.harness.run([case.request(prompt, name)])[0].ids for prompt, name in wanted]
    assert alone == expected
    requests = [case.request(prompt, name, f"r{i}") for i, (prompt, name) in enumerate(wanted)]
    arrivals = [random.Random(2).randrange(30) for _ in requests]
    mixed = [answer.ids for answer in case.harness.run(requests, arrivals)]
    assert mixed == expected
