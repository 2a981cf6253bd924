"""Learning a teacher's answers: KL on its logits, mixed with the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import Trainer

from weft.making.config import DistillConfig
from weft.making.examples import IGNORED


class Teacher:
    """A model that is asked and never changed: another one, or the student's own base without its adapter."""

    def __init__(self, student: PeftModel, other: nn.Module | None) -> None:
        self._student = student
        self._other = other

    @contextmanager
    def asked(self) -> Iterator[nn.Module]:
        """The teacher to run inside the block, without dropout or gradients."""
        with torch.no_grad():
            if self._other is not None:
                yield self._other
                return
            was_training = self._student.training
            self._student.eval()
            with self._student.disable_adapter():
                yield self._student
            self._student.train(was_training)


def distillation_loss(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float, label_weight: float
) -> torch.Tensor:
    """(1 - w) T² KL(teacher / T ‖ student / T) + w CE(labels), summed over tokens.

    student, teacher: logits [tokens, vocabulary]; labels [tokens]. Hinton et al. 2015, "Distilling the Knowledge in a
    Neural Network". A vocabulary that is padded further in one of them counts as far as both go.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    of_student = functional.log_softmax(student[:, :size].float() / temperature, dim=-1)
    of_teacher = functional.log_softmax(teacher[:, :size].float() / temperature, dim=-1)
    divergence = functional.kl_div(of_student, of_teacher, reduction="sum", log_target=True) * temperature**2
    return (1 - label_weight) * divergence + label_weight * functional.cross_entropy(
        student.float(), labels, reduction="sum"
    )


def answered(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The logits [tokens, vocabulary] from which each token of the answers is predicted."""
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits[:, :-1][labels[:, 1:] != IGNORED]


class DistillingTrainer(Trainer):
    """The Trainer, with the teacher's logits in the place of labels alone."""

    def __init__(self, *, teacher: Teacher, distill: DistillConfig, **options: Any) -> None:
        super().__init__(**options)
        self._teacher = teacher
        self._distill = distill

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"]
        with self._teacher.asked() as teacher:
            taught = answered(
                teacher, inputs["teacher_input_ids"], inputs["teacher_attention_mask"], inputs["teacher_labels"]
            )
        student = answered(model, inputs["input_ids"], inputs["attention_mask"], labels)
        learnt = labels[:, 1:][labels[:, 1:] != IGNORED]
        total = distillation_loss(student, taught, learnt, self._distill.temperature, self._distill.label_weight)
        if num_items_in_batch is None:
            loss = total / len(learnt)
        else:  # of all processes, whose gradients are averaged
            loss = total / num_items_in_batch * self.accelerator.num_processes
        return (loss, {"logits": student}) if return_outputs else loss
