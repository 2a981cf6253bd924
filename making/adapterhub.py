"""From a folder of AdapterHub's library `adapters` to a folder that is served.

Formulas and fields are those of adapters 1.3: `methods/modeling.py`, `configuration/adapter_config.py`. Its blocks of
decoders have no norm behind a sub-layer: h being the residual stream before one, and y what it gives, they go on with

    h + y + s up(act(down(x)))        x = y;  h + y with original_ln_before;  h with is_parallel
"""

from __future__ import annotations

import itertools
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weft.adapters.bottlenecks import PARTS, BottleneckConfig
from weft.adapters.folder import WEIGHTS_FILE
from weft.adapters.json_files import read_object, shown
from weft.adapters.peft_config import CONFIG_FILE
from weft.adapters.safe_files import open_regular
from weft.adapters.weights_file import read_tensors
from weft.errors import InvalidAdapter, Problem, cut_short
from weft.kernels.bottleneck import NON_LINEARITIES, Reads
from weft.making.destination import complete_folder

_NOT_EXPECTED = "is nothing that adapter_config.json has there"
_SPOILT = "is spoilt, or holds more than tensors"

_SAFETENSORS, _PICKLE = "adapter.safetensors", "pytorch_adapter.bin"
_HEAD = "head_config.json"
_NOT_SERVED = ("adapter_fusion_config.json", "adapter_interface.json")

_BLOCKS: Mapping[str, tuple[str, str, str]] = {
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "mistral": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
}
"""By model_type: where the blocks are, and the modules that end their attention and their MLP."""

_SUB_LAYERS = {"mh_adapter": "attention_adapters", "output_adapter": "output_adapters"}
_PARTS = ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
"""What the library calls `PARTS`."""

_LEAST_FACTOR = 0.01
_SAME = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new"}

_TOP = frozenset({"config", "hidden_size", "label2id", "model_class", "model_name", "model_type", "name", "version"})
_NO_EFFECT = frozenset({
    "adapter_residual_before_ln", "dropout", "factorized_phm_W", "factorized_phm_rule", "hypercomplex_nonlinearity",
    "init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "learn_phm", "phm_bias", "phm_c_init",
    "phm_dim", "phm_init_range", "phm_rank", "shared_W_phm", "shared_phm_rule", "stochastic_depth",
})  # fmt: skip
"""Of training, or of something that is refused."""

_REFUSED_WHEN_SET = {
    "architecture": "only bottleneck adapters are converted",
    "cross_adapter": "decoders have no cross attention",
    "inv_adapter": "invertible adapters change the embeddings, which is not served",
    "ln_after": "layer norms of the adapter's own are not served",
    "ln_before": "layer norms of the adapter's own are not served",
    "phm_layer": "Compacter's products are not served",
    "use_gating": "its gate is a mean over all tokens, so that each new one would change those before",
}
_HONOURED = frozenset({
    "is_parallel", "leave_out", "mh_adapter", "non_linearity", "original_ln_after", "original_ln_before",
    "output_adapter", "reduction_factor", "residual_before_ln", "scaling",
})  # fmt: skip

_READS_BY = ("original_ln_before", "original_ln_after", "residual_before_ln")
_READS: Mapping[tuple[Any, ...], Reads] = {
    (False, True, True): Reads.OUTPUT,
    (False, True, False): Reads.OUTPUT,
    (True, True, True): Reads.SUM,
    (True, False, False): Reads.SUM,
}
"""Of adapters that are not parallel. What else there is loses the residual or adds it twice, and "post_add" fails."""


def convert(folder: Path, output: Path, *, without_head: bool = False) -> BottleneckConfig:
    """Write what `folder` holds to `output`, a new folder. without_head: leave an output head beside it out.

    Raises InvalidAdapter with what can't be honoured, and InvalidConfig where `output` can't be written.
    """
    source = str(folder)
    raw = read_object(folder / CONFIG_FILE, source)
    _refuse(source, [*_wrong_files(folder, without_head=without_head), *_wrong_fields(raw)])
    hub = _Hub(raw["model_type"], raw["name"], raw["hidden_size"], raw["config"])
    tensors, problems = _convert_tensors(hub, _read(folder, source))
    _refuse(source, problems)
    write_folder(hub.config, tensors, output)
    return hub.config


