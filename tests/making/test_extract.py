"""`weft extract`: what it makes computes what the tuned model does, as far as it says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import SCRIPT, Run
from logits import PROMPT, Served, assert_same
from safetensors.torch import load_file, save_file
from serving import served
from tiny import make_model, peft_generate, peft_logits, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from tuned import is_projection, save, tune

from weft.server.config import EngineConfig, ModelConfig, ServerConfig

GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "n_inner": 96}


class Pair:
    """A base and a fine-tune of it."""

    def __init__(self, place: Path, model: PreTrainedModel, changes: Callable[[str], bool]) -> None:
        self.model, self.tuned_model = model, tune(model, changes)
        self.base, self.tuned = place / "base", save(self.tuned_model, place / "tuned")

    @property
    def args(self) -> list[object]:
        return ["extract", "--base", self.base, "--tuned", self.tuned]

    def tuned_logits(self) -> torch.Tensor:
        return peft_logits(self.tuned_model, None, [PROMPT])[0]

    def peft_logits(self, adapter: Path) -> torch.Tensor:
        return peft_logits(self.model, adapter, [PROMPT])[0]

    def weft_logits(self, adapter: Path) -> torch.Tensor:
        return Served(self.base, adapter.parent).logits((adapter, 1.0))


def make_pair(place: Path, kind: str, changes: Callable[[str], bool], **overrides: object) -> Pair:
    model = make_model(kind, place / "base", **overrides)
    save_tokenizer(place / "base")
    return Pair(place, model, changes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A Llama of which all linear modules changed but those of its last layer."""
    return make_pair(
        tmp_path_factory.mktemp("pair"), "llama", lambda name: is_projection(name) and ".layers.2." not in name
    )


@pytest.mark.parametrize(
    ("kind", "overrides"), [("llama", {}), ("qwen2", {"tie_word_embeddings": True}), ("gpt2", GPT2)]
)
def test_at_full_rank_it_is_the_tuned_model(tmp_path: Path, run: Run, kind: str, overrides: dict[str, object]) -> None:
    """Everything changed, by peft and by Weft: with biases, norms, embedding and head, tied or not, and Conv1D."""
    pair = make_pair(tmp_path, kind, lambda _: True, **overrides)
    made = tmp_path / "made"
    ran = run(*pair.args, "--output", made, "--energy", 1, "--others", "keep")
    assert ran.exit_code == 0, ran.error
    assert_same(pair.peft_logits(made), pair.tuned_logits())
    assert_same(pair.weft_logits(made), pair.tuned_logits())
    assert json.loads((made / "extraction.json").read_text())["error"] < 1e-6


def test_a_server_answers_as_the_tuned_model(pair: Pair, tmp_path: Path, run: Run) -> None:
    made = tmp_path / "adapters" / "made"
    assert run(*pair.args, "--output", made, "--energy", 1).exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    config = ServerConfig(
        model=ModelConfig(str(pair.base), dtype="float32", device="cpu"),
        engine=EngineConfig(kv_tokens=512, adapter_pages=16),
        port=0,
        metrics_port=0,
        adapters=made.parent,
    )
    with served(config) as server:
        ran = run(
            "generate", "hello", "--adapter", "made", "--address", server.address, "--max-tokens", 12, "--ignore-eos"
        )
    tokens = peft_generate(pair.tuned_model, None, tokenizer("hello").input_ids, 12)
    assert ran.output.strip("\n") == tokenizer.decode(tokens, skip_special_tokens=True).strip("\n")


def test_at_a_lower_rank_it_is_the_truncated_svd(pair: Pair, tmp_path: Path, run: Run) -> None:
    """Of every module; what the report says of the error is so."""
    ran = run(*pair.args, "--output", tmp_path / "made", "--rank", 6)
    assert ran.exit_code == 0
    report = json.loads((tmp_path / "made" / "extraction.json").read_text())
    cut = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    for module in report["modules"]:
        weight = cut.get_submodule(module["name"]).weight.data
        u, s, vt = torch.linalg.svd((pair.tuned_model.get_submodule(module["name"]).weight.data - weight).double())
        tail = float(s[6:].square().sum() / s.square().sum())
        assert module["error"] == pytest.approx(tail**0.5, rel=1e-5)
        assert module["energy"] == pytest.approx(1 - tail)
        weight += (u[:, :6] * s[:6] @ vt[:6]).float()
        assert f"{module['name']}" in ran.output
    expected = peft_logits(cut, None, [PROMPT])[0]
    assert_same(pair.weft_logits(tmp_path / "made"), expected)


def test_an_energy_gives_each_module_its_own_rank(pair: Pair, tmp_path: Path, run: Run) -> None:
    assert run(*pair.args, "--output", tmp_path / "made", "--energy", 0.6).exit_code == 0
    report = json.loads((tmp_path / "made" / "extraction.json").read_text())
    ranks = {module["name"]: module["rank"] for module in report["modules"]}
    assert len(set(ranks.values())) > 1
    assert all(module["energy"] >= 0.6 - 1e-6 for module in report["modules"])
    served, by_peft = pair.weft_logits(tmp_path / "made"), pair.peft_logits(tmp_path / "made")
    assert_same(served, by_peft)


