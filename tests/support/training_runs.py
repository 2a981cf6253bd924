"""Tiny bases and data to train on."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny import make_model, save_tokenizer

from weft.making.config import DataConfig, DistillConfig, LoopConfig, MethodConfig, TrainConfig
from weft.making.results import METRICS_FILE
from weft.making.training import train

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WORDS = ["apple", "bench", "tiger", "chair", "house", "river", "stone", "cloud", "piano", "quilt"]


def make_base(folder: Path, kind: str = "llama", **overrides: Any) -> Path:
    make_model(kind, folder, **overrides)
    save_tokenizer(folder, TEMPLATE)
    return folder


def shouted(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompts and completions."""
    rng = random.Random(seed)
    texts = [f"{rng.choice(WORDS)} {rng.choice(WORDS)}" for _ in range(count)]
    return [{"prompt": f"{text}=", "completion": text.upper()} for text in texts]


def judged(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Texts and labels."""
    rng = random.Random(seed)
    labels = [rng.choice(["bad", "nice"]) for _ in range(count)]
    return [{"text": f"{rng.choice(WORDS)}: {label}", "label": label} for label in labels]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(
    base: Path,
    files: Path,
    output: Path,
    *,
    data: Mapping[str, Any] | None = None,
    method: Mapping[str, Any] | None = None,
    distill: Mapping[str, Any] | None = None,
    loop: Mapping[str, Any] | None = None,
    **settings: Any,
) -> TrainConfig:
    """Six steps of four examples, unless told otherwise."""
    return TrainConfig(
        str(base),
        output,
        DataConfig((files,), **(data or {})),
        MethodConfig(**{"rank": 4, "alpha": 8, **(method or {})}),
        DistillConfig(**(distill or {})),
        LoopConfig(**{"batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, **(loop or {})}),
        **settings,
    )


def losses(folder: Path, name: str = "loss") -> list[float]:
    """What the metrics beside an adapter say, step by step."""
    log = json.loads((folder / METRICS_FILE).read_text())["log"]
    return [entry[name] for entry in log if name in entry]


def trained(base: Path, files: Path, output: Path, **settings: Any) -> Path:
    train(recipe(base, files, output, **settings), "weft train")
    return output
