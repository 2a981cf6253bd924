"""Tensors, config and base held against each other: what fits becomes content, everything else is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from weft.adapters.base import Base, BaseModule, ModuleKind
from weft.adapters.content import LoraModule, LoraParameter, LoraWeights, OwnHead, TokenUpdate, is_finite
from weft.adapters.legacy import fuse_experts
from weft.adapters.peft_config import PeftConfig
from weft.adapters.tensors import DTYPES, SortedTensors, is_saved
from weft.errors import Problem

_NOT_A_MODULE = "is not a module of this base that an adapter can be served on"
_WITH_LORA = (ModuleKind.LINEAR, ModuleKind.HEAD, ModuleKind.EMBEDDING)


def match_up(
    config: PeftConfig, tensors: SortedTensors, base: Base, head: OwnHead | None = None
) -> tuple[LoraWeights, list[Problem]]:
    """The parts of the adapter that are right, and everything that is wrong, with the others or with the whole.

    head: of a classifier, which may be all that there is.
    """
    matcher = _Matcher(config, tensors, base)
    weights = LoraWeights(
        parameters=matcher.parameters(),
        modules=matcher.modules(),
        default_scale=config.default_scale or 1.0,
        biases=matcher.biases(),
        saved=matcher.saved(),
        tokens=matcher.tokens(),
        invocation=config.invocation,
        head=head,
    )
    matcher.check_base_weights()
    matcher.check_invocation()
    if not matcher.problems and not weights.touched and head is None:
        matcher.problems.append(Problem("adapter_model.safetensors", "holds no LoRA tensors"))
    return weights, [*tensors.problems, *matcher.problems]


class _Matcher:
    """Goes over the tensors, kind by kind, and notes each problem."""

    def __init__(self, config: PeftConfig, tensors: SortedTensors, base: Base) -> None:
        self._config = config
        self._tensors = tensors
        self._base = base
        self.problems: list[Problem] = []

    def modules(self) -> dict[str, LoraModule]:
        """LoRA of linear modules, the head and the embedding."""
        groups = {name: parts for (name, wraps), parts in self._tensors.lora.items() if not wraps}
        groups = {name: parts for name, parts in groups.items() if self._kind(name) in (None, *_WITH_LORA)}
        modules = {}
        for name, parts in sorted(groups.items()):
            module = self._base.modules.get(name)
            if module is None:
                self._refuse(name, _NOT_A_MODULE)
            elif not self._targets(name):
                self._refuse(name, "has tensors, but adapter_config.json does not target it")
            elif (lora := self._lora_module(name, module, parts)) is not None:
                modules[name] = lora
        for kind in _WITH_LORA:
            for name in self._base.of_kind(kind):
                if name not in groups and self._targets(name):
                    self._refuse(name, "is targeted by adapter_config.json, but the file holds no tensors for it")
        return modules

    def parameters(self) -> dict[str, LoraParameter]:
        """LoRA of bare parameters: stacks of experts, or the matrix of a router."""
        parameters = fuse_experts(self._tensors, self._config, self._base, self.problems)
        seen = set(parameters)
        for (name, wraps), parts in sorted(self._tensors.lora.items()):
            module = self._base.modules.get(name)
            if module is None or module.kind in _WITH_LORA:
                if wraps:
                    self._refuse(name, _NOT_A_MODULE)
                continue
            targets = self._targeted_parameters(name, module)
            if wraps >= len(targets):  # PEFT wraps a module once a parameter, the first one innermost
                self._refuse(name, "has tensors, but adapter_config.json targets no parameter of it that they are for")
                continue
            key = targets[len(targets) - 1 - wraps]
            seen.add(f"{name}.{key}")
            parameter = self._lora_parameter(f"{name}.{key}", module.shapes[key], module, parts)
            if parameter is not None:
                parameters[f"{name}.{key}"] = parameter
        for name, module in self._base.modules.items():
            for full in (f"{name}.{key}" for key in self._targeted_parameters(name, module)):
                if full not in seen:
                    reason = "name the module in target_modules" if module.kind in _WITH_LORA else "it has no tensors"
                    self._refuse(full, f"is targeted as a parameter by adapter_config.json: {reason}")
        return parameters

    def biases(self) -> dict[str, torch.Tensor]:
        """Trained biases, of any module that has one."""
        biases, wanted = {}, self._trained_biases()
        for name in sorted(wanted - self._tensors.biases.keys() - self._tensors.saved.keys()):
            self._refuse(
                f"{name}.bias", "has no trained bias in the file, and `bias` of adapter_config.json asks for it"
            )
        for name, tensor in sorted(self._tensors.biases.items()):
            if name not in wanted:
                self._refuse(f"{name}.bias", "is no bias of this base that adapter_config.json asks for")
            elif self._fits(f"{name}.bias", tensor, self._base.modules[name].shapes["bias"]):
                biases[name] = tensor
        return biases

    def saved(self) -> dict[str, dict[str, torch.Tensor]]:
        """Fully trained modules, each whole."""
        saved = {}
        for name, parameters in sorted(self._tensors.saved.items()):
            module = self._base.modules.get(name)
            if module is None or module.kind is ModuleKind.EXPERTS:
                self._refuse(name, "is not a module of this base that can be served as one of the adapter's own")
                continue
            self._check_names(name, parameters, module.shapes)
            known = [key for key in module.shapes if key in parameters]
            fits = [self._fits(f"{name}.{key}", parameters[key], module.shapes[key]) for key in known]
            if all(fits):
                saved[name] = parameters
        for name, module in self._base.modules.items():
            if module.shapes and name not in self._tensors.saved and is_saved(name, self._config, self._base):
                self._refuse(name, "is in modules_to_save of adapter_config.json, but the file holds no tensors for it")
        return saved

    def tokens(self) -> dict[str, TokenUpdate]:
        """Trained token rows of the embedding and of the head; a tied head follows the embedding."""
        wanted = {
            name: ids
            for name in (self._base.embedding, self._base.head)
            if name and (ids := self._config.tokens_of(name, is_embedding=name == self._base.embedding))
        }
        embedding, head = self._base.embedding, self._base.head
        follows = self._base.is_tied and wanted.get(head, wanted.get(embedding)) == wanted.get(embedding)
        if follows:
            wanted.pop(head, None)
        updates = {}
        for key in self._config.token_indices:
            if key and not any(name and name.endswith(key) for name in (embedding, head)):
                self._refuse(f"trainable_token_indices[{key[:80]!a}]", "is neither this base's embedding nor its head")
        for name in sorted(wanted.keys() | self._tensors.tokens.keys()):
            update = self._token_update(name, wanted.get(name), self._tensors.tokens.get(name))
            if update is not None:
                updates[name] = update
        if follows and embedding in updates:
            updates[head] = updates[embedding]
        return updates

    def check_base_weights(self) -> None:
        """Embeddings that PEFT saved beside the adapter must be this base's own, or it was trained on another."""
        for (name, key), tensor in self._tensors.base_weights.items():
            shape = self._base.modules[name].shapes.get(key)
            if shape is None:
                self._refuse(f"{name}.{key}", "is nothing that this base has there")
                continue
            if tensor.dim() == 2 and len(tensor) != shape[0]:
                self._refuse(
                    f"{name}.{key}",
                    f"has {len(tensor)} rows and this base {shape[0]}: the vocabulary was resized, which is not served",
                )
                continue
            if not self._fits(f"{name}.{key}", tensor, shape):
                continue
            own = self._base.modules[name].read(key).cpu()
            if torch.equal(tensor.to(own.dtype), own):
                continue
            if torch.equal(tensor, own.to(tensor.dtype)):
                words = f"is this base's, rounded to {_name(tensor.dtype)}: serve the base in that type"
                self._refuse(f"{name}.{key}", f"{words}, or save the adapter with save_embedding_layers=False")
            else:
                self._refuse(f"{name}.{key}", "differs from this base's: the adapter was trained on another one")

    def check_invocation(self) -> None:
        """An activated LoRA whose tokens can't occur would never adapt anything."""
        embedding = self._base.modules.get(self._base.embedding)
        beyond = [token for token in self._config.invocation if embedding and token >= embedding.shapes["weight"][0]]
        if beyond:
            self._refuse("alora_invocation_tokens", f"holds {beyond[0]}, which is no token of this base")

    def _targeted_parameters(self, name: str, module: BaseModule) -> list[str]:
        """The parameters of a module that PEFT would put LoRA on; a router is targeted as the linear module it was."""
        if module.kind is ModuleKind.OTHER and len(module.shapes.get("weight", ())) == 2 and self._targets(name):
            return ["weight"]
        return [key for key in module.shapes if self._config.targets_parameter(f"{name}.{key}")]

    def _targets(self, name: str) -> bool:
        """Whether PEFT would put LoRA on this module; a tied head goes with its embedding where the config asks."""
        config, base = self._config, self._base
        kind = self._kind(name)
        between = base.classifier.between if base.classifier is not None else ()
        if config.targets_all_linear and kind is not ModuleKind.LINEAR and name not in between:
            return False
        follows = name == base.head and base.is_tied and config.ties_targets and config.targets(base.embedding)
        return (config.targets(name) or follows) and not is_saved(name, config, base)

    def _lora_module(self, name: str, module: BaseModule, parts: Mapping[str, torch.Tensor]) -> LoraModule | None:
        config, is_embedding = self._config, module.kind is ModuleKind.EMBEDDING
        rank = config.rank(name)
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A", "lora_B")
        d_in, d_out = module.d_in, module.d_out
        expected: dict[str, tuple[int, ...]] = {a: (rank, d_in), b: (d_out, rank)}
        if config.lora_bias:
            expected["lora_B.bias"] = (d_out,)
        if config.use_dora:
            expected["lora_magnitude_vector"] = (d_out,)
        if not self._has_parts(name, parts, expected):
            return None
        bias, magnitude = parts.get("lora_B.bias"), parts.get("lora_magnitude_vector")
        if is_embedding and (bias is not None or config.invocation):
            self._refuse(name, "is an embedding, for which PEFT has neither lora_bias nor alora_invocation_tokens")
        return LoraModule(parts[a], parts[b], config.scale(name), bias, magnitude)

    def _lora_parameter(
        self, name: str, shape: tuple[int, ...], module: BaseModule, parts: Mapping[str, torch.Tensor]
    ) -> LoraParameter | None:
        config = self._config
        is_bias = module.kind is ModuleKind.EXPERTS and len(shape) != 3  # PEFT takes it for one matrix
        if len(shape) not in (2, 3) or is_bias or config.use_dora or config.lora_bias:
            self._refuse(
                name, "is targeted as a parameter, which must be a matrix or a stack, without DoRA or lora_bias"
            )
            return None
        count = shape[0] if len(shape) == 3 else 1
        d_in, d_out = (shape[-2], shape[-1]) if len(shape) == 3 and module.is_transposed else (shape[-1], shape[-2])
        rank = config.rank(name)
        if not self._has_parts(name, parts, {"lora_A": (count * rank, d_in), "lora_B": (d_out, count * rank)}):
            return None
        a = parts["lora_A"].reshape(count, rank, d_in)
        b = parts["lora_B"].reshape(d_out, rank, count).permute(2, 0, 1)
        return LoraParameter(a, b, config.scale(name))

    def _token_update(self, name: str, ids: tuple[int, ...] | None, rows: torch.Tensor | None) -> TokenUpdate | None:
        module = self._base.modules.get(name)
        if ids is None or module is None:
            self._refuse(name, "has trained token rows that adapter_config.json does not explain")
        elif rows is None:
            self._refuse(name, "is in trainable_token_indices, but the file holds no token rows for it")
        elif len(set(ids)) != len(ids) or max(ids) >= module.shapes["weight"][0]:
            self._refuse(name, "has trainable_token_indices that repeat, or that lie beyond this base's vocabulary")
        elif self._fits(f"{name}.trainable_tokens_delta", rows, (len(ids), module.shapes["weight"][1])):
            return TokenUpdate(ids, rows)
        return None

    def _has_parts(self, name: str, parts: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]) -> bool:
        self._check_names(name, parts, expected)
        present = [part for part in expected if part in parts]
        fits = [self._fits(f"{name}.{part}", parts[part], expected[part]) for part in present]
        return len(present) == len(expected) == len(parts) and all(fits)

    def _check_names(self, name: str, found: Iterable[str], expected: Iterable[str]) -> None:
        for key in sorted(set(expected) - set(found)):
            self._refuse(name, f"has no {key}")
        for key in sorted(set(found) - set(expected)):
            self._refuse(f"{name}.{key}", "is nothing that adapter_config.json or this base has there")

    def _fits(self, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
        if tuple(tensor.shape) != shape:
            self._refuse(name, f"has shape {list(tensor.shape)}; this base and its config need {list(shape)}")
        elif tensor.dtype not in DTYPES:
            self._refuse(name, f"is {_name(tensor.dtype)}; must be one of {', '.join(map(_name, DTYPES))}")
        elif not is_finite(tensor):
            self._refuse(name, "holds NaN or infinite values")
        else:
            return True
        return False

    def _trained_biases(self) -> set[str]:
        """The modules whose biases PEFT would train."""
        those = {"none": set(), "all": self._base.modules.keys(), "lora_only": {name for name, _ in self._tensors.lora}}
        return {name for name in those[self._config.bias] if "bias" in self._shapes(name)}

    def _shapes(self, name: str) -> Mapping[str, tuple[int, ...]]:
        module = self._base.modules.get(name)
        return module.shapes if module else {}

    def _kind(self, name: str) -> ModuleKind | None:
        module = self._base.modules.get(name)
        return module.kind if module else None

    def _refuse(self, subject: str, description: str) -> None:
        self.problems.append(Problem(subject, description))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
