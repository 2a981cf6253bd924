"""Fine-tune all of the demo's base on one task (`python -m weft.demo.fine_tune upper --output tuned`).

What comes out is a whole model of its own, of which `weft extract` makes an adapter again.
"""

from pathlib import Path

import click
import torch
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging

from weft.demo.tasks import TASKS, Task, seeded
from weft.demo.train import ADAPTER_WARMUP, BASE, DEMO_FOLDER, SEED, adapter_samples, fit, in_batches, make_schedule

LEARNING_RATE = 3e-4


def fine_tune(task: Task, base: Path, folder: Path, steps: int) -> None:
    """Train every weight of the base in folder `base` on a task, and write the model to `folder` in float32."""
    set_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = make_schedule(optimizer, steps, ADAPTER_WARMUP, steps - ADAPTER_WARMUP)
    samples = adapter_samples(task, seeded(f"{task.name}/{SEED}"))
    batches = in_batches(samples, task.lora.batch_size, steps, task.name)
    fit(model, [optimizer, schedule], batches, tokenizer, num_micro_batches=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


@click.command()
@click.argument("task", type=click.Choice(list(TASKS)))
@click.option(
    "--output", required=True, type=click.Path(file_okay=False, path_type=Path), help="The new model's folder."
)
@click.option("--steps", type=click.IntRange(ADAPTER_WARMUP + 1), default=200, show_default=True)
def main(task: str, output: Path, steps: int) -> None:
    """Fine-tune all of the demo's base on one task."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    fine_tune(TASKS[task], DEMO_FOLDER / BASE, output, steps)


if __name__ == "__main__":
    main()
