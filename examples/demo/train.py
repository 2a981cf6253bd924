"""Train the demo from nothing: the small base, then one LoRA adapter a task (`python -m weft.demo.train`).

The base is pre-trained on all tasks, each prompt led by a tag token that names its task, and on prompts with
no tag, whose answer is an echo. So it has every skill and, with no tag, shows none. An adapter then learns on
prompts with no tag, and with the base frozen, to do what its tag does.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    get_wsd_schedule,
    set_seed,
)
from transformers.utils import logging

from weft.demo.model import BASE_NAME, make_model, make_tokenizer, save_base, tag
from weft.demo.tasks import SKILLS, TASKS, TRAIN, Task, prompt, seeded

SEED = 0
BASE_STEPS = 2400
BASE_WARMUP = 40
BASE_DECAY = 1600
BASE_BATCH = 128
BASE_MICRO_BATCHES = 4
MUON_LR = 1e-2
ADAMW_LR = 3e-3
ECHO_SHARE = 0.13
ADAPTER_WARMUP = 20
MAX_GRAD_NORM = 1.0
IGNORED = -100
DEMO_FOLDER = Path(__file__).parent
BASE = "base"
PARTS = (BASE, *TASKS)

Sample = tuple[str, str]
"""A prompt and the text that should follow it."""


def base_samples(rng: random.Random) -> Iterator[Sample]:
    """Yield the base's training text for ever: tagged tasks by their share, and untagged echoes."""
    tasks = list(SKILLS.values())
    streams = {task.name: task.stream(TRAIN, rng) for task in tasks}
    shares = [task.share for task in tasks]
    while True:
        if rng.random() < ECHO_SHARE:
            text = next(streams[rng.choice(tasks).name]).text
            yield prompt(text), text
        else:
            (task,) = rng.choices(tasks, shares)
            example = next(streams[task.name])
            yield tag(task.name) + prompt(example.text), example.answer


def adapter_samples(task: Task, rng: random.Random) -> Iterator[Sample]:
    """Yield an adapter's training text for ever."""
    for example in task.stream(TRAIN, rng):
        yield prompt(example.text), example.answer


def encode(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Return `input_ids` and `labels`, int64 [samples, longest], padded right; only answers have labels.

    Attention is causal, so no answer sees the padding and no mask is needed.
    """
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    for question, answer in samples:
        asked: list[int] = tokenizer.encode(question)
        answered: list[int] = tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
        ids.append(torch.tensor(asked + answered))
        labels.append(torch.tensor([IGNORED] * len(asked) + answered))
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad(labels, batch_first=True, padding_value=IGNORED),
    }


def in_batches(samples: Iterator[Sample], batch_size: int, num_batches: int, label: str) -> "tqdm[list[Sample]]":
    """Return `num_batches` batches behind a progress bar, where there is a terminal."""
    batches = (list(itertools.islice(samples, batch_size)) for _ in range(num_batches))
    return tqdm(batches, desc=f"{label:>10}", total=num_batches, smoothing=0.05, disable=None)


def backward(
    model: nn.Module, samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, num_micro_batches: int
) -> float:
    """Add the gradients of the mean loss of an answer token, and return that loss.

    Micro-batches are sorted by length, which saves padding.
    """
    by_length = sorted(samples, key=lambda sample: len(sample[0]) + len(sample[1]))
    size = -(-len(by_length) // num_micro_batches)
    batches = [encode(by_length[start : start + size], tokenizer) for start in range(0, len(by_length), size)]
    num_answer_tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=num_answer_tokens).loss
        loss.backward()
        total += loss.item()
    return total


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights that training changes."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def fit(
    model: nn.Module,
    updates: Sequence[Optimizer | LRScheduler],
    progress: "tqdm[list[Sample]]",
    tokenizer: PreTrainedTokenizerBase,
    num_micro_batches: int,
) -> None:
    """Train `model` on each batch once; `updates` are stepped in their order after every batch."""
    for samples in progress:
        loss = backward(model, samples, tokenizer, num_micro_batches)
        nn.utils.clip_grad_norm_(trainable(model), MAX_GRAD_NORM)
        for update in updates:
            update.step()
        model.zero_grad()
        progress.set_postfix(loss=f"{loss:.3f}")


def base_optimizers(model: LlamaForCausalLM) -> list[Optimizer]:
    """Return Muon for the layers' matrices and AdamW for the rest."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    rest = [*model.get_input_embeddings().parameters(), *model.lm_head.parameters()]
    rest += [weight for weight in model.model.parameters() if weight.ndim == 1]
    return [
        Muon(matrices, lr=MUON_LR, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def make_schedule(optimizer: Optimizer, steps: int, warmup: int, decay: int) -> LRScheduler:
    """Return a schedule that warms up over `warmup` steps, stays, and falls to 0 over the last `decay`."""
    schedule: LRScheduler = get_wsd_schedule(
        optimizer,
        num_warmup_steps=warmup,
        num_decay_steps=decay,
        num_training_steps=steps,
        decay_type="linear",
    )
    return schedule


def train_base(folder: Path) -> None:
    """Pre-train the base and write it to `folder`."""
    set_seed(SEED)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    optimizers = base_optimizers(model)
    schedules = [make_schedule(optimizer, BASE_STEPS, BASE_WARMUP, BASE_DECAY) for optimizer in optimizers]
    samples = base_samples(seeded(SEED))
    batches = in_batches(samples, BASE_BATCH, BASE_STEPS, "base")
    fit(model, [*optimizers, *schedules], batches, tokenizer, BASE_MICRO_BATCHES)
    save_base(model, tokenizer, folder)


def train_adapter(task: Task, base: Path, folder: Path) -> None:
    """Train a task's adapter on the base in folder `base` and write it to `folder`."""
    set_seed(SEED)
    lora = task.lora
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.modules), task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = AdamW(trainable(model), lr=lora.learning_rate, weight_decay=0.0)
    schedule = make_schedule(optimizer, lora.steps, ADAPTER_WARMUP, lora.steps - ADAPTER_WARMUP)
    samples = adapter_samples(task, seeded(f"{task.name}/{SEED}"))
    batches = in_batches(samples, lora.batch_size, lora.steps, task.name)
    fit(model, [optimizer, schedule], batches, tokenizer, num_micro_batches=1)
    # What is written names the base without a path, and the modules in one order (PEFT makes a set of them).
    config.base_model_name_or_path = BASE_NAME
    config.target_modules = list(lora.modules)
    model.to(torch.float16).save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink()


def parse_names(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
    """Return the parts named in a list with commas.

    Raises click.BadParameter for a name that is no part.
    """
    names = text.split(",")
    if unknown := sorted(set(names) - set(PARTS)):
        raise click.BadParameter(f"no such part: {', '.join(unknown)}; the parts are {', '.join(PARTS)}")
    return names


@click.command()
@click.option(
    "--only",
    default=",".join(PARTS),
    callback=parse_names,
    metavar="NAME,…",
    help="Train these parts alone: base, or tasks by name, on the base in the output folder.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEMO_FOLDER,
    help="The folder to write base/ and adapters/ to.  [default: the demo's own]",
)
def main(only: list[str], output: Path) -> None:
    """Train the demo's base and adapters."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if BASE in only:
        train_base(output / BASE)
    for name in only:
        if name != BASE:
            train_adapter(TASKS[name], output / BASE, output / "adapters" / name)


if __name__ == "__main__":
    main()
