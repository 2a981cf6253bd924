"""`weft train`: an adapter from a file of examples, by transformers' Trainer."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from weft.errors import InvalidConfig, WeftError
from weft.making.checkpoints import Checkpoints
from weft.making.config import Precision, TrainConfig
from weft.making.destination import check_new
from weft.making.distilling import DistillingTrainer, Teacher
from weft.making.loading import Collator, Material, context_of, load_base, load_teacher, load_tokenizer, read_material
from weft.making.methods import adapted, optimizer_of
from weft.making.results import Trained, write_adapter

_SAMPLE_BATCHES = 4
"""That the importance of modules is measured on."""


def train(config: TrainConfig, command: str) -> tuple[Trained, bool]:
    """Train an adapter and write it to `config.output`; also whether this is the first process, which does the writing.

    command: as it is told in the model card. Raises WeftError for whatever is wrong with what was given.
    """
    check_new(config.output)
    checkpoints = Checkpoints(config.output)
    arguments = training_arguments(config, checkpoints.scratch)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)

    def teacher() -> nn.Module:
        return load_teacher(config.distill, config.model, tokenizer, _dtype(arguments)).to(arguments.device)

    material = read_material(config, tokenizer, context_of(config.model, tokenizer), teacher)
    last = checkpoints.begin({**config.told(), "data.digest": material.digest}, resume=config.resume)
    model = _adapted(config, material, tokenizer, _dtype(arguments))
    teachers = Teacher(model, teacher() if config.distill.is_another else None) if config.distill.is_given else None
    trainer = _trainer(config, arguments, model, material, tokenizer.pad_token_id, teachers, checkpoints)
    state = checkpoints.finished(model)
    if state is None:
        with checkpoints.failures_in_words():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        state = trainer.state
    trained = Trained.of(config, material, state, model)
    if arguments.process_index == 0:
        write_adapter(model, trained, command)
        checkpoints.remove()
    PartialState().wait_for_everyone()
    return trained, arguments.process_index == 0


def training_arguments(config: TrainConfig, folder: Path) -> TrainingArguments:
    """The Trainer's own settings. Raises InvalidConfig for such as can't be had on this machine."""
    loop, has_evaluation = config.loop, config.data.has_evaluation
    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate say it
    if loop.batch_size % world_size:
        raise InvalidConfig(f"--batch-size is {loop.batch_size}; must be a multiple of the {world_size} processes")
    precision = _precision(config.precision, on_cpu=on_cpu)
    strategy = "no" if not has_evaluation else "steps" if loop.eval_every else "epoch"
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=loop.batch_size // world_size,
        per_device_eval_batch_size=loop.batch_size // world_size,
        gradient_accumulation_steps=loop.accumulate,
        num_train_epochs=loop.epochs,
        max_steps=loop.max_steps or -1,
        learning_rate=loop.learning_rate,
        weight_decay=loop.weight_decay,
        lr_scheduler_type=loop.schedule,
        warmup_steps=loop.warmup,
        max_grad_norm=loop.clip,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        use_cpu=on_cpu,
        ddp_find_unused_parameters=False,
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy=strategy,
        eval_steps=loop.eval_every,
        save_strategy=strategy if has_evaluation else "steps",
        save_steps=loop.eval_every or loop.save_every,
        load_best_model_at_end=has_evaluation,
        metric_for_best_model="loss" if has_evaluation else None,
        restore_callback_states_from_checkpoint=True,
        greater_is_better=False if has_evaluation else None,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
        report_to="none",
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # noqa: SLF001 - else one process would split its batches over all GPUs
    return arguments


def _precision(wanted: Precision, *, on_cpu: bool) -> Precision:
    """auto: bfloat16 on a GPU that computes in it, float16 on another, float32 on a CPU, which would gain nothing."""
    if wanted == "float16" and on_cpu:
        raise InvalidConfig("--precision float16 needs a GPU: take float32, or bfloat16")
    if wanted != "auto":
        return wanted
    if on_cpu:
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def _dtype(arguments: TrainingArguments) -> torch.dtype:
    """That the frozen base is held in."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def _adapted(
    config: TrainConfig, material: Material, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PeftModel:
    base = load_base(config.model, material, tokenizer.pad_token_id, dtype)
    batch_size = config.loop.batch_size
    collate = Collator(tokenizer.pad_token_id)
    examples = material.train.select_columns(["input_ids", "labels"])
    starts = range(0, min(_SAMPLE_BATCHES * batch_size, len(examples)), batch_size)
    sample = (
        collate(examples.select(range(start, min(start + batch_size, len(examples)))).to_list()) for start in starts
    )
    set_seed(config.seed)
    return adapted(base, config.method, material.task, sample)


def _trainer(
    config: TrainConfig,
    arguments: TrainingArguments,
    model: PeftModel,
    material: Material,
    pad_token_id: int,
    teacher: Teacher | None,
    checkpoints: Checkpoints,
) -> Trainer:
    callbacks: list[TrainerCallback] = [checkpoints, _Progress(), _OnlyFinite()]
    if config.loop.early_stop:
        callbacks.append(EarlyStoppingCallback(config.loop.early_stop))
    is_single = material.task == "classify" and not material.is_multi
    options: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": material.train,
        "eval_dataset": material.evaluation,
        "data_collator": Collator(pad_token_id),
        "callbacks": callbacks,
        "optimizers": (optimizer_of(model, config.method, config.loop), None),
        "compute_metrics": _accuracy if is_single else None,
    }
    arguments.prediction_loss_only = not is_single
    if teacher is None:
        trainer = Trainer(**options)
    else:
        trainer = DistillingTrainer(teacher=teacher, distill=config.distill, **options)
    trainer.remove_callback(PrinterCallback)
    if material.is_multi:  # its loss is a mean over the batch, whatever the Trainer counts
        trainer.model_accepts_loss_kwargs = False
    return trainer


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    logits, labels = prediction.predictions, prediction.label_ids
    return {"accuracy": float((np.asarray(logits).argmax(-1) == labels).mean())}


class _Progress(TrainerCallback):
    """A bar on standard error, where that is a terminal."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        disable = None if state.is_world_process_zero else True
        self._bar = tqdm(total=state.max_steps, initial=state.global_step, disable=disable, unit="step")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in rest["logs"].items() if name.endswith("loss")})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.update()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._bar.close()


class _OnlyFinite(TrainerCallback):
    """Ends a training that has come apart."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        loss = rest["logs"].get("loss", 0.0)
        if not math.isfinite(loss):
            raise WeftError(f"the loss is {loss} at step {state.global_step}: lower --learning-rate, or add --warmup")
