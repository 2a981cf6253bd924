"""Adapters are compared with the plain reference before they are served; those without effect are not taken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from harness import Harness
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_adapter, make_model, save_tokenizer

from weft.adapters import pages
from weft.adapters.fold import Folded
from weft.adapters.records import NewAdapter
from weft.errors import InvalidAdapter
from weft.kernels.patches import Affine

FEATURES = {
    "lora": {"target_modules": ["q_proj", "down_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [4, 5]},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("probe")
    model = make_model("llama", root / "base")
    save_tokenizer(root / "base")
    for seed, (name, config) in enumerate(FEATURES.items()):
        make_adapter(model, root / name, seed=seed, **config)
    return root


@pytest.fixture(scope="module")
def harness(root: Path) -> Harness:
    return Harness(root / "base", {name: root / name for name in FEATURES})


def source(folder: Path) -> str:
    return f"file:{folder}"


def test_the_error_of_each_adapter_is_known_and_small(harness: Harness) -> None:
    errors = {info.name: info.probe_error for info in harness.store.list()}
    assert errors.keys() == FEATURES.keys()
    assert all(error is not None and error < 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("name", FEATURES)
def test_what_would_come_out_wrong_is_refused_by_the_modules_name(
    name: str, root: Path, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fold that gets one module wrong, as a change of transformers or of PEFT's format might."""
    right = pages.fold

    def wrong(*args: object) -> Folded:
        folded = right(*args)  # type: ignore[arg-type]
        if not folded.patches:
            module = "model.layers.0.self_attn.q_proj"
            rows = {**folded.rows, module: (folded.rows[module][0], folded.rows[module][1] * 1.01)}
            return dataclasses.replace(folded, rows=rows)
        module = min(folded.patches)
        size = harness.engine._model.base.modules[module].d_out or 64
        shift = Affine(torch.zeros(size), torch.full((size,), 1e-2))
        return dataclasses.replace(folded, patches={**folded.patches, module: (*folded.patches[module], shift)})

    monkeypatch.setattr(pages, "fold", wrong)
    with pytest.raises(InvalidAdapter, match="away from PEFT's formula"):
        harness.store.create(NewAdapter("wrong", source(root / name)))
    assert "wrong" not in {info.name for info in harness.store.list()}
    harness.store.check()


def test_the_probe_can_be_left_out(root: Path) -> None:
    harness = Harness(root / "base", {"lora": root / "lora"}, adapter_probe=False)
    assert harness.store.get("lora").probe_error is None


def spoil(folder: Path, into: Path, part: str) -> Path:
    into.mkdir()
    for file in folder.iterdir():
        (into / file.name).write_bytes(file.read_bytes())
    tensors = load_file(into / "adapter_model.safetensors")
    save_file(
        {key: torch.zeros_like(tensor) if part in key else tensor for key, tensor in tensors.items()},
        into / "adapter_model.safetensors",
    )
    return into


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_adapter_without_effect_is_refused_unless_allowed(part: str, root: Path, tmp_path: Path) -> None:
    folder = spoil(root / "lora", tmp_path / "zero", part)
    refusing = Harness(root / "base", {"other": spoil(root / "lora", tmp_path / "other", "nothing")})
    with pytest.raises(InvalidAdapter, match="changes nothing: every delta is zero"):
        refusing.store.create(NewAdapter("zero", source(folder)))
    taking = Harness(root / "base", {"zero": folder}, allow_no_effect=True)
    assert taking.store.get("zero").probe_error is not None


@pytest.mark.parametrize("name", ["dora", "saved", "tokens"])
def test_zero_rows_are_no_lack_of_effect_where_something_else_was_trained(
    name: str, root: Path, tmp_path: Path
) -> None:
    folder = spoil(root / name, tmp_path / "zero", "lora_B")
    assert Harness(root / "base", {"zero": folder}).store.get("zero").digest


def test_a_dora_that_was_never_trained_has_no_effect(root: Path, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "base")
    config = LoraConfig(target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "untrained")
    harness = Harness(root / "base", {"probe": spoil(root / "lora", tmp_path / "probe", "nothing")})
    with pytest.raises(InvalidAdapter, match="changes nothing"):
        harness.store.create(NewAdapter("untrained", source(tmp_path / "untrained")))


def test_a_dry_run_reports_each_module_and_loads_nothing(root: Path, harness: Harness) -> None:
    before = harness.store.capacity()
    report = harness.store.inspect(source(root / "saved"))
    assert harness.store.capacity() == before
    assert report.digest == harness.store.get("saved").digest
    assert (report.problems, report.probe_error is not None) == ((), True)
    lines = {module.name: module for module in report.modules}
    assert lines["lm_head"].kind == "lm_head: own weights"
    q = lines["model.layers.0.self_attn.q_proj"]
    assert (q.kind, q.applied, q.rank, q.scale, q.dtype, q.num_pages) == ("linear: LoRA", True, 8, 2.0, "float32", 1)
    assert q.num_bytes == 8 * (64 + 64) * 4


def test_a_dry_run_names_every_problem(root: Path, tmp_path: Path) -> None:
    harness = Harness(root / "base", {"good": spoil(root / "lora", tmp_path / "good", "nothing")})
    folder = spoil(root / "lora", tmp_path / "bad", "nothing")
    tensors = load_file(folder / "adapter_model.safetensors")
    first = min(tensors)
    tensors[first] = tensors[first][:, :3].contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    report = harness.store.inspect(source(folder))
    assert (report.digest, report.num_pages) == ("", 0)
    assert any("has shape" in problem.description for problem in report.problems)
    assert [module.name for module in report.modules if not module.applied] == ["model.layers.0.mlp.down_proj"]
