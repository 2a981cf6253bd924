"""What every adapter of the demo answers, by transformers and peft alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.demo import tasks

DEMO = Path(tasks.__file__).parent
MAX_TOKENS = 24
BASE = ""


@dataclass(frozen=True, slots=True)
class Truth:
    """Greedy answers by adapter and prompt, up to the end of text, which is not in them."""

    prompts: tuple[tuple[int, ...], ...]
    answers: Mapping[tuple[str, tuple[int, ...]], tuple[int, ...]]
    eos: int

    @property
    def adapters(self) -> list[str]:
        return sorted({adapter for adapter, _ in self.answers} - {BASE})

    def is_right(self, adapter: str, prompt: tuple[int, ...], tokens: list[int], *, is_whole: bool) -> bool:
        """Whether the tokens are the answer, or, where it was not read to its end, how it begins."""
        answer = self.answers[adapter, prompt]
        got = [token for token in tokens if token != self.eos] if is_whole else tokens[: len(answer)]
        return got == list(answer if is_whole else answer[: len(tokens)])


def learn_truth(num_adapters: int | None = None, tell: Callable[[str], None] = lambda words: None) -> Truth:
    """Ask the base and so many of the adapters (None: all) one prompt of each one's task."""
    names = [name for name in tasks.TASKS if (DEMO / "adapters" / name).is_dir()][:num_adapters]
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    examples = [next(iter(tasks.TASKS[name].examples(tasks.HELD_OUT, 1, 0))) for name in names]
    prompts = tuple(tuple(tokenizer(tasks.prompt(example.text)).input_ids) for example in examples)
    answers = {}
    for name in (BASE, *names):
        tell(f"what {name or 'the base'} answers by transformers and peft")
        model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
        served = PeftModel.from_pretrained(model, DEMO / "adapters" / name) if name else model
        for prompt in prompts:
            answers[name, prompt] = _greedy(served.eval(), prompt, tokenizer.eos_token_id)
    return Truth(prompts, answers, tokenizer.eos_token_id)


def _greedy(model: torch.nn.Module, prompt: tuple[int, ...], eos: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        made = model.generate(  # type: ignore[operator]  # both kinds of model have it
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
    return tuple(token for token in made[0, len(prompt) :].tolist() if token != eos)