def write_folder(config: BottleneckConfig, tensors: Mapping[str, torch.Tensor], output: Path) -> None:
    """A new folder that is served. Raises InvalidConfig where it can't be written."""
    with complete_folder(output) as made:
        save_file(dict(tensors), made / WEIGHTS_FILE)
        (made / CONFIG_FILE).write_text(json.dumps(config.fields(), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class _Hub:
    """adapter_config.json, once its fields are known to be right; fields: of its `config`."""

    model_type: str
    name: str
    hidden_size: int
    fields: Mapping[str, Any]

    @property
    def ends(self) -> dict[str, str]:
        """The modules of a block that are adapted, by what the library calls their adapters."""
        ends = zip(_SUB_LAYERS.items(), _BLOCKS[self.model_type][1:], strict=True)
        return {adapters: end for (name, adapters), end in ends if self.fields[name]}

    @property
    def config(self) -> BottleneckConfig:
        blocks, ends = _BLOCKS[self.model_type][0], tuple(self.ends.values())
        return BottleneckConfig(
            non_linearity=_non_linearity(self.fields),
            reads=_reads(self.fields) or Reads.OUTPUT,
            target_modules=ends,
            exclude_modules=tuple(f"{blocks}.{layer}.{end}" for layer in self.left_out for end in ends),
        )

    @property
    def left_out(self) -> list[int]:
        return sorted(self.fields.get("leave_out") or [])

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Of each tensor that a network of this layer has."""
        factor, scaling, width = self.fields["reduction_factor"], self.fields["scaling"], self.hidden_size
        if isinstance(factor, dict):
            factor = factor.get(str(layer), factor.get("default", math.inf))
        rank = max(1, int(width // factor))
        shapes = dict(zip(_PARTS, [(rank, width), (rank,), (width, rank), (width,)], strict=True))
        return shapes | ({"scaling": (1 if scaling == "learned" else width,)} if isinstance(scaling, str) else {})


def _refuse(source: str, problems: list[Problem]) -> None:
    if problems:
        raise InvalidAdapter(source, cut_short(problems, source))


def _wrong_files(folder: Path, *, without_head: bool) -> Iterator[Problem]:
    for name in _NOT_SERVED:
        if (folder / name).exists():
            yield Problem(name, "is there, and neither fusions nor models by interface are converted")
    if (folder / _HEAD).exists() and not without_head:
        yield Problem(_HEAD, "tells of an output head: if it is the base's own, convert with --without-head")


def _wrong_fields(raw: Mapping[str, Any]) -> Iterator[Problem]:
    if not str(raw.get("version")).startswith("adapters."):
        yield Problem("version", f"is {shown(raw.get('version'))}: load and save it with AdapterHub's `adapters` first")
    if raw.get("model_type") not in list(_BLOCKS):
        words = "whose blocks have their norm before each sub-layer and are laid out as is known here"
        yield Problem("model_type", f"is {shown(raw.get('model_type'))}; must be one of {', '.join(_BLOCKS)}, {words}")
    if type(raw.get("hidden_size")) is not int or not isinstance(raw.get("name"), str):
        yield Problem("hidden_size, name", "must be a whole number and a text")
    yield from _unknown(raw, _TOP)
    fields = raw.get("config")
    if isinstance(fields, dict):
        yield from _wrong_config(fields)
    else:
        yield Problem("config", "must hold an object")


def _wrong_config(fields: Mapping[str, Any]) -> Iterator[Problem]:
    for name, why in _REFUSED_WHEN_SET.items():
        if fields.get(name):
            yield Problem(name, f"is set, and {why}")
    yield from _unknown(fields, _NO_EFFECT | _REFUSED_WHEN_SET.keys() | _HONOURED)
    if sorted(str(fields.get(name)) for name in _SUB_LAYERS) not in (["False", "True"], ["True", "True"]):
        yield Problem("mh_adapter, output_adapter", "must be true or false, and one of them true")
    if _non_linearity(fields) not in NON_LINEARITIES:
        words = f"is {shown(fields.get('non_linearity'))}; must be one of {', '.join([*NON_LINEARITIES, *_SAME])}"
        yield Problem("non_linearity", words)
    if _reads(fields) is None:
        words = "together lose the residual stream or add it twice, or fail in the library itself"
        yield Problem(", ".join(_READS_BY), words)
    factor = fields.get("reduction_factor")
    factors: list[Any] = list(factor.values()) if isinstance(factor, dict) else [factor]
    if not all(_is_number(each) and each >= _LEAST_FACTOR for each in factors):
        words = f"must be a number from {_LEAST_FACTOR} on, or map layers to such"
        yield Problem("reduction_factor", f"is {shown(factor)}; {words}")
    if not _is_number(fields.get("scaling")) and fields.get("scaling") not in ("learned", "channel"):
        yield Problem("scaling", f"is {shown(fields.get('scaling'))}; must be a number, 'learned' or 'channel'")
    left_out = fields.get("leave_out")
    if left_out and not (isinstance(left_out, list) and all(type(layer) is int for layer in left_out)):
        yield Problem("leave_out", f"is {shown(left_out)}; must be a list of layers")


def _unknown(fields: Mapping[str, Any], known: frozenset[str]) -> Iterator[Problem]:
    for name in sorted(name for name in fields.keys() - known if fields[name]):
        yield Problem(shown(name), "is set, and not a field that is known here, so what it changes can't be told")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _non_linearity(fields: Mapping[str, Any]) -> str:
    name = str(fields.get("non_linearity")).lower()
    return _SAME.get(name, name)


def _reads(fields: Mapping[str, Any]) -> Reads | None:
    """None where the library makes nothing sound of it."""
    if fields.get("is_parallel"):
        return Reads.RESIDUAL if fields.get("original_ln_after") is True else None
    flags = tuple(map(fields.get, _READS_BY))
    return _READS.get(flags) if all(isinstance(flag, bool) for flag in flags) else None


def _read(folder: Path, source: str) -> dict[str, torch.Tensor]:
    if (folder / _SAFETENSORS).exists():
        return read_tensors(folder / _SAFETENSORS, source, most=1 << 40)
    try:
        with open_regular(folder / _PICKLE) as file, warnings.catch_warnings(action="ignore"):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InvalidAdapter(source, [Problem(_PICKLE, f"can't be read: {error.strerror}")]) from None
    except Exception as error:  # whatever a file makes PyTorch raise, the user gets one line
        raise InvalidAdapter(source, [Problem(_PICKLE, _SPOILT)]) from error
    if not isinstance(found, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
        raise InvalidAdapter(source, [Problem(_PICKLE, _SPOILT)])
    return found


def _convert_tensors(hub: _Hub, tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[Problem]]:
    """Every tensor by the name and with the numbers that it is served with."""
    blocks = _BLOCKS[hub.model_type][0]
    root, _, last = blocks.rpartition(".")
    name_of = re.compile(rf"(?:{root}\.)?{last}\.(\d+)\.(\w+)\.adapters\.{re.escape(hub.name)}\.(.+)")
    networks: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    problems: list[Problem] = []
    for name, tensor in tensors.items():
        match = name_of.fullmatch(name)
        if match is None or match[2] not in hub.ends or int(match[1]) in hub.left_out:
            problems.append(Problem(name, _NOT_EXPECTED))
        else:
            networks.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    num_layers = 1 + max((layer for layer, _ in networks), default=0)
    num_layers = min(num_layers, len(tensors) + len(hub.left_out))  # where there are more, some have none
    converted: dict[str, torch.Tensor] = {}
    for layer, (adapters, end) in itertools.product(range(num_layers), hub.ends.items()):
        if layer in hub.left_out:
            continue
        parts = networks.get((layer, adapters), {})
        wrong = _wrong_parts(f"{blocks}.{layer}.{adapters}", parts, hub.shapes(layer))
        problems += wrong
        if not wrong:
            converted |= {f"{blocks}.{layer}.{end}.{part}": tensor for part, tensor in _scaled(hub, parts).items()}
    return converted, problems


def _wrong_parts(where: str, parts: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[Problem]:
    problems = [Problem(f"{where}.{part}", "is not in the file") for part in sorted(shapes.keys() - parts.keys())]
    problems += [Problem(f"{where}.{part}", _NOT_EXPECTED) for part in sorted(parts.keys() - shapes.keys())]
    for part in sorted(parts.keys() & shapes.keys()):
        if tuple(parts[part].shape) != shapes[part]:
            words = f"has shape {list(parts[part].shape)}; adapter_config.json needs {list(shapes[part])}"
            problems.append(Problem(f"{where}.{part}", words))
    return problems


def _scaled(hub: _Hub, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By their names here, and with the scale in the up-projection."""
    served = {ours: parts[theirs].contiguous() for ours, theirs in zip(PARTS, _PARTS, strict=True)}
    fixed = hub.fields["scaling"]
    scale = parts["scaling"].double() if isinstance(fixed, str) else torch.tensor([float(fixed)], dtype=torch.float64)
    if not torch.equal(scale, torch.ones_like(scale)):
        served["up.weight"] = (scale[:, None] * served["up.weight"].double()).float()
        served["up.bias"] = (scale * served["up.bias"].double()).float()
    return served
