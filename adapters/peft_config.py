"""`adapter_config.json`, read fail-closed: every field is honoured, or known not to matter, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from weft.adapters.json_files import read_object, shown
from weft.adapters.patterns import Patterns
from weft.errors import InvalidAdapter, Problem, cut_short

CONFIG_FILE = "adapter_config.json"
T = TypeVar("T")

_NO_EFFECT: Mapping[str, tuple[type, ...]] = {
    "auto_mapping": (dict,),
    "base_model_name_or_path": (str,),
    "corda_config": (dict,),
    "ephemeral_gpu_offload": (bool,),
    "eva_config": (dict,),
    "fan_in_fan_out": (bool,),
    "inference_mode": (bool,),
    "loftq_config": (dict,),
    "lora_dropout": (int, float),
    "lora_ga_config": (dict,),
    "megatron_core": (str,),
    "peft_version": (str,),
    "qalora_group_size": (int,),
    "revision": (str,),
    "runtime_config": (dict,),
}
"""Fields that say how the adapter was made or trained and do not change what it computes, and their types."""

_HONOURED = frozenset({
    "alora_invocation_tokens", "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r",
    "rank_pattern", "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora",
})  # fmt: skip

_REFUSED_WHEN_SET = {
    "arrow_config": "Arrow routes each token between adapters by itself, which is not served",
    "kasa_config": "KaSA takes singular values out of the base weights, which would change the base for all",
    "layer_replication": "replicated layers make another base model",
    "megatron_config": "Megatron's parallel modules are not served: save the adapter for transformers' own modules",
    "monteclora_config": "MonteCLoRA draws weights at random, which is not served",
    "use_bdlora": "block-diagonal LoRA is not served: save it as plain LoRA with zeros outside the blocks",
    "use_qalora": "QA-LoRA pools its inputs for a quantised base, which is not served",
    "velora_config": "VeLoRA is a way to train that this server can't tell from one to serve: save it without",
}
"""Fields that change what the adapter computes, in a way this server can't reproduce, and why."""

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations, beside true and false, that leave the base weights as they are."""

_MIN_ALPHA, _MAX_ALPHA = 1e-30, 1e30
"""Scales are float32 where they are multiplied with."""

_TIED_NAMES = ("embed_tokens", "lm_head")
"""peft's EMBEDDING_LAYER_NAMES."""

_BIASES = ("none", "all", "lora_only")


class Task(Enum):
    """What an adapter was trained for, and so of which of the base's classes.

    CAUSAL_LM: with the base's own output head. SEQ_CLS: with a head of its own. FEATURE_EXTRACTION: with none.
    """

    CAUSAL_LM = "CAUSAL_LM"
    SEQ_CLS = "SEQ_CLS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


_TASKS = tuple(task.value for task in Task)


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What `adapter_config.json` says of the computation; the methods answer for one module or parameter by its name.

    token_indices: trained token rows by the end of the module's name; "" stands for the input embedding.
    invocation: the tokens from whose last occurrence in the prompt on an activated LoRA adapts.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    lora_bias: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ensure_weight_tying: bool = False
    invocation: tuple[int, ...] = ()
    task: Task = Task.CAUSAL_LM
    patterns: Patterns = field(default_factory=Patterns, compare=False, repr=False)

    @property
    def default_scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, "rank stabilization scaling factor")."""
        return self._scale(self.lora_alpha, self.r)

    def rank(self, module: str) -> int:
        """The rank PEFT gives to a module: the first matching `rank_pattern`, else `r`."""
        return self._lookup(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """The factor on B·A that PEFT uses at a module."""
        return self._scale(self._lookup(self.alpha_pattern, module, self.lora_alpha), self.rank(module))

    def saves(self, module: str) -> bool:
        """Whether PEFT would train this module, or one that it is a part of, in full (`modules_to_save`).

        As in PEFT, an entry matches any name that ends with it.
        """
        parts = module.split(".")
        return any(".".join(parts[:count]).endswith(self.modules_to_save) for count in range(1, len(parts) + 1))

    def targets_parameter(self, parameter: str) -> bool:
        """Whether PEFT would put LoRA on this bare parameter (`target_parameters`)."""
        return self._matches(self.target_parameters, parameter)

    def tokens_of(self, module: str, *, is_embedding: bool) -> tuple[int, ...]:
        """The tokens whose rows PEFT would train in this module (`trainable_token_indices`)."""
        if is_embedding and "" in self.token_indices:
            return self.token_indices[""]
        return next((ids for name, ids in self.token_indices.items() if name and module.endswith(name)), ())

    def targets(self, module: str) -> bool:
        """Whether PEFT would put LoRA on this linear module (`check_target_module_exists`)."""
        if self._matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return self.targets_all_linear or self._matches(self.target_modules, module)
        if module in self.target_modules:  # PEFT asks for the layer only where the name is not given in full
            return True
        return self._matches(self.target_modules, module) and self._layer_selected(module)

    @property
    def ties_saved(self) -> bool:
        """Whether PEFT would keep a tied head and embedding one in `modules_to_save`; it goes by these names alone."""
        return self.ensure_weight_tying and any(name.split(".")[-1] in _TIED_NAMES for name in self.modules_to_save)

    @property
    def ties_targets(self) -> bool:
        """Whether PEFT would put the embedding's LoRA on a tied head as well."""
        if not self.ensure_weight_tying or self.ties_saved:
            return False
        if isinstance(self.target_modules, str):
            return any(self._matches(self.target_modules, name) for name in _TIED_NAMES)
        return any(name.split(".")[-1] in _TIED_NAMES for name in self.target_modules)

    @property
    def targets_all_linear(self) -> bool:
        """Whether every linear module but the output head is targeted."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _layer_selected(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        return self.patterns.layer(self.layers_pattern, module) in self.layers_to_transform

    def _lookup(self, patterns: Mapping[str, T], module: str, default: T) -> T:
        """The value of the first pattern that matches the module's name or a dotted end of it."""
        return next((value for pattern, value in patterns.items() if self.patterns.is_end(pattern, module)), default)

    def _matches(self, wanted: str | Sequence[str], module: str) -> bool:
        if isinstance(wanted, str):
            return self.patterns.is_whole(wanted, module)
        parts = module.split(".")
        return not {".".join(parts[start:]) for start in range(len(parts))}.isdisjoint(wanted)