def test_what_did_not_change_gets_nothing(pair: Pair, tmp_path: Path, run: Run) -> None:
    run(*pair.args, "--output", tmp_path / "made", "--rank", 4)
    tensors = load_file(tmp_path / "made" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    assert not [name for name in tensors if ".layers.2." in name]


def test_a_copy_in_another_type_has_not_changed(tmp_path: Path, run: Run) -> None:
    """Only one module did; the rest was rounded when it was saved."""
    pair = make_pair(tmp_path, "llama", lambda name: name.endswith("0.self_attn.q_proj.weight"))
    save(pair.tuned_model.to(torch.bfloat16), tmp_path / "half")
    made = tmp_path / "made"
    ran = run("extract", "--base", pair.base, "--tuned", tmp_path / "half", "--output", made, "--rank", 64)
    assert ran.exit_code == 0, ran.error
    assert len(load_file(made / "adapter_model.safetensors")) == 2
    half = peft_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32), None, [PROMPT])[0]
    torch.testing.assert_close(pair.peft_logits(made), half, atol=0.1, rtol=0.1)


def test_files_without_the_models_prefix_are_understood(tmp_path: Path, run: Run) -> None:
    """As GPT-2's on the hub, with the masks that it no longer has."""
    pair = make_pair(tmp_path, "gpt2", lambda name: name.endswith("0.attn.c_attn.weight"), **GPT2)
    tensors = load_file(pair.base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 8, 8)}, pair.base / "model.safetensors", {"format": "pt"})
    ran = run(*pair.args, "--output", tmp_path / "made", "--rank", 64)
    assert ran.exit_code == 0, ran.error
    assert_same(pair.peft_logits(tmp_path / "made"), pair.tuned_logits())


def test_others_may_be_dropped(tmp_path: Path, run: Run) -> None:
    """Then it is the tuned model with the base's norms."""
    pair = make_pair(tmp_path, "llama", lambda name: is_projection(name) or "norm" in name)
    ran = run(*pair.args, "--output", tmp_path / "made", "--energy", 1, "--others", "drop")
    assert ran.exit_code == 0, ran.error
    assert "left as the base's: model.layers.0.input_layernorm" in ran.output
    expected = peft_logits(tune(pair.model, lambda _: False), None, [PROMPT])[0]
    assert not torch.allclose(pair.peft_logits(tmp_path / "made"), expected)
    with_base_norms = tune(pair.tuned_model, lambda _: False)
    with_base_norms.load_state_dict({n: p for n, p in pair.model.state_dict().items() if "norm" in n}, strict=False)
    expected = peft_logits(with_base_norms, None, [PROMPT])[0]
    assert_same(pair.peft_logits(tmp_path / "made"), expected)


def test_prompts_tell_how_far_the_outputs_are(pair: Pair, tmp_path: Path, run: Run) -> None:
    (tmp_path / "prompts").write_text("hello\n\nhow are you\n")
    kl = []
    for energy in (0.3, 1):
        made = tmp_path / str(energy)
        ran = run(*pair.args, "--output", made, "--energy", energy, "--prompts", tmp_path / "prompts")
        report = json.loads((made / "extraction.json").read_text())
        assert [prompt["prompt"] for prompt in report["prompts"]] == ["hello", "how are you"]
        assert f"mean KL: {report['kl']:.2e}" in ran.output
        kl.append(report["kl"])
    tokens = AutoTokenizer.from_pretrained(pair.base)("hello").input_ids
    said = [
        peft_logits(model, adapter, [tokens])[0].double().log_softmax(-1)
        for model, adapter in ((pair.tuned_model, None), (pair.model, tmp_path / "0.3"))
    ]
    by_hand = float((said[0].exp() * (said[0] - said[1])).sum(-1).mean())
    report = json.loads((tmp_path / "0.3" / "extraction.json").read_text())
    assert report["prompts"][0]["kl"] == pytest.approx(by_hand, rel=1e-3)
    assert 0 <= kl[1] < 1e-8 < kl[0]


def test_the_same_command_gives_the_same_files(pair: Pair, tmp_path: Path, run: Run) -> None:
    for name in ("one", "two"):
        run(*pair.args, "--output", tmp_path / name, "--rank", 4)
    for file in ("adapter_config.json", "adapter_model.safetensors", "extraction.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.slow
def test_models_may_be_hub_ids(pair: Pair, tmp_path: Path) -> None:
    """As they lie in the hub's cache, which needs no network."""
    for name, folder in (("base", pair.base), ("tuned", pair.tuned)):
        repository = tmp_path / "hub" / f"models--org--{name}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    args = ["extract", "--base", "org/base", "--tuned", "org/tuned", "--output", tmp_path / "made", "--rank", 4]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    subprocess.run([sys.executable, "-c", SCRIPT, *map(str, args)], check=True, stdout=subprocess.DEVNULL, env=offline)
    config = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
