"""Encoders: transformers' sequence classifiers whose tokens see those after them too, taken apart.

The backbone runs over rows of tokens. What the class makes of these then, it makes of one vector a prompt: by modules
between, such as BERT's pooler, and by the output, a linear module with a row a label, which an adapter brings as its
own. Each part is the class itself: a copy that shares all modules but the one that is left out.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from weft.adapters.base import Classifier
from weft.adapters.classes import Classes, to_classes
from weft.errors import InvalidAdapter, InvalidModel
from weft.kernels.heads import Head
from weft.server.engine.calls import NUM_TOKENS, Calls, watch
from weft.server.engine.linear import is_linear, read
from weft.server.engine.request import Pooling

_SAME = {torch.float32: 1e-3}
_SAME_IN_HALF = 5e-2
"""Relative error up to which logits are the same."""


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model's tokens see both sides, by what transformers makes of its config."""
    return (
        config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        and not getattr(config, "is_decoder", False)
        and not getattr(config, "is_encoder_decoder", False)
    )


@dataclass(frozen=True, slots=True)
class Encoder:
    """The parts. pooling: by which the class makes one vector of a prompt. first_position: that of its first token."""

    model: PreTrainedModel
    classifier: Classifier
    pooling: Pooling
    first_position: int

    def run(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The last hidden states [T, hidden]. input_ids, positions: int64 [1, T]; positions count from 0."""
        backbone: nn.Module = self.model.base_model
        for name in self.classifier.between:
            prefix, _, inside = name.partition(".")
            if prefix == self.model.base_model_prefix:  # BERT's pooler would take the first row of all for a prompt's
                backbone = _with(backbone, inside.partition(".")[0], None)
        made = backbone(input_ids=input_ids, position_ids=positions + self.first_position, return_dict=True)
        hidden: torch.Tensor = made.last_hidden_state[0]
        return hidden

    def features(self, pooled: torch.Tensor) -> torch.Tensor:
        """What the output sees of pooled vectors, [n, hidden]."""
        return _logits(_with(self.model, self.classifier.output, nn.Identity()), pooled)

    def head(self) -> Head:
        """The model's own output."""
        parameters = dict(self.model.get_submodule(self.classifier.output).named_parameters())
        return Head.of(parameters["weight"].detach(), parameters.get("bias"))

    def classes(self) -> Classes:
        """What the own output's logits stand for. Raises InvalidModel where the config says what can't be so."""
        name = str(self.model.name_or_path)
        try:
            return to_classes(json.loads(self.model.config.to_json_string()), name, len(self.head().weight))
        except InvalidAdapter as error:
            raise InvalidModel(f"{name} can't be served: {error.problems[0]}") from error


def take_apart(
    model: PreTrainedModel, counted: torch.Tensor, logits: torch.Tensor
) -> tuple[Encoder, Mapping[str, Calls]]:
    """The parts, and how those after the backbone are called, one row a vector.

    counted: int64 [1, NUM_TOKENS], from 0 on; logits: [labels], what the whole model makes of them as tokens at these
    positions. Raises InvalidModel where that is not by one vector of the prompt and a linear module.
    """
    name = type(model).__name__
    if model.base_model is model:
        raise InvalidModel(f"{name} has no backbone apart from its head")
    hidden = model.base_model(input_ids=counted, position_ids=counted, return_dict=True).last_hidden_state[0]
    vectors = pooled_by(hidden)
    with watch(model) as calls:
        made = _logits(model, torch.stack([*vectors.values(), *hidden[1 : NUM_TOKENS - len(vectors) + 1]]))
    called = {path: seen for path, seen in calls.items() if seen.count}
    output = next((path for path, seen in called.items() if seen.output is made), "")
    errors = [float((row - logits).norm() / logits.norm()) for row in made[: len(vectors)].float()]
    error, pooling = min(zip(errors, vectors, strict=True), key=lambda each: each[0])
    is_same = error <= _SAME.get(made.dtype, _SAME_IN_HALF)
    if not is_same or not output or not is_linear(model.get_submodule(output)):
        raise InvalidModel(f"{name} does not make its logits of one vector of the prompt by a linear module")
    num_features = read(model.get_submodule(output), "weight").shape[1]
    classifier = Classifier(tuple(path for path in called if path != output), output, num_features)
    return Encoder(model, classifier, pooling, _first_position(model, counted)), called


def _first_position(model: PreTrainedModel, counted: torch.Tensor) -> int:
    """Where a class's table of positions begins for it, RoBERTa's at 2; 0 for a class without a table."""
    token = next(token for token in range(2) if token != model.config.pad_token_id)  # RoBERTa counts no padding
    with watch(model) as calls:
        model.base_model(input_ids=torch.full_like(counted, token), return_dict=True)
    for seen in calls.values():
        given = seen.inputs[0] if seen.inputs else None
        if isinstance(given, torch.Tensor) and torch.equal(given, counted + given.flatten()[0]):
            return int(given[0, 0])
    return 0


def pooled_by(hidden: torch.Tensor) -> Mapping[Pooling, torch.Tensor]:
    """Each vector [hidden] that can be made of a prompt's last hidden states, [T, hidden]."""
    return {Pooling.CLS: hidden[0], Pooling.MEAN: hidden.mean(0), Pooling.LAST: hidden[-1]}


class _Done(nn.Module):
    """In the place of a backbone: what it gave, as prompts of one token each."""

    def __init__(self, backbone: nn.Module, pooled: torch.Tensor) -> None:
        super().__init__()
        self.pooler = getattr(backbone, "pooler", None)
        self._hidden = pooled[:, None]

    def forward(self, *args: object, **rest: object) -> BaseModelOutputWithPooling:
        pooled = self.pooler(self._hidden) if self.pooler is not None else None
        return BaseModelOutputWithPooling(last_hidden_state=self._hidden, pooler_output=pooled)


def _logits(model: nn.Module, pooled: torch.Tensor) -> torch.Tensor:
    """What a class makes of vectors [n, hidden], by any pooling: that of one token is the token itself."""
    prefix = model.base_model_prefix
    assert isinstance(prefix, str)
    ids = torch.zeros(len(pooled), 1, dtype=torch.int64, device=pooled.device)
    done = _with(model, prefix, _Done(model.get_submodule(prefix), pooled))
    logits: torch.Tensor = done(input_ids=ids, return_dict=True).logits
    return logits


def _with(module: nn.Module, path: str, part: nn.Module | None) -> nn.Module:
    """A copy that shares all but the module at the path."""
    twin = copy.copy(module)
    name, _, rest = path.partition(".")
    child = _with(module.get_submodule(name), rest, part) if rest else part
    twin._modules = {**module._modules, name: child}  # noqa: SLF001 - no public name
    return twin
