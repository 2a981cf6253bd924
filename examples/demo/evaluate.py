"""Measure the demo with transformers and PEFT alone (`python -m weft.demo.evaluate`).

Prints, for every task, the share of held-out inputs that are answered exactly, decoded greedily, with the
adapter and by the base alone. Exits with 1 if an adapter is below 95 % or the base at 20 % or above.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from weft.demo.tasks import ATTENTION, HELD_OUT, MLP, TASKS, Example, Task, prompt

NUM_INPUTS = 200
SEED = 0
LOWEST_ADAPTER_PERCENT = 95.0
BASE_PERCENT_LIMIT = 20.0
MAX_NEW_TOKENS = 48
DEMO_FOLDER = Path(__file__).parent
ROW = "{:<11} {:>7}  {:<33} {:>9} {:>7}"


class Generator(Protocol):
    """A transformers model that can generate."""

    def generate(self, **options: Any) -> Any:
        """Return token ids, int64 [prompts, tokens]."""


@torch.inference_mode()
def complete(model: Generator, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Return the text that the model greedily puts after each prompt."""
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    texts: list[str] = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def percent_right(model: Generator, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> float:
    """Return the percentage of examples that the model answers exactly."""
    texts = complete(model, tokenizer, [prompt(example.text) for example in examples])
    right = sum(text == example.answer for text, example in zip(texts, examples, strict=True))
    return 100 * right / len(examples)


def evaluate(task: Task, folder: Path, num_inputs: int) -> tuple[float, float]:
    """Return a task's percentages of right answers: with the adapter, and by the base alone."""
    examples = task.examples(HELD_OUT, num_inputs, SEED)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    base_percent = percent_right(base, tokenizer, examples)
    # Puts the adapter's layers into the base.
    PeftModel.from_pretrained(base, str(folder / "adapters" / task.name))
    return percent_right(base, tokenizer, examples), base_percent


def parse_tasks(_context: click.Context, _option: click.Parameter, text: str) -> list[Task]:
    """Return the tasks named in a list with commas.

    Raises click.BadParameter for a name that is no task's.
    """
    names = text.split(",")
    if unknown := sorted(set(names) - set(TASKS)):
        raise click.BadParameter(f"no such task: {', '.join(unknown)}; the tasks are {', '.join(TASKS)}")
    return [TASKS[name] for name in names]


@click.command()
@click.option(
    "--only",
    default=",".join(TASKS),
    callback=parse_tasks,
    metavar="NAME,…",
    help="Measure these tasks alone.",
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=DEMO_FOLDER,
    help="The folder that holds base/ and adapters/.  [default: the demo's own]",
)
@click.option("--inputs", type=click.IntRange(1), default=NUM_INPUTS, show_default=True, help="Inputs a task.")
def main(only: list[Task], folder: Path, inputs: int) -> None:
    """Measure the demo's adapters on inputs that no training saw."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # PEFT 0.21 asks for an attribute that transformers 5.23 has renamed.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    click.echo(ROW.format("task", "r/alpha", "modules", "adapter %", "base %"))
    passed = True
    for task in only:
        adapter, base = evaluate(task, folder, inputs)
        config = LoraConfig.from_pretrained(str(folder / "adapters" / task.name))
        modules = ",".join(
            module.removesuffix("_proj") for module in (*ATTENTION, *MLP) if module in config.target_modules
        )
        click.echo(ROW.format(task.name, f"{config.r}/{config.lora_alpha}", modules, f"{adapter:.1f}", f"{base:.1f}"))
        passed &= adapter >= LOWEST_ADAPTER_PERCENT and base < BASE_PERCENT_LIMIT
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
