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
    "alpha_pattern", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "peft_type", "r", "rank_pattern", "target_modules", "task_type", "use_rslora",
})  # fmt: skip

_REFUSED_WHEN_SET = {
    "alora_invocation_tokens": "activated LoRA is not served",
    "arrow_config": "Arrow routing is not served",
    "bias": "trained biases are not served; train with bias='none'",
    "ensure_weight_tying": "tied extra weights are not served",
    "kasa_config": "KaSA is not served",
    "layer_replication": "replicated layers change the base model",
    "lora_bias": "a bias in lora_B is not served",
    "megatron_config": "Megatron modules are not served",
    "modules_to_save": "fully trained modules are not served; train with LoRA on linear modules only",
    "monteclora_config": "MonteCLoRA is not served",
    "target_parameters": "LoRA on bare parameters is not served",
    "trainable_token_indices": "trained token rows are not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "use_dora": "DoRA is not served",
    "use_qalora": "QA-LoRA is not served",
    "velora_config": "VeLoRA is not served",
}
"""Fields that change what the adapter computes, in a way this server can't reproduce, and why."""

_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weights as they are, so that A and B alone are the whole adapter."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What `adapter_config.json` says of the computation; `rank` and `scale` answer for each module."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

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

    def targets(self, module: str) -> bool:
        """Whether PEFT would put LoRA on this linear module (`check_target_module_exists`)."""
        if _matches(self.exclude_modules, module):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == "all-linear" or _matches(self.target_modules, module)
        return _matches(self.target_modules, module) and self._layer_selected(module)

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
        if raw.get(name) not in (None, False, [], {}, "none"):
            fields.refuse(name, f"{raw[name]!r} is set, and {why}")
    for name in sorted(raw.keys() - _NO_EFFECT - _HONOURED - _REFUSED_WHEN_SET.keys()):
        if raw[name] not in (None, False, [], {}):
            fields.refuse(name, "is not a LoRA field this server knows, so it can't say what the adapter computes")
    config = PeftConfig(
        r=fields.rank("r"),
        lora_alpha=fields.alpha("lora_alpha"),
        use_rslora=fields.boolean("use_rslora"),
        target_modules=fields.modules("target_modules"),
        exclude_modules=fields.modules("exclude_modules", required=False),
        layers_to_transform=fields.layers("layers_to_transform"),
        layers_pattern=fields.patterns("layers_pattern"),
        rank_pattern=fields.pattern("rank_pattern", _check_rank),
        alpha_pattern=fields.pattern("alpha_pattern", _check_alpha),
    )
    if fields.problems:
        raise InvalidAdapter(source, fields.problems)
    return config


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
