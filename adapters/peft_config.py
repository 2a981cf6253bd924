"""`adapter_config.json`, read fail-closed: every field is honoured, or known not to matter, or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import regex

from weft.errors import InvalidAdapter, Problem

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
MATCH_TIMEOUT_S = 0.2
"""How long one pattern of an adapter may take on one module's name; an honest one takes microseconds."""

T = TypeVar("T")

_NO_EFFECT = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ephemeral_gpu_offload", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config",
})  # fmt: skip
"""Fields that say how the adapter was made or trained and do not change what it computes when served."""

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

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base weights as they are, so that A and B alone are the whole adapter."""

_BIASES = ("none", "all", "lora_only")


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

    @property
    def default_scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, "rank stabilization scaling factor")."""
        return self._scale(self.lora_alpha, self.r)

    def rank(self, module: str) -> int:
        """The rank PEFT gives to a module: the first matching `rank_pattern`, else `r`."""
        return _lookup(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """The factor on B·A that PEFT uses at a module."""
        return self._scale(_lookup(self.alpha_pattern, module, self.lora_alpha), self.rank(module))

    def saves(self, module: str) -> bool:
        """Whether PEFT would train this module, or one that it is a part of, in full (`modules_to_save`).

        As in PEFT, an entry matches any name that ends with it.
        """
        parts = module.split(".")
        return any(".".join(parts[:count]).endswith(self.modules_to_save) for count in range(1, len(parts) + 1))

    def targets_parameter(self, parameter: str) -> bool:
        """Whether PEFT would put LoRA on this bare parameter (`target_parameters`)."""
        return _matches(self.target_parameters, parameter)

    def tokens_of(self, module: str, *, is_embedding: bool) -> tuple[int, ...]:
        """The tokens whose rows PEFT would train in this module (`trainable_token_indices`)."""
        if is_embedding and "" in self.token_indices:
            return self.token_indices[""]
        return next((ids for name, ids in self.token_indices.items() if name and module.endswith(name)), ())

    def targets(self, module: str) -> bool:
        """Whether PEFT would put LoRA on this linear module (`check_target_module_exists`)."""
        if _matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return self.targets_all_linear or _matches(self.target_modules, module)
        return _matches(self.target_modules, module) and self._layer_selected(module)

    @property
    def targets_all_linear(self) -> bool:
        """Whether every linear module but the output head is targeted."""
        return isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"

    def _scale(self, alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _layer_selected(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        for pattern in patterns:
            match = _match(pattern, module)
            if match:
                return int(match.group(1)) in self.layers_to_transform
        return False


def read_config(folder: Path, source: str) -> PeftConfig:
    """Read and check `adapter_config.json`.

    Raises InvalidAdapter with every problem: no file, no JSON, a field of the wrong type or out of range, a field that
    can't be served, a field nobody knows.
    """
    path = folder / CONFIG_FILE
    try:
        if path.exists() and not path.is_file():
            raise InvalidAdapter(source, [Problem(path.name, "is not a regular file")])
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InvalidAdapter(source, [Problem(path.name, f"is larger than {MAX_CONFIG_BYTES} bytes")])
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
        json.dumps(raw, ensure_ascii=False).encode()  # refuses lone surrogates, which no message could repeat
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidAdapter(source, [Problem(path.name, f"can't be read as JSON ({reason})")]) from None
    if not isinstance(raw, dict):
        raise InvalidAdapter(source, [Problem(path.name, "must hold a JSON object")])
    return _parse(raw, source)


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ValueError(f"key {repeated[0]!r} appears twice")
    return dict(pairs)


def _parse(raw: Mapping[str, Any], source: str) -> PeftConfig:
    fields = _Fields(raw)
    if raw.get("peft_type") != "LORA":
        fields.refuse("peft_type", f"is {raw.get('peft_type')!r}; only 'LORA' is served")
    if raw.get("task_type") not in (None, "CAUSAL_LM"):
        fields.refuse("task_type", f"is {raw['task_type']!r}; only 'CAUSAL_LM' is served")
    if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
        fields.refuse(
            "init_lora_weights",
            f"{raw['init_lora_weights']!r} changes the base weights: convert the adapter with PEFT's "
            "`path_initial_model_for_weight_conversion` first",
        )
    for name, why in _REFUSED_WHEN_SET.items():
        if raw.get(name) not in (None, False, [], {}):
            fields.refuse(name, f"is set, and {why}")
    for name in sorted(raw.keys() - _NO_EFFECT - _HONOURED - _REFUSED_WHEN_SET.keys()):
        if raw[name] not in (None, False, [], {}):
            fields.refuse(name, "is not a LoRA field this server knows, so it can't say what the adapter computes")
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
    )
    _check_combinations(config, fields)
    if fields.problems:
        raise InvalidAdapter(source, fields.problems)
    return config


def _check_combinations(config: PeftConfig, fields: _Fields) -> None:
    """Refuse what PEFT itself refuses, or leaves open."""
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
            if fields.raw.get(name) not in (None, False, [], {}, "none"):
                fields.refuse(name, "is set together with alora_invocation_tokens: an activated LoRA has only A and B")


def _check_rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
        raise ValueError(f"is {value!r}; must be a whole number from 1 to {1 << 16}")
    return value


def _check_alpha(value: object) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond any float
        pass
    raise ValueError(f"is {str(value)[:40]}; must be a finite number")


class _Fields:
    """Typed access to the raw fields that notes each problem and goes on, so that all are reported at once."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.problems: list[Problem] = []

    def refuse(self, name: str, description: str) -> None:
        self.problems.append(Problem(name, description))

    def rank(self, name: str) -> int:
        return self._checked(name, self.raw.get(name), _check_rank, 1)

    def alpha(self, name: str) -> float:
        return self._checked(name, self.raw.get(name), _check_alpha, 1.0)

    def boolean(self, name: str) -> bool:
        value = self.raw.get(name, False)
        if not isinstance(value, bool):
            self.refuse(name, f"is {value!r}; must be true or false")
        return value is True

    def modules(self, name: str, *, required: bool = True) -> str | tuple[str, ...]:
        value = self.raw.get(name)
        if isinstance(value, str) and value:
            self._check_pattern(name, value)
            return value
        if value or required:
            return self.names(name, required=required)
        return ()

    def names(self, name: str, *, required: bool = False) -> tuple[str, ...]:
        value = self.raw.get(name)
        value = [value] if isinstance(value, str) else value or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value) or (required and not value):
            self.refuse(name, f"is {value!r}; must be a {'non-empty ' if required else ''}list of module names")
            return ()
        return tuple(value)

    def patterns(self, name: str) -> tuple[str, ...]:
        values = self.names(name)
        for value in values:
            self._check_pattern(name, value)
        return values

    def layers(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        value = [value] if isinstance(value, int) else value or []
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            self.refuse(name, f"is {value!r}; must be a layer index or a list of them")
            return ()
        return tuple(value)

    def one_of(self, name: str, allowed: Sequence[str]) -> str:
        value = self.raw.get(name, allowed[0])
        if value in allowed:
            return str(value)
        self.refuse(name, f"is {value!r}; must be one of {', '.join(allowed)}")
        return allowed[0]

    def tokens(self, name: str) -> tuple[int, ...]:
        return self._tokens(name, self.raw.get(name) or [])

    def token_indices(self, name: str) -> dict[str, tuple[int, ...]]:
        value = self.raw.get(name) or {}
        by_module = {"": value} if isinstance(value, list) else value
        if not isinstance(by_module, dict):
            self.refuse(name, f"is {value!r}; must be a list of token ids, or map modules to such lists")
            return {}
        return {module: self._tokens(f"{name}[{module!r}]", ids) for module, ids in by_module.items()}

    def _tokens(self, name: str, value: object) -> tuple[int, ...]:
        if isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
            return tuple(value)
        self.refuse(name, f"is {str(value)[:80]}; must be a list of token ids")
        return ()

    def pattern(self, name: str, check: Callable[[object], T]) -> dict[str, T]:
        value = self.raw.get(name) or {}
        if not isinstance(value, dict):
            self.refuse(name, f"is {value!r}; must map module patterns to numbers")
            return {}
        for key in value:
            self._check_pattern(name, key)
        return {key: self._checked(f"{name}[{key!r}]", item, check, check(1)) for key, item in value.items()}

    def _check_pattern(self, name: str, pattern: str) -> None:
        try:
            regex.compile(pattern)
        except regex.error as error:
            self.refuse(name, f"{pattern!r} is not a regular expression ({error})")

    def _checked(self, name: str, value: object, check: Callable[[object], T], fallback: T) -> T:
        try:
            return check(value)
        except ValueError as error:
            self.refuse(name, str(error))
            return fallback


def _match(pattern: str, module: str) -> regex.Match[str] | None:
    """`re.match` that others can run beside and that ends: raises TimeoutError after `MATCH_TIMEOUT_S`."""
    return regex.match(pattern, module, timeout=MATCH_TIMEOUT_S, concurrent=True)


def _lookup(patterns: Mapping[str, T], module: str, default: T) -> T:
    """PEFT's `get_pattern_key`: the first pattern that matches the module's name or a dotted end of it."""
    for pattern, value in patterns.items():
        if _match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _matches(wanted: str | Sequence[str], module: str) -> bool:
    if isinstance(wanted, str):
        return _match(rf"(?:{wanted})\Z", module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)
