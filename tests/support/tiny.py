"""Tiny random models of real classes, and PEFT adapters for them with weights that matter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB = 260
"""Three special tokens, then a token a byte; one id more that no text gives."""

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 12, "head_dim": 16},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
    "phi3": {},
}
"""What each class needs beside the common sizes."""


def make_model(kind: str, folder: Path, **overrides: Any) -> PreTrainedModel:
    """A random float32 model of a class, saved to `folder` as a standard Hugging Face folder."""
    torch.manual_seed(7)
    settings = {**_COMMON, **ARCHITECTURES.get(kind, {}), **overrides}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **settings), attn_implementation="eager", dtype=torch.float32
    )
    model.save_pretrained(folder)
    return model.eval()


def save_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """A byte-level tokenizer without merges that puts <bos> first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{letter: 3 + i for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def linear_names(kind: str) -> list[str]:
    """The names of a class's linear modules, as target_modules takes them."""
    if kind == "phi3":
        return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    if kind == "gpt2":
        return ["c_attn", "c_proj", "c_fc"]
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(model: PreTrainedModel, folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter saved by peft itself, with A and B drawn so that its delta is about as large as the base's output.

    Whatever else is trained is moved away from its start. The model is not touched.
    """
    settings = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **config}
    with _quiet_peft():
        peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if ".lora_A." in name or ".lora_embedding_A." in name:
                parameter.copy_(noise * 0.2)
            elif name.endswith(".lora_B.default.weight") or ".lora_embedding_B." in name:
                rank = settings["r"] if ".experts." in name else parameter.shape[-1]
                parameter.copy_(noise * 0.5 / rank**0.5)
            else:
                parameter.add_(noise * 0.2)
    with _quiet_peft():
        peft_model.save_pretrained(folder)
    return folder


def make_classifier(base: Path, folder: Path, labels: Sequence[str], seed: int = 0, **config: Any) -> Path:
    """A sequence classifier's adapter of the base in a folder, and beside it the config as transformers saves it."""
    problem_type = config.pop("problem_type", None)
    model = _classifier(base, len(labels), id2label=dict(enumerate(labels)), problem_type=problem_type)
    make_adapter(model, folder, seed, **{"task_type": "SEQ_CLS", **config})
    model.config.save_pretrained(folder)
    return folder


def peft_classify(base: Path, folder: Path, num_labels: int, prompt: Sequence[int]) -> torch.Tensor:
    """Logits [labels] of a sequence classifier by transformers and peft alone."""
    served = _with_peft(_classifier(base, num_labels), folder).eval()
    with torch.inference_mode():
        return served(input_ids=torch.tensor([prompt])).logits[0]


def make_feature_extractor(base: Path, folder: Path, seed: int = 0, **config: Any) -> Path:
    """An adapter of the base's backbone alone, whose modules have shorter names."""
    return make_adapter(_backbone(base), folder, seed, **{"task_type": "FEATURE_EXTRACTION", **config})


def peft_features(base: Path, folder: Path, prompt: Sequence[int]) -> torch.Tensor:
    """Last hidden states [len(prompt), hidden] of the backbone with such an adapter, by transformers and peft alone."""
    served = _with_peft(_backbone(base), folder).eval()
    with torch.inference_mode():
        return served(input_ids=torch.tensor([prompt])).last_hidden_state[0]


def _backbone(base: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(base, attn_implementation="eager", dtype=torch.float32)


def _classifier(base: Path, num_labels: int, **settings: Any) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=num_labels,
        ignore_mismatched_sizes=True,  # of a head that the base brings
        attn_implementation="eager",
        dtype=torch.float32,
        **settings,
    )


def peft_logits(model: PreTrainedModel, folder: Path | None, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Logits [len(prompt), vocab] of each prompt by transformers and peft alone."""
    served = _with_peft(model, folder)
    with torch.inference_mode():
        return [served(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]


def peft_hidden(model: PreTrainedModel, folder: Path | None, prompt: Sequence[int]) -> torch.Tensor:
    """Last hidden states [len(prompt), hidden] of the backbone by transformers and peft alone."""
    served = _with_peft(model, folder)
    backbone = (served.get_base_model() if isinstance(served, PeftModel) else served).base_model
    with torch.inference_mode():
        return backbone(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0]


def peft_generate(model: PreTrainedModel, folder: Path | None, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy continuation by transformers and peft alone; runs to its full length."""
    served = _with_peft(model, folder)
    with torch.inference_mode():
        output = served.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=max_new_tokens,
            min_new_tokens=max_new_tokens,
            eos_token_id=None,
            do_sample=False,
        )
    return output[0, len(prompt) :].tolist()


def _with_peft(model: PreTrainedModel, folder: Path | None) -> PreTrainedModel | PeftModel:
    """A copy with the adapter, since peft does not take all of itself off a model again."""
    with _quiet_peft():
        return PeftModel.from_pretrained(copy.deepcopy(model), folder) if folder else model


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """Without peft's advice on merging, tying and saving."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
