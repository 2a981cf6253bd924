"""`weft compress --combine`: what peft's add_weighted_adapter makes on the real base, from the folders alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Run
from logits import PROMPT, Served, assert_same
from peft import PeftModel
from tiny import make_adapter, make_model, peft_logits, save_tokenizer
from transformers import AutoModelForCausalLM

from weft.server.cli.compress import WAYS

THINNED = {"density": 0.5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With adapters: same/0 and same/1 of one rank, and other, which has another rank, scales and modules."""
    folder = tmp_path_factory.mktemp("combine") / "base"
    model = make_model("llama", folder, num_hidden_layers=2)
    save_tokenizer(folder)
    for seed in range(2):
        make_adapter(model, folder.parent / f"same{seed}", seed, target_modules=["q_proj", "v_proj", "embed_tokens"])
    other = {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}}
    make_adapter(model, folder.parent / "other", 5, r=4, use_rslora=True, **other)
    make_adapter(model, folder.parent / "own", 6, target_modules=["q_proj"], modules_to_save=["lm_head"])
    return folder


def by_peft(base: Path, names: list[str], weights: list[float], way: str, **options: object) -> torch.Tensor:
    """Logits of what peft combines on the base itself."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base)
        combined = PeftModel.from_pretrained(model, str(base.parent / names[0]), adapter_name=names[0])
        for name in names[1:]:
            combined.load_adapter(str(base.parent / name), adapter_name=name)
        torch.manual_seed(0)
        combined.add_weighted_adapter(names, weights, "made", combination_type=way, **options)
        combined.set_adapter("made")
    with torch.inference_mode():
        logits: torch.Tensor = combined(input_ids=torch.tensor([PROMPT]), use_cache=False).logits[0]
    return logits


@pytest.fixture(scope="module")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(base, tmp_path_factory.getbasetemp())


@pytest.fixture
def combined(base: Path, served: Served, tmp_path: Path, run: Run) -> Callable[..., torch.Tensor]:
    """Weft's logits with what the command makes."""

    def combined(names: list[str], *options: object) -> torch.Tensor:
        ran = run("compress", *(base.parent / name for name in names), "--output", tmp_path / "made", *options)
        assert ran.exit_code == 0, ran.error
        return served.logits((tmp_path / "made", 1.0))

    return combined


@pytest.mark.parametrize("way", [way for way in WAYS if "dare" not in way])
def test_it_is_what_peft_makes(base: Path, combined: Callable[..., torch.Tensor], way: str) -> None:
    thins = way.startswith(("ties", "magnitude"))
    names, weights = ["same0", "same1"], [0.7, -0.4]
    density = ("--density", 0.5) if thins else ()
    found = combined(names, "--combine", way, "--weights", "0.7,-0.4", *density)
    assert_same(found, by_peft(base, names, weights, way, **(THINNED if thins else {})))


@pytest.mark.parametrize("way", ["dare_linear", "dare_ties"])
def test_what_dare_drops_goes_by_the_seed(combined: Callable[..., torch.Tensor], tmp_path: Path, way: str) -> None:
    made = []
    for seed in (0, 0, 1):
        made.append(combined(["same0", "same1"], "--combine", way, "--density", 0.5, "--seed", seed))
        (tmp_path / "made").rename(tmp_path / str(len(made)))
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2])


def test_cat_is_the_exact_sum_of_what_differs_in_everything(
    base: Path, served: Served, combined: Callable[..., torch.Tensor]
) -> None:
    """The server's own mix of the two, with the same weights."""
    found = combined(["same0", "other"], "--combine", "cat", "--weights", "0.5,2")
    mixed = served.logits((base.parent / "same0", 0.5), (base.parent / "other", 2.0))
    assert_same(found, mixed)


def test_a_combination_may_be_cut(base: Path, combined: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    combined(["same0", "same1"], "--combine", "cat", "--rank", 4)
    alone = peft_logits(AutoModelForCausalLM.from_pretrained(base), tmp_path / "made", [PROMPT])[0]
    assert alone.shape == (len(PROMPT), 260)


@pytest.mark.parametrize(
    ("names", "options", "exit_code", "said"),
    [
        (["same0", "other"], ("--combine", "linear"), 2, "All adapters must have the same r value"),
        (
            ["same0", "own"],
            ("--combine", "cat"),
            1,
            "lm_head.weight: is there, and can't be combined: only A and B can",
        ),
        (["same0", "same1"], ("--combine", "ties"), 2, "--combine ties takes a --density"),
        (["same0", "same1"], ("--combine", "cat", "--density", 0.5), 2, "--combine cat takes no --density"),
        (["same0", "same1"], ("--combine", "cat", "--weights", "1"), 2, "--weights has 1 numbers for 2 adapters"),
        (["same0", "same1"], ("--combine", "cat", "--weights", "1,nan"), 2, "must be numbers with commas between"),
    ],
)
def test_what_cannot_be_combined(
    base: Path, tmp_path: Path, run: Run, names: list[str], options: tuple[object, ...], exit_code: int, said: str
) -> None:
    ran = run("compress", *(base.parent / name for name in names), "--output", tmp_path / "made", *options)
    assert (ran.exit_code, (tmp_path / "made").exists()) == (exit_code, False)
    assert said in ran.error_line
