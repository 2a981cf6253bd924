"""Weighted mixes of adapters, against peft's own "cat" combination."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from harness import Harness
from peft import PeftModel
from tiny import VOCAB, make_adapter, make_model, save_tokenizer
from transformers import PreTrainedModel

from weft.errors import InvalidRequest
from weft.server.engine.request import Request, Stopping

Mix = Sequence[tuple[str, float]]
SETTINGS = {
    "a": {"r": 8, "target_modules": ["q_proj", "down_proj"]},
    "b": {"r": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "c": {"r": 20, "target_modules": ["q_proj", "up_proj", "embed_tokens", "lm_head"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
}
MIXES: list[Mix] = [
    [("a", 1.0), ("b", 1.0)],
    [("a", 0.5), ("b", -0.75)],
    [("c", 0.3), ("a", 1.7)],
    [("c", -1.0)],
    [("c", 0.5), ("c", 0.25)],
    [("a", 0.2), ("b", 0.3), ("c", 0.4)],
    [],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    root = tmp_path_factory.mktemp("mixes")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    for seed, (name, config) in enumerate(SETTINGS.items()):
        make_adapter(model, root / name, seed=seed, **config)
    return model, root


@pytest.fixture(scope="module")
def harness(model: tuple[PreTrainedModel, Path]) -> Harness:
    return Harness(model[1] / "base", {name: model[1] / name for name in SETTINGS})


def request(mix: Mix, prompt: Sequence[int], name: str = "r") -> Request:
    return Request(name, tuple(prompt), tuple(mix), stopping=Stopping(max_tokens=12, ignore_eos=True))


def combined(model: PreTrainedModel, root: Path, mix: Mix, prompt: Sequence[int]) -> torch.Tensor:
    """Logits of peft's combination."""
    served = model
    if mix:
        first = mix[0][0]
        served = PeftModel.from_pretrained(copy.deepcopy(model), root / first, adapter_name=first)
        for name, _ in mix[1:]:
            served.load_adapter(root / name, adapter_name=name)
        names, weights = zip(*mix, strict=True)
        served.add_weighted_adapter(list(names), list(weights), "mix", combination_type="cat")
        served.set_adapter("mix")
    with torch.inference_mode():
        return served(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]


@pytest.mark.filterwarnings("ignore")
def test_different_mixes_of_one_batch_equal_pefts_combinations(
    model: tuple[PreTrainedModel, Path], harness: Harness
) -> None:
    prompt = [random.Random(1).randrange(3, VOCAB) for _ in range(21)]
    expected = [combined(*model, mix, prompt) for mix in MIXES]
    for chunk in (64, 5):
        actual = harness.logits([request(mix, prompt) for mix in MIXES], chunk)
        for mine, theirs, mix in zip(actual, expected, MIXES, strict=True):
            assert ((mine - theirs).norm() / theirs.norm()).item() < 1e-4, mix


def test_a_mix_gives_the_same_tokens_alone_and_among_others(harness: Harness) -> None:
    prompt = [5, 9, 80, 200]
    alone = [harness.run([request(mix, prompt)])[0].ids for mix in MIXES]
    together = harness.run([request(mix, prompt, f"r{i}") for i, mix in enumerate(MIXES)])
    assert [answer.ids for answer in together] == alone
    assert len({tuple(ids) for ids in alone}) == len(MIXES)


@pytest.mark.parametrize("mix", [[("dora", 0.5)], [("a", 1.0), ("dora", 1.0)]])
def test_what_is_no_sum_is_not_mixed(mix: Mix, harness: Harness) -> None:
    with pytest.raises(InvalidRequest, match="dora has parts that no weight can scale"):
        harness.submit(request(mix, [5, 6]))
    harness.store.check()
    assert all(info.num_in_flight == 0 for info in harness.store.list())
    assert harness.run([request([("dora", 1.0)], [5, 6])])[0].ids
