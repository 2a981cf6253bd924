"""Tiny random encoders of real classes, as checkpoints of several kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import VOCAB, save_tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

POSITIONS = 128

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "bert": {"intermediate_size": 96, "max_position_embeddings": POSITIONS},
    "roberta": {"intermediate_size": 96, "max_position_embeddings": POSITIONS + 1},
    "modernbert": {
        "intermediate_size": 96,
        "max_position_embeddings": POSITIONS,
        "local_attention": 16,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "distilbert": {"dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4, "max_position_embeddings": POSITIONS},
}
"""What each class needs beside the common sizes."""

LINEAR: Mapping[str, list[str]] = {
    "bert": ["query", "key", "value", "dense"],
    "roberta": ["query", "value", "intermediate.dense", "output.dense"],
    "modernbert": ["Wqkv", "Wo", "Wi", "head.dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}
"""Linear modules, as target_modules takes them; those of BERT's and ModernBERT's heads among them."""


def make_encoder(
    kind: str, folder: Path, auto: Any = AutoModelForSequenceClassification, **overrides: Any
) -> PreTrainedModel:
    """A random float32 model, saved to `folder` as a standard Hugging Face folder. auto: the kind of checkpoint."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(kind, **{**_COMMON, **ENCODERS.get(kind, {}), **overrides})
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # biases start at 0 and norms at 1
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif "position" not in name and "token_type" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def own_logits(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    """[labels], by transformers alone."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([prompt])).logits[0]


def hidden_of(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    """The last hidden states [len(prompt), hidden], by transformers alone."""
    with torch.inference_mode():
        return model.base_model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
