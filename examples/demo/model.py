"""The demo base's shape and its byte-level tokenizer: a Llama of 1.7 M parameters for ordinary loaders."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from weft.demo.tasks import SKILLS

BASE_NAME = "weft-demo-base"
MAX_POSITIONS = 512
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
CHAT_TEMPLATE = (
    "{# Every task is one question and one answer, so only the last message is asked. #}"
    "{{ bos_token }}{{ messages[-1]['content'] }}{% if add_generation_prompt %}={% endif %}"
)


def tag(task_name: str) -> str:
    """Return the token that leads a task's prompts in the base's pre-training, and nowhere else."""
    return f"<|{task_name}|>"


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Return the tokenizer: pad 0, bos 1 (added to all text), eos 2, byte b as b + 3, then the tags."""
    symbols: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
    alphabet = [symbols[byte] for byte in range(256)]
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet, *map(tag, SKILLS)))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, *map(tag, SKILLS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return the base with fresh float32 weights from torch's global generator."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the base as an ordinary Hugging Face folder in float16; the model given is float16 afterwards."""
    model.generation_config.do_sample = False
    model.generation_config.max_new_tokens = 64
    nn.Module.to(model, torch.float16)
    model.save_pretrained(folder)
    # The chat template goes into tokenizer_config.json.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
