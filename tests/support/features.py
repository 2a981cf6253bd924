"""Everything that PEFT's LoRA can hold, by name, for models of several classes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import make_adapter, make_model, save_tokenizer
from transformers import PreTrainedModel

INVOCATION = [40, 41, 42]

LINEAR: Mapping[str, list[str]] = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "up_proj"],
    "gemma3_text": ["q_proj", "o_proj", "gate_proj"],
    "phi3": ["qkv_proj", "gate_up_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "mixtral": ["q_proj", "v_proj"],
    "gpt_oss": ["k_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj"],
    "qwen2_moe": ["q_proj", "shared_expert_gate"],
    "phi": ["q_proj", "dense"],
}
"""Some linear modules of each class; "tied llama" is a llama whose head is its embedding."""

CLASSES = [
    "llama",
    "tied llama",
    "qwen2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "mixtral",
    "gpt_oss",
    "qwen3_moe",
    "qwen2_moe",
    "phi",
]
EMBEDDING = {"gpt2": "wte"}
NORMS = {"gpt2": ["ln_f"], "gemma3_text": ["model.norm", "input_layernorm"]}
EXPERTS = ("mixtral", "gpt_oss", "qwen3_moe", "qwen2_moe")
ROUTER = {
    "mixtral": "gate.weight",
    "gpt_oss": "router.weight",
    "qwen3_moe": "gate.weight",
    "qwen2_moe": "mlp.gate.weight",
}
LEGACY = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2"), "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj")}
"""How adapters named the parts of single experts before transformers 5."""
OVERRIDES: Mapping[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 48},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def features(name: str) -> dict[str, dict[str, Any]]:
    """LoraConfigs by what is special about them."""
    kind = name.removeprefix("tied ")
    linear, embedding = LINEAR[kind], EMBEDDING.get(kind, "embed_tokens")
    norms = NORMS.get(kind, ["norm"])
    found: dict[str, dict[str, Any]] = {
        "plain": {"target_modules": linear},
        "patterns": {
            "target_modules": linear,
            "rank_pattern": {linear[0]: 4, rf"layers\.1\..*{linear[1]}": 24},
            "alpha_pattern": {linear[1]: 40},
        },
        "rslora": {"target_modules": linear, "use_rslora": True, "r": 12},
        "regex, some layers": {"target_modules": rf".*\.[02]\..*({'|'.join(linear)})"},
        "layers_to_transform": {"target_modules": linear, "layers_to_transform": [1]},
        "all-linear": {"target_modules": "all-linear", "exclude_modules": [linear[0]]},
        "lora_bias": {"target_modules": linear, "lora_bias": True},
        "dora": {"target_modules": linear, "use_dora": True, "r": 5},
        "dora, embedding, head": {"target_modules": [*linear, embedding, "lm_head"], "use_dora": True},
        "embedding, head": {"target_modules": [*linear, embedding, "lm_head"], "r": 6},
        "saved head": {"target_modules": linear, "modules_to_save": ["lm_head"]},
        "saved embedding": {"target_modules": linear, "modules_to_save": [embedding]},
        "saved norms": {"target_modules": linear, "modules_to_save": norms},
        "tokens": {"target_modules": linear, "trainable_token_indices": {embedding: [9, 5, 30]}},
        "tokens of both": {"target_modules": linear, "trainable_token_indices": {embedding: [9, 5], "lm_head": [7]}},
        "one layer, and the head by its full name": {
            "target_modules": [*linear, "lm_head"],
            "layers_to_transform": [1],
        },
        "activated": {"target_modules": linear[:1], "alora_invocation_tokens": INVOCATION},
    }
    if kind in ("qwen2", "gpt2"):
        found["bias all"] = {"target_modules": linear, "bias": "all"}
        found["bias lora_only, dora"] = {"target_modules": linear, "bias": "lora_only", "use_dora": True}
    if kind in EXPERTS:
        both = ["experts.gate_up_proj", "experts.down_proj"]
        found["experts"] = {"target_modules": linear, "target_parameters": both}
        found["experts, down alone"] = {"target_modules": [], "target_parameters": both[1:], "r": 3}
        found["router"] = {"target_modules": linear, "target_parameters": [ROUTER[kind]]}
        del found["all-linear"]
    if kind == "gpt2":
        found["fan_in_fan_out"] = {"target_modules": linear, "fan_in_fan_out": True}
        found["saved positions"] = {"target_modules": linear, "modules_to_save": ["wpe"]}
    if name.startswith("tied "):
        found["tied head, tokens"] = {
            "target_modules": [*linear, "lm_head"],
            "trainable_token_indices": [9, 5],
        }
        found["tied embedding"] = {"target_modules": [*linear, embedding], "ensure_weight_tying": True}
        found["tied saved"] = {"target_modules": linear, "modules_to_save": [embedding], "ensure_weight_tying": True}
    return found


def make_all(name: str, folder: Path) -> tuple[PreTrainedModel, dict[str, Path]]:
    """A model of the class in `folder`/base, and an adapter for each feature, by its name."""
    kind = name.removeprefix("tied ")
    overrides = {"tie_word_embeddings": name.startswith("tied "), **OVERRIDES.get(kind, {})}
    model = make_model(kind, folder / "base", **overrides)
    save_tokenizer(folder / "base")
    adapters = {
        feature: make_adapter(model, folder / f"adapter-{i}", seed=i, **config)
        for i, (feature, config) in enumerate(features(name).items())
    }
    if kind in LEGACY:
        adapters["single experts"] = make_legacy_adapter(model, folder / "legacy", *LEGACY[kind])
    return model, adapters


def make_legacy_adapter(model: PreTrainedModel, folder: Path, block: str, *projections: str) -> Path:
    """Rows for every single expert, as older versions of transformers and peft saved them."""
    generator = torch.Generator().manual_seed(3)
    gate, up, down = projections
    tensors = {}
    for layer in range(model.config.num_hidden_layers):
        experts = model.get_submodule(f"model.layers.{layer}.mlp.experts")
        count, width, d_in = experts.gate_up_proj.shape
        for expert, (name, d_from, d_to) in itertools.product(
            range(count), ((gate, d_in, width // 2), (up, d_in, width // 2), (down, width // 2, d_in))
        ):
            key = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(4, d_from, generator=generator) * 0.2
            tensors[f"{key}.lora_B.weight"] = torch.randn(d_to, 4, generator=generator) * 0.25
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    LoraConfig(r=4, lora_alpha=8, target_modules=[*projections], task_type="CAUSAL_LM").save_pretrained(folder)
    return folder
