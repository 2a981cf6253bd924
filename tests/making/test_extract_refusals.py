"""`weft extract` says in one line what can't be extracted, and leaves nothing behind."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Run
from disks import needs_a_disk, on_disk
from safetensors.torch import load_file, save_file
from tiny import make_model, save_tokenizer
from transformers import AutoModelForCausalLM
from tuned import is_projection, save, tune

Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals") / "base"
    make_model("llama", folder, num_hidden_layers=1)
    return folder


@pytest.fixture
def refused(base: Path, tmp_path: Path, run: Run) -> Callable[..., str]:
    """What is said of a fine-tune; there must be no output."""

    def refused(tuned: Path | str, *options: object, exit_code: int = 1, of: Path | str = base) -> str:
        output = tmp_path / "made"
        cut = options if {"--rank", "--energy"} & set(options) else ("--rank", 4, *options)
        ran = run("extract", "--base", of, "--tuned", tuned, "--output", output, *cut)
        assert (ran.exit_code, output.exists()) == (exit_code, False)
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".made")] == []
        return ran.error_line

    return refused


@pytest.fixture
def changed(base: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """The base with its tensors changed."""

    def changed(change: Change) -> Path:
        folder = tmp_path / "tuned"
        shutil.copytree(base, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return changed


def noise(tensors: dict[str, torch.Tensor], *names: str) -> None:
    for name in names:
        tensors[name] = tensors[name] + 0.1


Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(Q), rf"it lacks {Q}$"),
        (lambda t: t.update(new=torch.ones(2), newer=torch.ones(2)), "it has besides new, newer$"),
        (lambda t: t.update({Q: torch.ones(8, 8)}), rf"its shapes differ .*: {Q} \[8, 8\] for \[64, 64\]$"),
        (
            lambda t: t.update(
                {"model.embed_tokens.weight": torch.ones(300, 64), "lm_head.weight": torch.ones(300, 64)}
            ),
            r"\(another vocabulary or size\): lm_head.weight \[300, 64\] for \[260, 64\], model.embed_tokens.weight",
        ),
        (lambda t: t.update({Q: torch.ones(64, 64, dtype=torch.int8)}), rf"quantised .*: {Q} \(I8\)$"),
        (lambda t: t.update({Q: torch.full((64, 64), torch.nan)}), f"NaN or infinite values in {Q}$"),
        (lambda t: None, "are the same: there is nothing to extract$"),
        (lambda t: noise(t, Q, NORM), "also model.layers.0.input_layernorm: --others keep"),
        (lambda t: noise(t, NORM), "also model.layers.0.input_layernorm: --others keep"),
    ],
)
def test_a_model_that_is_no_fine_tune(
    refused: Callable[..., str], changed: Callable[[Change], Path], change: Change, said: str
) -> None:
    line = refused(changed(change))
    assert re.search(said, line), line


def test_norms_alone_make_no_adapter(refused: Callable[..., str], changed: Callable[[Change], Path]) -> None:
    line = refused(changed(lambda t: noise(t, NORM)), "--others", "keep")
    assert line == "no linear module's weight changed: there is nothing that a low rank could hold"


def test_settings_that_differ(refused: Callable[..., str], changed: Callable[[Change], Path]) -> None:
    """Weights of the same shapes may compute something else."""
    tuned = changed(lambda t: noise(t, Q))
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert refused(tuned).endswith("its config.json differs in rms_norm_eps 0.1 for 1e-06")


def test_a_rank_above_a_matrix(refused: Callable[..., str], changed: Callable[[Change], Path]) -> None:
    k = "model.layers.0.self_attn.k_proj.weight"
    line = refused(changed(lambda t: noise(t, Q, k)), "--rank", 33, exit_code=2)
    name = k.removesuffix(".weight")
    assert line == f"--rank is 33, above the full rank of {name} [32, 64]: give 32 or less, or --energy"


def test_experts_are_refused_by_name(tmp_path: Path, refused: Callable[..., str], run: Run) -> None:
    model = make_model("mixtral", tmp_path / "moe", num_hidden_layers=1, num_local_experts=2)
    save(tune(model, lambda name: is_projection(name) or "experts" in name), tmp_path / "tuned")
    line = refused(tmp_path / "tuned", "--others", "keep", of=tmp_path / "moe")
    assert line.startswith("an adapter can't hold model.layers.0.block_sparse_moe.experts.0.w1.weight, ")
    assert line.endswith("--others drop leaves the base's")
    args = ("--base", tmp_path / "moe", "--tuned", tmp_path / "tuned", "--output", tmp_path / "made")
    assert run("extract", *args, "--rank", 4, "--others", "drop").exit_code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give one of --rank and --energy"),
        (("--rank", 4, "--energy", 0.5), "give one of --rank and --energy"),
        (("--rank", 0), "0 is not in the range x>=1"),
        (("--energy", 1.5), "1.5 is not in the range 0<x<=1"),
        (("--energy", "nan"), "'nan' is not a finite number"),
        (
            ("--rank", 4, "--prompts", "nowhere"),
            "--prompts is 'nowhere', which can't be read: No such file or directory",
        ),
        (("--rank", 4, "--prompts", __file__ + "/x"), "which can't be read: Not a directory"),
    ],
)
def test_options_that_make_no_sense(
    base: Path, tmp_path: Path, run: Run, options: tuple[object, ...], said: str
) -> None:
    ran = run("extract", "--base", base, "--tuned", base, "--output", tmp_path / "made", *options)
    assert ran.exit_code == 2
    assert said in ran.error_line


def test_prompts_that_are_none(base: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "prompts").write_text("\n \n")
    assert refused(base, "--prompts", tmp_path / "prompts", exit_code=2).endswith("holds no prompt: write one a line")


def test_an_output_that_is_taken(base: Path, tmp_path: Path, run: Run) -> None:
    ran = run("extract", "--base", base, "--tuned", base, "--output", base, "--rank", 4)
    assert (ran.exit_code, ran.error_line) == (2, f"--output is '{base}', which is there already: name a new folder")


def test_models_that_are_none(base: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "nowhere").endswith("is not a folder: name a Hugging Face model folder or a hub id")
    assert refused(tmp_path / "empty").endswith("holds no config.json: it is not a Hugging Face model folder")
    shutil.copy(base / "config.json", tmp_path / "empty")
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert refused(tmp_path / "empty").endswith("lacks gone.safetensors")
    (tmp_path / "empty" / "model.safetensors.index.json").write_text("[]")
    assert refused(tmp_path / "empty").endswith("model.safetensors.index.json is no index of shards")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"nothing of the kind")
    assert "model.safetensors can't be read: " in refused(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "t5"}')
    assert "is no causal language model that transformers knows" in refused(tmp_path / "empty")


@needs_a_disk
@pytest.mark.slow
def test_a_full_disk_leaves_nothing(base: Path, tmp_path: Path) -> None:
    disk, tuned = tmp_path / "disk", tmp_path / "tuned"
    disk.mkdir()
    save(tune(AutoModelForCausalLM.from_pretrained(base), is_projection), tuned)
    script = (
        "import sys; from pathlib import Path; from weft.server.cli import main; code = main(sys.argv[1:]); "
        "sys.stderr.write(str([path.name for path in Path(sys.argv[7]).parent.iterdir()])); sys.exit(code)"
    )
    args = ["extract", "--base", base, "--tuned", tuned, "--output", disk / "made", "--energy", 1]
    command = on_disk(disk, 64, [sys.executable, "-c", script, *map(str, args)])
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.endswith("which can't be written: No space left on device\n[]")


def test_numbers_that_a_type_cannot_hold(refused: Callable[..., str], changed: Callable[[Change], Path]) -> None:
    tuned = changed(lambda t: t.update({Q: t[Q] + 1e10 * torch.eye(64)}))
    name = f"base_model.model.{Q.removesuffix('.weight')}.lora_A.weight"
    assert refused(tuned, "--dtype", "float16", exit_code=2) == f"--dtype float16 can't hold {name}: take another"


def test_a_prompt_that_is_too_long(tmp_path: Path, refused: Callable[..., str]) -> None:
    """For a model with a table of positions."""
    base = tmp_path / "gpt2"
    model = make_model("gpt2", base, n_embd=64, n_layer=1, n_head=4, n_inner=96, max_position_embeddings=8)
    save_tokenizer(base)
    save(tune(model, lambda name: name.endswith("c_fc.weight")), tmp_path / "tuned")
    (tmp_path / "prompts").write_text("ten tokens or more")
    line = refused(tmp_path / "tuned", "--prompts", tmp_path / "prompts", exit_code=2, of=base)
    assert line.startswith("--prompts: a prompt of 19 tokens can't be run: ")
