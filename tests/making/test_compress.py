"""`weft compress`: PEFT folders in, PEFT folders out, which Weft and peft load alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Run
from logits import PROMPT, Served, assert_same
from safetensors.torch import load_file, save_file
from tiny import make_adapter, make_model, peft_logits, save_tokenizer
from transformers import PreTrainedModel

ATTENTION = ["q_proj", "k_proj", "v_proj"]


class Base:
    """A model, and its logits with an adapter."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.model: PreTrainedModel = make_model("llama", folder, num_hidden_layers=2)
        save_tokenizer(folder)
        self._served = Served(folder, root)

    def peft(self, adapter: Path) -> torch.Tensor:
        return peft_logits(self.model, adapter, [PROMPT])[0]

    def weft(self, adapter: Path) -> torch.Tensor:
        return self._served.logits((adapter, 1.0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base(tmp_path_factory.mktemp("compress") / "base", tmp_path_factory.getbasetemp())


@pytest.fixture
def adapter(base: Base, tmp_path: Path) -> Callable[..., Path]:
    def adapter(name: str = "it", seed: int = 0, **config: object) -> Path:
        return make_adapter(base.model, tmp_path / "in" / name, seed, **{"target_modules": ATTENTION, **config})

    return adapter


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """scale * b a by module, of a folder that names every module in full."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for module in config["target_modules"]:
        a, b = (tensors[f"base_model.model.{module}.lora_{half}.weight"].double() for half in "AB")
        rank = config["rank_pattern"].get(module, config["r"])
        assert a.shape[0] == b.shape[1] == rank
        found[module] = config["alpha_pattern"].get(module, config["lora_alpha"]) / rank * (b @ a)
    return found


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_alpha": 5},
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 7, "layers.1.self_attn.k_proj": -9}},
        {"target_modules": r".*\.1\..*(q|down)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        {"layers_to_transform": [1]},
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
        {"bias": "all"},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"modules_to_save": ["model.norm", "lm_head"]},
        {"trainable_token_indices": [5, 80]},
        {"alora_invocation_tokens": [80, 90]},
    ],
    ids=lambda config: ",".join(config) or "plain",
)
def test_with_all_its_energy_it_is_the_same(
    base: Base, adapter: Callable[..., Path], tmp_path: Path, run: Run, config: dict[str, object]
) -> None:
    """Whatever formula gives the scales, and whatever else the adapter holds."""
    folder = adapter(**config)
    made = tmp_path / "made"
    ran = run("compress", folder, "--output", made, "--energy", 1)
    assert ran.exit_code == 0, ran.error
    assert_same(base.weft(made), base.weft(folder))
    if "alora_invocation_tokens" not in config:  # peft wants to be told where they are
        assert_same(base.peft(made), base.peft(folder))
    before, after = (load_file(each / "adapter_model.safetensors") for each in (folder, made))
    assert {name: t.tolist() for name, t in before.items() if ".lora_" not in name} == {
        name: t.tolist() for name, t in after.items() if ".lora_" not in name
    }


def test_a_lower_rank_is_the_truncated_svd(adapter: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    ran = run("compress", adapter(), "--output", tmp_path / "made", "--rank", 3, "--report-int8")
    assert ran.exit_code == 0, ran.error
    run("compress", tmp_path / "in" / "it", "--output", tmp_path / "whole", "--energy", 1)
    report = json.loads((tmp_path / "made" / "compression.json").read_text())
    cut, whole = deltas(tmp_path / "made"), deltas(tmp_path / "whole")
    for module in report["modules"]:
        name = module["name"]
        u, s, vt = torch.linalg.svd(whole[name], full_matrices=False)
        torch.testing.assert_close(cut[name], u[:, :3] * s[:3] @ vt[:3], atol=1e-6, rtol=1e-5)
        assert module["error"] == pytest.approx(float((s[3:].square().sum() / s.square().sum()).sqrt()), rel=1e-5)
        assert 1e-3 < module["int8_error"] < 5e-2
        assert name in ran.output
    assert report["num_bytes"] * 8 == report["bytes_before"] * 3
    off = sum(float((cut[name] - whole[name]).square().sum()) for name in whole)
    assert report["error"] == pytest.approx((off / sum(float(d.square().sum()) for d in whole.values())) ** 0.5)


def test_several_share_a_number_of_bytes(base: Base, adapter: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    folders = [adapter("a", 0), adapter("b", 1, r=4), adapter("c", 2, modules_to_save=["model.norm"])]
    before = sum(path.nbytes for folder in folders for path in load_file(folder / "adapter_model.safetensors").values())
    made = tmp_path / "made"
    ran = run("compress", *folders, "--output", made, "--bytes", before // 2)
    assert ran.exit_code == 0, ran.error
    assert sorted(path.name for path in made.iterdir()) == ["a", "b", "c"]
    after = sum(t.nbytes for folder in made.iterdir() for t in load_file(folder / "adapter_model.safetensors").values())
    assert before // 2 - 4 * 128 * 3 <= after <= before // 2
    for name in "abc":
        assert_same(base.weft(made / name), base.peft(made / name))


def test_modules_without_effect_go(base: Base, adapter: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    folder = adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    idle = [name for name in tensors if ".1.self_attn.q_proj.lora_B" in name]
    save_file(tensors | {name: tensors[name] * 0 for name in idle}, folder / "adapter_model.safetensors")
    ran = run("compress", folder, "--output", tmp_path / "made", "--rank", 8)
    assert ran.exit_code == 0, ran.error
    assert len(load_file(tmp_path / "made" / "adapter_model.safetensors")) == len(tensors) - 2
    assert_same(base.weft(tmp_path / "made"), base.weft(folder))


def test_a_classifier_keeps_its_head_and_labels(adapter: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    folder, made = adapter(), tmp_path / "made"
    path = folder / "adapter_config.json"
    added = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **added}))
    tensors = load_file(folder / "adapter_model.safetensors")
    head = torch.randn(2, 64)
    save_file({**tensors, "base_model.model.score.weight": head}, folder / "adapter_model.safetensors")
    (folder / "config.json").write_text('{"id2label": {"0": "good", "1": "bad"}}')
    assert run("compress", folder, "--output", made, "--rank", 2).exit_code == 0
    assert torch.equal(load_file(made / "adapter_model.safetensors")["base_model.model.score.weight"], head)
    assert (made / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert added.items() <= json.loads((made / "adapter_config.json").read_text()).items()


def test_another_type_is_rounded_to(base: Base, adapter: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    made = tmp_path / "made"
    assert run("compress", adapter(), "--output", made, "--energy", 1, "--dtype", "bfloat16").exit_code == 0
    assert {t.dtype for t in load_file(made / "adapter_model.safetensors").values()} == {torch.bfloat16}
    again = tmp_path / "again"
    assert run("compress", made, "--output", again, "--rank", 2).exit_code == 0
    assert {t.dtype for t in load_file(again / "adapter_model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora: is set: DoRA's magnitudes go by the norm of the base's weights with the delta"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying: is set: what is tied"),
        ({"target_parameters": ["model.norm.weight"]}, "target_parameters: is set: the terms of experts lie stacked"),
        ({"layer_replication": [[0, 1]]}, "layer_replication: is set"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(
    adapter: Callable[..., Path], tmp_path: Path, run: Run, config: dict[str, object], said: str
) -> None:
    folder = adapter()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    ran = run("compress", folder, "--output", tmp_path / "made", "--rank", 2)
    assert (ran.exit_code, (tmp_path / "made").exists()) == (1, False)
    assert said in ran.error_line


def test_files_that_are_unsound(adapter: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    folder = adapter()
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))

    def said(change: dict[str, torch.Tensor]) -> str:
        save_file(change, weights)
        ran = run("compress", folder, "--output", tmp_path / "made", "--rank", 2)
        assert (ran.exit_code, (tmp_path / "made").exists()) == (1, False)
        return ran.error_line

    assert "has not one lora_A and one lora_B" in said({n: t for n, t in tensors.items() if n != first})
    assert "holds what is no finite" in said({**tensors, first: tensors[first] * torch.inf})
    assert "not of the rank 8 that the config says" in said({**tensors, first: tensors[first][:4].clone()})
    assert "holds no LoRA tensors" in said({"x": torch.ones(1)})
    assert "add nothing" in said({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    weights.write_bytes(b"spoilt")
    assert "too few for a safetensors file" in run("compress", folder, "--output", "x", "--rank", 2).error_line
    weights.unlink()
    assert "adapter_model.safetensors: is missing" in run("compress", folder, "--output", "x", "--rank", 2).error_line
    shutil.rmtree(folder)
    assert "can't be read as JSON" in run("compress", folder, "--output", "x", "--rank", 2).error_line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give one of --rank, --energy and --bytes"),
        (("--rank", 2, "--bytes", 9), "give one of --rank, --energy and --bytes"),
        (("--rank", 9), "--rank is 9, and no module's is above 8: give less"),
        (("--bytes", 9), "--bytes leaves 9 for rows, too few for 1 of 1 adapters to keep a row: give more"),
        (("--rank", 2, "--weights", "1"), "--weights and --density go with --combine"),
        (("--combine", "cat"), "--combine takes two adapters or more"),
    ],
)
def test_options_that_make_no_sense(
    adapter: Callable[..., Path], tmp_path: Path, run: Run, options: tuple[object, ...], said: str
) -> None:
    ran = run("compress", adapter(), "--output", tmp_path / "made", *options)
    assert (ran.exit_code, ran.error_line, (tmp_path / "made").exists()) == (2, said, False)


def test_two_of_one_name(adapter: Callable[..., Path], tmp_path: Path, run: Run) -> None:
    folder = adapter()
    ran = run("compress", folder, folder, "--output", tmp_path / "made", "--rank", 2)
    assert (ran.exit_code, ran.error_line) == (2, "two adapters are called it: compress them one by one")