def read_config(folder: Path, source: str) -> PeftConfig:
    """Read and check `adapter_config.json`.

    Raises InvalidAdapter with every problem: no file, no JSON, a field of the wrong type or out of range, a field that
    can't be served, a field nobody knows.
    """
    return _parse(read_object(folder / CONFIG_FILE, source), source)


def is_classifier(config: Path) -> bool:
    """Whether a config is a sequence classifier's; not where it can't be read, which `read_config` says."""
    try:
        return read_object(config, "").get("task_type") == Task.SEQ_CLS.value
    except InvalidAdapter:
        return False


def _parse(raw: Mapping[str, Any], source: str) -> PeftConfig:
    fields = _Fields(raw)
    _check_unserved(fields)
    config = PeftConfig(
        r=fields.rank("r"),
        lora_alpha=fields.alpha("lora_alpha"),
        use_rslora=fields.boolean("use_rslora"),
        target_modules=fields.modules("target_modules", required=not raw.get("target_parameters")),
        exclude_modules=fields.modules("exclude_modules", required=False),
        layers_to_transform=fields.layers("layers_to_transform"),
        layers_pattern=fields.patterns("layers_pattern"),
        rank_pattern=fields.pattern("rank_pattern", _check_rank),
        alpha_pattern=fields.pattern("alpha_pattern", _check_alpha),
        bias=fields.one_of("bias", _BIASES),
        lora_bias=fields.boolean("lora_bias"),
        use_dora=fields.boolean("use_dora"),
        modules_to_save=fields.names("modules_to_save"),
        target_parameters=fields.names("target_parameters"),
        token_indices=fields.token_indices("trainable_token_indices"),
        ensure_weight_tying=fields.boolean("ensure_weight_tying"),
        invocation=fields.tokens("alora_invocation_tokens"),
        task=Task(raw["task_type"]) if raw.get("task_type") in _TASKS else Task.CAUSAL_LM,
        patterns=fields.added,
    )
    _check_combinations(config, fields)
    if fields.problems:
        raise InvalidAdapter(source, cut_short(fields.problems, CONFIG_FILE))
    return config


def _check_unserved(fields: _Fields) -> None:
    """Refuse what is another kind of adapter, or has more to it than this server knows."""
    raw = fields.raw
    if raw.get("peft_type") != "LORA":
        fields.refuse("peft_type", f"is {shown(raw.get('peft_type'))}; only 'LORA' is served")
    if raw.get("task_type") not in (None, *_TASKS):
        fields.refuse("task_type", f"is {shown(raw['task_type'])}; must be one of {', '.join(_TASKS)}")
    init = raw.get("init_lora_weights", True)
    if not isinstance(init, bool) and init not in _PLAIN_INITS:
        fields.refuse(
            "init_lora_weights",
            f"is {shown(init)}, which changes the base weights or is unknown: convert the adapter with PEFT's "
            "`path_initial_model_for_weight_conversion` first",
        )
    for name, types in _NO_EFFECT.items():
        if raw.get(name) is not None and not (isinstance(raw[name], types) and _is_bool(raw[name]) == (bool in types)):
            fields.refuse(name, f"is {shown(raw[name])}; must be {' or '.join(each.__name__ for each in types)}")
    for name, why in _REFUSED_WHEN_SET.items():
        if not _is_unset(raw.get(name)):
            fields.refuse(name, f"is set, and {why}")
    for name in sorted(raw.keys() - _NO_EFFECT.keys() - _HONOURED - _REFUSED_WHEN_SET.keys()):
        if not _is_unset(raw[name]):
            fields.refuse(name, "is not a LoRA field this server knows, so it can't say what the adapter computes")


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_unset(value: object) -> bool:
    return value is None or value is False or value in ([], {})


