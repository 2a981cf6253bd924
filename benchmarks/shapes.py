"""Random models of known shapes with random adapters: what a benchmark runs on where no real weights are to hand."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
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
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}
"""135m is SmolLM-135M's; tiny is for trying the script out."""

RANKS = (8, 16, 32)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(shape: str, folder: Path) -> LlamaForCausalLM:
    """A float32 Llama with random weights and a byte tokenizer, saved as a Hugging Face folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.05, eos_token_id=0
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
