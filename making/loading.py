"""The base, a teacher, and the examples, as a run needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from weft.errors import InvalidConfig, InvalidModel, one_line
from weft.making.answers import with_answers, write_answers
from weft.making.config import DataConfig, DistillConfig, Task, TrainConfig
from weft.making.examples import IGNORED, Encoder, Example, find_labels, form_of, task_of
from weft.making.rows import Row, digest_of, read_rows


@dataclass(frozen=True, slots=True)
class Material:
    """The examples of a run. labels: of classes, else empty; truncated: how many examples were cut."""

    task: Task
    train: Dataset
    evaluation: Dataset | None
    labels: tuple[str, ...]
    is_multi: bool
    truncated: int
    digest: str


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """With a token to pad with. Raises InvalidModel where there is none."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{model} has no tokenizer that loads ({one_line(error)})") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InvalidModel(f"the tokenizer of {model} has neither a padding token nor one that ends texts")
    return tokenizer


def context_of(model: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that a text may have. Raises InvalidModel where there is no model.

    RoBERTa's positions begin after the padding token's, which its tokenizer knows and its config does not.
    """
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{model} is no model that loads ({one_line(error)})") from None
    return min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length))


def load_base(model: str, material: Material, pad_token_id: int, dtype: torch.dtype) -> PreTrainedModel:
    """The base with the head of its task. Raises InvalidModel where there is none."""
    kind: Any = AutoModelForCausalLM
    options: dict[str, Any] = {"dtype": dtype}
    if material.task == "classify":
        kind = AutoModelForSequenceClassification
        options |= {
            "id2label": dict(enumerate(material.labels)),
            "label2id": {label: place for place, label in enumerate(material.labels)},
            "problem_type": f"{'multi' if material.is_multi else 'single'}_label_classification",
            "pad_token_id": pad_token_id,
        }
    try:
        loaded: PreTrainedModel = kind.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{model} can't be loaded to {material.task} ({one_line(error)})") from None
    return loaded


def load_teacher(config: DistillConfig, base: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> nn.Module:
    """Raises InvalidModel or InvalidConfig where there is none that can teach."""
    name = config.model or base
    if config.model and load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
        raise InvalidConfig(f"--teacher {name} has another vocabulary than the model: its logits say nothing of ours")
    try:
        teacher: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        if config.adapter:
            teacher = PeftModel.from_pretrained(teacher, config.adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidModel(f"the teacher can't be loaded ({one_line(error)})") from None
    return teacher.eval().requires_grad_(False)


def read_material(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, context: int, teacher: Callable[[], nn.Module]
) -> Material:
    """Read the data, and put it into token ids. teacher: is called where the data leaves answers to it.

    Raises InvalidData with the first row that is wrong.
    """
    data = config.data
    max_length = _max_length(data, context)
    rows = read_rows(data.files)
    eval_rows = read_rows(data.eval_files) if data.eval_files else []
    form = form_of(rows[0], data, may_lack_answers=config.distill.is_given)
    task = task_of(form)
    if task == "classify" and config.distill.is_given:
        raise InvalidConfig("--method distill is for data to generate from: a teacher gives tokens, and no classes")
    is_multi = form == "label" and isinstance(rows[0].values[data.columns.label], list)
    labels = () if form != "label" else data.labels or find_labels(rows, data.columns)
    encoder = Encoder(tokenizer, data, max_length, config.distill.prompt if config.distill.is_given else None)

    def write(prompts: Sequence[list[int]]) -> list[str]:
        return write_answers(teacher(), tokenizer, prompts, config.distill.max_answer)

    def examples(rows: Sequence[Row]) -> Dataset:
        if config.distill.is_given:
            rows = with_answers(rows, form, data.columns, encoder, write)
        return Dataset.from_list([encoder.example(row, form, labels, is_multi=is_multi) for row in rows])

    train, evaluation = examples(rows), examples(eval_rows) if eval_rows else None
    if data.eval_share:
        train, evaluation = _split(train, data.eval_share, config.seed)
    digest = digest_of([*data.files, *data.eval_files])
    return Material(task, train, evaluation, labels, is_multi, encoder.truncated, digest)


class Collator:
    """Examples to a batch, padded on the right."""

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        batch = {}
        for key in examples[0]:
            values = [torch.tensor(example[key]) for example in examples]
            if key.endswith("input_ids"):
                batch[key.replace("input_ids", "attention_mask")] = _padded(
                    [torch.ones_like(each) for each in values], 0
                )
                batch[key] = _padded(values, self._pad)
            elif values[0].dim() and not values[0].is_floating_point():
                batch[key] = _padded(values, IGNORED)
            else:
                batch[key] = torch.stack(values)
        return batch


def _padded(values: list[torch.Tensor], value: int) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)


def _max_length(data: DataConfig, context: int) -> int:
    if data.max_length is None:
        return context
    if data.max_length > context:
        raise InvalidConfig(f"--max-length is {data.max_length}; the model's context is {context}")
    return data.max_length


def _split(examples: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    count = round(len(examples) * share)
    if not 0 < count < len(examples):
        raise InvalidConfig(
            f"--eval-share {share:g} of {len(examples)} examples leaves none to train or to evaluate on"
        )
    parts = examples.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]
