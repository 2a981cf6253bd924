"""How far what one model says is from what another says: KL over prompts, by transformers and peft."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.errors import InvalidConfig, InvalidModel, one_line


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of one prompt.

    kl: KL(tuned || base + adapter) of the next token, in nats, the mean over the prompt's tokens. same_top: after how
    many of them both think the same token the likeliest, as a share.
    """

    prompt: str
    tokens: int
    kl: float
    same_top: float


def read_prompts(path: Path) -> list[str]:
    """A prompt a line; empty lines count for nothing. Raises InvalidConfig."""
    try:
        prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidConfig(f"--prompts is {str(path)!r}, which can't be read: {reason}") from None
    if not prompts:
        raise InvalidConfig(f"--prompts is {str(path)!r}, which holds no prompt: write one a line")
    return prompts


def measure_divergence(base: str, tuned: str, adapter: Path, prompts: Sequence[str]) -> list[Divergence]:
    """In float32; the models are in memory one after the other, and what the first one says on disk meanwhile.

    Raises InvalidModel where one can't be run.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(base)
        ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidModel(f"{base} has no tokenizer for --prompts: {one_line(error)}") from None
    found = []
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / f"{i}.npy" for i in range(len(ids))]
        for place, said in zip(places, _said(_load(tuned), ids), strict=True):
            numpy.save(place, said.numpy())
        served = _with_adapter(_load(base), adapter)
        for place, prompt, said in zip(places, prompts, _said(served, ids), strict=True):
            found.append(_compare(prompt, torch.from_numpy(numpy.load(place)), said))
    return found


def _load(name: str) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidModel(f"{name} can't be loaded as a causal language model: {one_line(error)}") from None


def _with_adapter(model: Any, adapter: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's advice on tied and on transposed weights
        return PeftModel.from_pretrained(model, str(adapter))


@torch.inference_mode()
def _said(model: Any, prompts: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Log-probabilities of the next token, float64 [tokens, vocabulary], of each prompt."""
    model.eval()
    for ids in prompts:
        try:
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0]
        except (RuntimeError, IndexError) as error:
            words = f"a prompt of {ids.shape[1]} tokens can't be run: {one_line(error)}"
            raise InvalidConfig(f"--prompts: {words}") from error
        yield logits.log_softmax(dim=-1, dtype=torch.float64)


def _compare(prompt: str, tuned: torch.Tensor, served: torch.Tensor) -> Divergence:
    kl = (tuned.exp() * (tuned - served)).sum(dim=-1).mean()
    same = (tuned.argmax(dim=-1) == served.argmax(dim=-1)).float().mean()
    return Divergence(prompt, len(tuned), float(kl), float(same))
