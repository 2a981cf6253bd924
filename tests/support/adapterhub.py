"""The models of the adapters under tests/making/adapterhub, made here as they were made there.

Runs with any transformers: AdapterHub's library wants an older one than the server does.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FOLDER = Path(__file__).parents[1] / "making" / "adapterhub"
LOGITS = "logits.safetensors"
PROMPT = (1, 5, 9, 2, 7)
SIZES = {
    "llama": {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    },
    "gpt2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32},
}


def make_plain(kind: str) -> PreTrainedModel:
    """A model whose weights nobody has to keep."""
    config = AutoConfig.for_model(kind, vocab_size=16, bos_token_id=1, eos_token_id=2, **SIZES[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    fill(model.named_parameters(), 0.6)
    return model


@torch.no_grad()
def fill(parameters: Iterable[tuple[str, nn.Parameter]], amplitude: float) -> None:
    """Numbers that are the same everywhere, each parameter's its own."""
    for number, (_, parameter) in enumerate(sorted(parameters, key=lambda named: named[0])):
        steps = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter.copy_((torch.sin(1.7 * steps + number) * amplitude).view(parameter.shape))
