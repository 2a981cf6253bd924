"""Random models of known shapes with random adapters: what a benchmark runs on where no real weights are to hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "demo": {
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 272,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
"""135m is SmolLM-135M's, 1.1b TinyLlama's, demo that of `make demo`; tiny is for trying the script out."""

RANKS = (8, 16, 32)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(shape: str, folder: Path, max_position_embeddings: int = 2048) -> LlamaForCausalLM:
    """A float32 Llama with random weights and a byte tokenizer, saved as a Hugging Face folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return model


def make_adapters(model: LlamaForCausalLM, folder: Path, count: int) -> dict[str, Path]:
    """Adapters of rank 8, 16, 32, 8, … on all seven linear modules, saved by peft, with A and B drawn at random."""
    paths = {}
    for index in range(count):
        rank = RANKS[index % len(RANKS)]
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MODULES, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        paths[f"a{index:02d}"] = folder / f"a{index:02d}"
        adapted.save_pretrained(paths[f"a{index:02d}"])
        adapted.unload()
    return paths


def module_shapes(shape: str) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every linear module but the head."""
    of = SHAPES[shape]
    hidden, inner = of["hidden_size"], of["intermediate_size"]
    keys = hidden // of["num_attention_heads"] * of["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return {f"model.layers.{i}.{name}": dims for i in range(of["num_hidden_layers"]) for name, dims in layer.items()}


def write_adapters(shape: str, folder: Path, ranks: Mapping[str, int]) -> None:
    """Adapters by name and rank, as `make_adapters` makes them, but written at once: peft takes a second each."""
    modules = module_shapes(shape)
    for seed, (name, rank) in enumerate(ranks.items()):
        sizes = {f"base_model.model.{module}.lora_A.weight": (rank, d_in) for module, (d_in, _) in modules.items()}
        sizes |= {f"base_model.model.{module}.lora_B.weight": (d_out, rank) for module, (_, d_out) in modules.items()}
        counts = [rows * columns for rows, columns in sizes.values()]
        numbers = torch.randn(sum(counts), generator=torch.Generator().manual_seed(seed)) * 0.02
        tensors = {key: part.view(size) for (key, size), part in zip(sizes.items(), numbers.split(counts), strict=True)}
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text(json.dumps({**config, "target_modules": MODULES}))
        save_file(tensors, folder / name / "adapter_model.safetensors")
