"""Faster functions for a model's parts: which get them, that they give the same, and who is left alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from features import CLASSES, OVERRIDES
from harness import Harness
from natives import builds
from parity import Case
from tiny import ARCHITECTURES, make_model, save_tokenizer
from torch import nn
from transformers import Gemma3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from weft.errors import InvalidModel
from weft.server.engine import load
from weft.server.engine.fusing import Fusion
from weft.server.engine.probe import TOLERANCE
from weft.server.engine.proving import with_function

pytestmark = pytest.mark.skipif(not builds(), reason="the C library was not built")

PARTS = {
    **dict.fromkeys(
        ["llama", "qwen2", "mistral", "phi3", "gemma", "granite", "smollm3"], "7 Norm, 3 Attention, 3 Mlp, 3 Layer"
    ),
    **dict.fromkeys(["qwen3", "gemma2", "olmo2"], "13 Norm, 3 Attention, 3 Mlp, 3 Layer"),
    "gemma3_text": "19 Norm, 3 Attention, 3 Mlp, 3 Layer",
    "cohere2": "4 Norm, 3 Attention, 3 Mlp, 3 ParallelLayer",
    "phi": "3 Attention, 3 Mlp, 3 ParallelLayer",
    **dict.fromkeys(["gpt2", "starcoder2"], "3 Attention, 3 Mlp, 3 Layer"),
    **dict.fromkeys(["mixtral", "gpt_oss"], "7 Norm, 3 Attention, 3 Layer"),
    "qwen3_moe": "13 Norm, 3 Attention, 3 Layer",
    "qwen2_moe": "7 Norm, 3 Attention, 3 Mlp, 3 Layer",
    "gpt_neox": "3 Mlp",
    "opt": "",
}
"""What is fused of three layers of each class, its last norm included. PyTorch's LayerNorm is left as it is."""

IN_BFLOAT16 = {"olmo2": "13 Norm, 3 Mlp"}
"""Its rotary tables stay in float32."""


def harness(kind: str, folder: Path, dtype: str = "float32", **settings: object) -> Harness:
    make_model(kind, folder, **{**OVERRIDES.get(kind, {}), **settings})
    save_tokenizer(folder)
    return Harness(folder, dtype=dtype)


def fusion_of(served: Harness) -> Fusion:
    fusion = served.engine._model.fusion
    assert fusion is not None
    return fusion


def parts(served: Harness) -> str:
    counts = Counter(type(function).__name__ for function in fusion_of(served).fused.values())
    names = ("Norm", "Attention", "Mlp", "Layer", "ParallelLayer")
    return ", ".join(f"{counts[name]} {name}" for name in names if counts[name])


def logits(served: Harness) -> torch.Tensor:
    case = Case(served.engine._model.model, served, {})
    prompts = [[3 + (7 * i + j) % 200 for j in range(5 + 9 * i)] for i in range(3)]
    return torch.cat(served.logits([case.request(prompt, None) for prompt in prompts], 20))


def test_every_class_of_the_parity_tests_is_counted_here() -> None:
    assert {name.removeprefix("tied ") for name in CLASSES} | set(ARCHITECTURES) <= set(PARTS)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_parts_give_what_their_classes_give(kind: str, dtype: str, tmp_path: Path) -> None:
    served = harness(kind, tmp_path, dtype)
    expected = IN_BFLOAT16.get(kind, PARTS[kind]) if dtype == "bfloat16" else PARTS[kind]
    assert parts(served) == expected
    fused = logits(served)
    fusion_of(served).undo()
    own = logits(served)
    limit = 1e-5 if dtype == "float32" else TOLERANCE[torch.bfloat16]
    assert (fused - own).float().norm() / own.float().norm() <= limit


class OddNorm(LlamaRMSNorm):
    """eps outside of the root."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class OddMlp(LlamaMLP):
    """One unit more than the class has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))


class OddAttention(LlamaAttention):
    """Queries grow with the position, from one on that short prompts never reach."""

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor, **rest: object) -> object:
        far = 1 + (position_ids // 200)[..., None].to(hidden_states.dtype)
        output, weights = super().forward(hidden_states=hidden_states, **rest)
        return output * far, weights


class OddLayer(LlamaDecoderLayer):
    """What comes in is added twice."""

    def forward(self, hidden_states: torch.Tensor, **rest: object) -> torch.Tensor:
        return super().forward(hidden_states, **rest) + hidden_states


@pytest.mark.parametrize(
    ("name", "odd", "left"),
    [
        ("LlamaRMSNorm", OddNorm, "3 Attention, 3 Mlp, 3 Layer"),
        ("LlamaMLP", OddMlp, "7 Norm, 3 Attention, 3 Layer"),
        ("LlamaAttention", OddAttention, "7 Norm, 3 Mlp"),
        ("LlamaDecoderLayer", OddLayer, "7 Norm, 3 Attention, 3 Mlp"),
    ],
)
def test_what_computes_something_else_is_left_alone(
    name: str, odd: type[nn.Module], left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"transformers.models.llama.modeling_llama.{name}", odd)
    assert parts(harness("llama", tmp_path, rms_norm_eps=1e-3)) == left


@pytest.mark.parametrize("act", ["relu", "quick_gelu", "mish"])
def test_an_activation_that_is_not_known_is_left_alone(act: str, tmp_path: Path) -> None:
    assert parts(harness("llama", tmp_path, hidden_act=act)) == "7 Norm, 3 Attention, 3 Layer"


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "silu"])
def test_known_activations_are_told_apart(act: str, tmp_path: Path) -> None:
    served = harness("llama", tmp_path, hidden_act=act)
    assert parts(served) == PARTS["llama"]
    fused = logits(served)
    fusion_of(served).undo()
    assert (fused - logits(served)).norm() / fused.norm() <= 1e-5


def test_a_model_that_is_wrong_with_faster_functions_is_served_with_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probe = load.probe

    def probe_with_a_fault(paged: object, *args: object) -> float:
        if paged.fusion.fused:
            with_function(paged.model.get_submodule("model.norm"), lambda x: x * 3 + 1)
        return probe(paged, *args)

    monkeypatch.setattr(load, "probe", probe_with_a_fault)
    served = harness("llama", tmp_path)
    assert parts(served) == ""
    assert "right only without faster functions" in caplog.text


def test_a_model_that_is_wrong_either_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> float:
        raise InvalidModel("wrong")

    monkeypatch.setattr(load, "probe", failing)
    with pytest.raises(InvalidModel, match="wrong"):
        harness("llama", tmp_path)


def test_norms_that_are_kept_in_float32_in_a_bfloat16_model_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gemma3ForCausalLM, "_keep_in_fp32_modules_strict", ["norm", "layernorm"])
    served = harness("gemma3_text", tmp_path, "bfloat16")
    assert parts(served) == "3 Attention, 3 Mlp, 3 Layer"
    assert logits(served).isfinite().all()
