"""Tokenizers of the three common kinds, and answers drawn at random within a constraint."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from weft.server.engine.constraints import Compiler, Constraint, Kind, Spec, allowed_tokens, make_vocabulary
from weft.server.engine.text import OutputText

EXTRA_IDS = 5
"""That the model has and the tokenizer has not."""

_CLOSING = frozenset('"]},:0123456789')
_TRAINING = [
    '{"name": "Ada", "tags": ["one", "two"], "size": -12.5e3, "done": true, "next": null}',
    "the quick brown fox jumps over the lazy dog; Über café 日本語 😀😀",
]


def byte_tokens() -> PreTrainedTokenizerFast:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{letter: 3 + i for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def byte_level_merges() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have: tokens of several bytes, which may end inside of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2, Mistral and Gemma have: pieces of words with their space as ▁, and a token for every other byte."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["▁", "▁a", "▁the", "▁true", "▁null", "▁1", '":', '",', "é", "日本", "▁fox", "alse", '▁"']
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *words]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS: Mapping[str, PreTrainedTokenizerFast] = {
    "bytes": byte_tokens(),
    "merges": byte_level_merges(),
    "fallback": byte_fallback(),
}


@dataclass
class Vocabulary:
    """A tokenizer with a compiler for it, for a model that has some ids more."""

    tokenizer: PreTrainedTokenizerFast

    def __post_init__(self) -> None:
        self.size = len(self.tokenizer) + EXTRA_IDS
        self.eos = self.tokenizer.eos_token_id
        self._compiler = Compiler(make_vocabulary(self.tokenizer, self.size, [self.eos]))

    def compile(self, kind: Kind, *texts: str) -> Constraint:
        return self._compiler.compile(Spec(kind, texts))

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that others go before."""
        before = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        return list(self.tokenizer(f"\n{text}", add_special_tokens=False)["input_ids"][len(before) :])

    def allowed(self, matcher: object) -> list[int]:
        return allowed_tokens([matcher], self.size, torch.device("cpu"))[0].nonzero()[:, 0].tolist()

    def text(self, ids: list[int]) -> str:
        """As the engine gives it out."""
        output = OutputText(
            lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
        return "".join(output.push(token)[1] for token in ids) + output.flush()

    def draw(self, constraint: Constraint, seed: int, max_tokens: int = 400) -> tuple[str, bool]:
        """An answer of allowed tokens, those that close something more often; and whether it is complete."""
        rng, matcher = random.Random(seed), constraint.matcher()
        drawn: list[int] = []
        while len(drawn) < max_tokens:
            allowed = self.allowed(matcher)
            assert matcher.error is None, str(matcher.error)
            assert allowed, "nothing may follow"
            assert max(allowed) < len(self.tokenizer), "an id without text"
            if self.eos in allowed and (len(allowed) == 1 or rng.random() < 0.3):
                return self.text(drawn), True
            allowed = [token for token in allowed if token != self.eos]
            closing = [token for token in allowed if self.tokenizer.convert_ids_to_tokens(token) in _CLOSING]
            token = rng.choice(closing if closing and rng.random() < 0.6 else allowed)
            matcher.accept(token)
            drawn.append(token)
            if matcher.is_over:
                return self.text(drawn), True
        return self.text(drawn), False
