"""What a training leaves: a PEFT folder with its measurements, a picture of them, and a model card."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from peft import PeftModel
from transformers import TrainerState

from weft.making.config import TrainConfig
from weft.making.destination import complete_folder
from weft.making.loading import Material

METRICS_FILE, PICTURE_FILE, CARD_FILE = "metrics.json", "loss.png", "README.md"
_LIBRARIES = ("weft", "torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True, slots=True)
class Trained:
    """How a training went. log: what the Trainer logged, step by step."""

    config: TrainConfig
    material: Material
    steps: int
    best_step: int | None
    log: tuple[Mapping[str, float], ...]
    trainable: int
    total: int

    @classmethod
    def of(cls, config: TrainConfig, material: Material, state: TrainerState, model: PeftModel) -> Trained:
        trainable, total = model.get_nb_trainable_parameters()
        return cls(
            config, material, state.global_step, state.best_global_step, tuple(state.log_history), trainable, total
        )

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """The steps at which something was logged, and its values."""
        found = [(entry["step"], entry[name]) for entry in self.log if name in entry]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def summary(self) -> str:
        """One line."""
        _, losses = self.curve("loss")
        _, evaluated = self.curve("eval_loss")
        _, accuracies = self.curve("eval_accuracy")
        words = [f"{self.steps} steps on {len(self.material.train)} examples"]
        if self.material.truncated:
            words.append(f"{self.material.truncated} truncated")
        words.append(f"loss {losses[0]:.4g} to {losses[-1]:.4g}")
        if evaluated:
            words.append(f"evaluated {min(evaluated):.4g} at step {self.best_step}, which is kept")
        if accuracies:
            words.append(f"accuracy {100 * accuracies[evaluated.index(min(evaluated))]:.1f} %")
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "best_step": self.best_step,
            "examples": len(self.material.train),
            "eval_examples": len(self.material.evaluation) if self.material.evaluation is not None else 0,
            "truncated": self.material.truncated,
            "trainable_parameters": self.trainable,
            "parameters": self.total,
            "data_digest": self.material.digest,
            "settings": dict(self.config.told()),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
            "log": list(self.log),
        }


def write_adapter(model: PeftModel, trained: Trained, command: str) -> None:
    """The whole folder, or nothing. Raises InvalidConfig where it can't be written."""
    with complete_folder(trained.config.output) as folder:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        if trained.material.task == "classify":
            model.config.save_pretrained(folder)
        (folder / METRICS_FILE).write_text(json.dumps(trained.to_json(), indent=1) + "\n")
        _draw(trained, folder / PICTURE_FILE)
        (folder / CARD_FILE).write_text(_card(trained, command))


def _draw(trained: Trained, path: Path) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(*trained.curve("loss"), label="training")
    steps, losses = trained.curve("eval_loss")
    if steps:
        axes.plot(steps, losses, marker="o", label="evaluation")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _card(trained: Trained, command: str) -> str:
    config, material = trained.config, trained.material
    versions = ", ".join(f"{name} {number}" for name, number in trained.to_json()["versions"].items())
    facts = [
        f"- Trained by `weft train` on `{config.model}`: {trained.summary}.",
        f"- Method {config.method.name}; {trained.trainable:,} of {trained.total:,} parameters.",
        f"- Data: {', '.join(path.name for path in config.data.files)}, {material.digest}.",
        f"- {versions}.",
    ]
    if material.labels:
        facts.insert(2, f"- Labels: {', '.join(material.labels)}.")
    if config.data.template:
        facts.insert(2, f"- Ask with the template it was trained on: `{config.data.template!r}`.")
    return f"""---
library_name: peft
base_model: {config.model}
---

# {config.output.name}

{chr(10).join(facts)}

![Loss]({PICTURE_FILE})

    {command}
"""