def _check_combinations(config: PeftConfig, fields: _Fields) -> None:
    """Refuse what PEFT itself refuses, or leaves open."""
    for name in ("layers_to_transform", "layers_pattern"):
        if isinstance(config.target_modules, str) and fields.raw.get(name) is not None:
            fields.refuse(name, "is set, and target_modules is a string, which PEFT does not allow together")
    if config.layers_pattern and fields.raw.get("layers_to_transform") is None:
        fields.refuse("layers_pattern", "is set without layers_to_transform, which PEFT does not allow")
    if config.lora_bias and config.use_dora:
        fields.refuse("lora_bias", "is set together with use_dora, which PEFT does not allow")
    if config.invocation:
        for name in (
            "bias",
            "lora_bias",
            "use_dora",
            "modules_to_save",
            "target_parameters",
            "trainable_token_indices",
        ):
            if not _is_unset(value := fields.raw.get(name)) and value != "none":
                fields.refuse(name, "is set together with alora_invocation_tokens: an activated LoRA has only A and B")


def _check_rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
        raise ValueError(f"is {shown(value)}; must be a whole number from 1 to {1 << 16}")
    return value


def _check_alpha(value: object) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (value == 0 or _MIN_ALPHA <= abs(value) <= _MAX_ALPHA)
    ):
        words = f"must be 0, or a number of a size from {_MIN_ALPHA:g} to {_MAX_ALPHA:g}"
        raise ValueError(f"is {shown(value)}; {words}")
    return float(value)


class _Fields:
    """Typed access to the raw fields that notes each problem and goes on, so that all are reported at once."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.added = Patterns()
        self.problems: list[Problem] = []

    def refuse(self, name: str, description: str) -> None:
        self.problems.append(Problem(name if name.isprintable() and len(name) <= 80 else shown(name), description))

    def rank(self, name: str) -> int:
        return self._checked(name, self.raw.get(name), _check_rank, 1)

    def alpha(self, name: str) -> float:
        return self._checked(name, self.raw.get(name), _check_alpha, 1.0)

    def boolean(self, name: str) -> bool:
        value = self.raw.get(name, False)
        if not isinstance(value, bool):
            self.refuse(name, f"is {shown(value)}; must be true or false")
        return value is True

    def modules(self, name: str, *, required: bool = True) -> str | tuple[str, ...]:
        value = self.raw.get(name)
        if isinstance(value, str) and value:
            self._add(name, value, self.added.add_whole)
            return value
        return self.names(name, required=required)

    def names(self, name: str, *, required: bool = False) -> tuple[str, ...]:
        value = self.raw.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value) or (required and not value):
            words = f"is {shown(value)}; must be a {'non-empty ' if required else ''}list of module names"
            self.refuse(name, words)
            return ()
        return tuple(value)

    def patterns(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name)
        values = (value,) if isinstance(value, str) and value else self.names(name)
        for value in values:
            self._add(name, value, self.added.add_layers)
        return values

    def layers(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        value = [value] if isinstance(value, int) else [] if value is None else value
        if not isinstance(value, list) or not all(type(item) is int and item >= 0 for item in value):
            self.refuse(name, f"is {shown(value)}; must be a layer index or a list of them")
            return ()
        return tuple(value)

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        value = self.raw.get(name, allowed[0])
        if value in allowed:
            return str(value)
        self.refuse(name, f"is {shown(value)}; must be one of {', '.join(allowed)}")
        return allowed[0]

    def tokens(self, name: str) -> tuple[int, ...]:
        return self._tokens(name, self.raw.get(name))

    def token_indices(self, name: str) -> dict[str, tuple[int, ...]]:
        value = self.raw.get(name)
        by_module = {"": value} if isinstance(value, list) else {} if value is None else value
        if not isinstance(by_module, dict):
            self.refuse(name, f"is {shown(value)}; must be a list of token ids, or map modules to such lists")
            return {}
        return {module: self._tokens(f"{name}[{shown(module)}]", ids) for module, ids in by_module.items()}

    def _tokens(self, name: str, value: object) -> tuple[int, ...]:
        value = [] if value is None else value
        if isinstance(value, list) and all(type(token) is int and token >= 0 for token in value):
            return tuple(value)
        self.refuse(name, f"is {shown(value)}; must be a list of token ids")
        return ()

    def pattern(self, name: str, check: Callable[[object], T]) -> dict[str, T]:
        value = self.raw.get(name)
        value = {} if value is None else value
        if not isinstance(value, dict):
            self.refuse(name, f"is {shown(value)}; must map module patterns to numbers")
            return {}
        for key in value:
            self._add(name, key, self.added.add_end)
        return {key: self._checked(f"{name}[{shown(key)}]", item, check, check(1)) for key, item in value.items()}

    def _add(self, name: str, pattern: str, add: Callable[[str], None]) -> None:
        try:
            add(pattern)
        except ValueError as error:
            self.refuse(name, f"{shown(pattern)} {error}")

    def _checked(self, name: str, value: object, check: Callable[[object], T], fallback: T) -> T:
        try:
            return check(value)
        except ValueError as error:
            self.refuse(name, str(error))
            return fallback
