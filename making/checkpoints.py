"""Checkpoints that are whole or not there, beside the folder that the run will make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from weft.errors import InvalidConfig, WeftError

_SETTINGS = "settings.json"
_BEING_WRITTEN = "being-written"
_STATE = "trainer_state.json"


class Checkpoints(TrainerCallback):
    """Moves each checkpoint that the Trainer has written in full to its place, and then drops older ones.

    The Trainer writes into `scratch`. What is left there was never whole.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f"{output.name}.checkpoints")
        self.scratch = self.folder / _BEING_WRITTEN

    @property
    def last(self) -> Path | None:
        if not self.folder.is_dir():
            return None
        found = get_last_checkpoint(str(self.folder))  # type: ignore[no-untyped-call]
        return Path(found) if found else None

    def begin(self, settings: Mapping[str, Any], *, resume: bool) -> Path | None:
        """Make the folder. Returns the checkpoint to go on from, if there is one.

        Raises InvalidConfig where there are checkpoints and the run does not go on, or goes on with other settings.
        """
        last = self.last
        if last is not None and not resume:
            raise InvalidConfig(
                f"{self.folder} holds checkpoints of a run that did not end: go on with --resume, or remove it"
            )
        kept = self.folder / _SETTINGS
        if last is not None:
            _check_same(json.loads(kept.read_text()), settings, self.folder)
        if PartialState().is_main_process:
            try:
                shutil.rmtree(self.scratch, ignore_errors=True)
                self.scratch.mkdir(parents=True)
                kept.write_text(json.dumps(dict(settings), indent=1))
            except OSError as error:
                raise InvalidConfig(f"{self.folder} can't be written: {error.strerror}") from None
        PartialState().wait_for_everyone()
        return last

    def finished(self, model: PeftModel) -> TrainerState | None:
        """Where the last checkpoint is that of the end, its state; the model then has the weights that are kept."""
        if self.last is None:
            return None
        told = json.loads((self.last / _STATE).read_text())
        if not told["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
            return None
        state = TrainerState(**told)
        model.load_adapter(state.best_model_checkpoint or str(self.last), "default", is_trainable=True)
        return state

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        PartialState().wait_for_everyone()
        written = self.scratch / f"checkpoint-{state.global_step}"
        kept = self.folder / written.name
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(kept)
        if state.is_world_process_zero:
            state.save_to_json(str(written / _STATE))
            written.replace(kept)
            for other in self.folder.glob("checkpoint-*"):
                if other != kept and str(other) != state.best_model_checkpoint:
                    shutil.rmtree(other, ignore_errors=True)
        PartialState().wait_for_everyone()

    @contextmanager
    def failures_in_words(self) -> Iterator[None]:
        """Too little memory says so; an error in the middle of a checkpoint says which one is good."""
        try:
            yield
        except torch.OutOfMemoryError:
            words = "the device has too little memory: lower --batch-size and raise --accumulate, or lower --max-length"
            raise WeftError(words) from None
        except (OSError, RuntimeError, SafetensorError) as error:
            unfinished = next(self.scratch.glob("checkpoint-*"), None)
            if unfinished is None:
                raise
            shutil.rmtree(unfinished, ignore_errors=True)
            last = f"{self.last.name} is whole: make room and go on with --resume" if self.last else "there is none yet"
            raise WeftError(
                f"{unfinished.name} can't be written to {self.folder} ({_first_words(error)}); {last}"
            ) from error

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise InvalidConfig(
            f"--resume: {name} was {before.get(name)} when {folder} was begun and is {now[name]} now: "
            "give the same settings, or remove the folder"
        )
