"""A model's safetensors, one file or sharded, of a local folder or a hub: read one tensor at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from weft.errors import InvalidModel, one_line

_WITHOUT_EFFECT = re.compile(
    r"^_|^(architectures|.*dtype|transformers_version|use_cache|tie_word_embeddings|vocab_size|.*_token_id|initializer_.*"
    r"|id2label|label2id|problem_type|task_specific_params|pretraining_tp|.*dropout.*|.*pdrop|output_.*|return_dict)$"
)
"""Settings that say how a model was made, or that its tensors' names and shapes tell already."""

_BUFFERS = (r"rotary_emb\.inv_freq$", r"attn\.masked_bias$")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a causal language model is made of, by transformers' names; it holds no weights.

    parameters: shapes. linear: nn.Linear and Conv1D but the output head; transposed: the Conv1D among them. tied: a
    parameter that is another one. settings: of the config, what may change what the model computes. prefix: of the
    parameters without the head. buffers: what older files hold, and transformers computes anew.
    """

    parameters: Mapping[str, tuple[int, ...]]
    linear: frozenset[str]
    transposed: frozenset[str]
    tied: Mapping[str, str]
    settings: Mapping[str, object]
    prefix: str
    buffers: re.Pattern[str]

    @property
    def modules(self) -> set[str]:
        """The names of those that have parameters."""
        return {name.rpartition(".")[0] for name in self.parameters}

    def name(self, key: str) -> str:
        """The model's name for a tensor of a file, which may lack the prefix of the whole model, or have it alone."""
        others = (f"{self.prefix}.{key}", key.removeprefix(f"{self.prefix}."))
        return next((name for name in (key, *others) if name in self.parameters), key)


def read_skeleton(name: str) -> Skeleton:
    """Raises InvalidModel where this is no causal language model."""
    config = read_config(name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        raise InvalidModel(f"{name} is no causal language model that transformers knows: {one_line(error)}") from error
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    names = {id(module): path for path, module in model.named_modules()}
    is_tied = head is not None and head.weight is embedding.weight
    return Skeleton(
        parameters={path: tuple(each.shape) for path, each in model.named_parameters(remove_duplicate=False)},
        linear=frozenset(linear),
        transposed=frozenset(path for path, module in linear.items() if isinstance(module, Conv1D)),
        tied={f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"} if is_tied else {},
        settings=_settings(config.to_dict()),
        prefix=model.base_model_prefix,
        buffers=re.compile("|".join([*_BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())])),  # noqa: SLF001 - transformers itself goes by them
    )


class Checkpoint:
    """The tensors of one model by the names that a skeleton gives them."""

    def __init__(self, name: str, skeleton: Skeleton) -> None:
        """name: a folder or a hub id. Raises InvalidModel where there are no sound safetensors."""
        self.name = name
        self.settings = skeleton.settings
        self._places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in _files(name):
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 - it is no mapping
                        parameter = skeleton.name(key)
                        if parameter in skeleton.parameters or not skeleton.buffers.search(key):
                            self._add(parameter, path, key, file.get_slice(key))
            except (SafetensorError, OSError) as error:
                raise InvalidModel(f"{name}: {path.name} can't be read: {one_line(error)}") from None
        for follower, leader in skeleton.tied.items():
            if follower not in self._places and leader in self._places:
                self.shapes[follower], self.dtypes[follower] = self.shapes[leader], self.dtypes[leader]
                self._places[follower] = self._places[leader]

    def _add(self, name: str, path: Path, key: str, tensor: object) -> None:
        self._places[name] = (path, key)
        self.shapes[name] = tuple(tensor.get_shape())  # type: ignore[attr-defined]
        self.dtypes[name] = tensor.get_dtype()  # type: ignore[attr-defined]

    def read(self, name: str) -> torch.Tensor:
        """One tensor, mapped from its file: its pages leave the memory with it."""
        path, key = self._places[name]
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor


def _settings(values: Mapping[str, object]) -> dict[str, object]:
    """Those that may have an effect, of a config and of those in it."""
    kept = {key: value for key, value in values.items() if not _WITHOUT_EFFECT.search(key)}
    return {key: _settings(value) if isinstance(value, dict) else value for key, value in kept.items()}


def read_config(name: str) -> PretrainedConfig:
    """A model's settings, of a folder or a hub id. Raises InvalidModel where there are none."""
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or path.exists()):
        raise InvalidModel(f"{name} is not a folder: name a Hugging Face model folder or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InvalidModel(f"{name} holds no config.json: it is not a Hugging Face model folder")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidModel(f"{name} can't be had: {one_line(error)}") from None
    return config


def _files(name: str) -> list[Path]:
    whole = _file(name, SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [whole]
    index = _file(name, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise InvalidModel(f"{name} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}: save it again")
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        raise InvalidModel(f"{name}: {index.name} is no index of shards") from None
    paths = {shard: _file(name, str(shard)) for shard in shards}
    if missing := [shard for shard, path in paths.items() if path is None]:
        raise InvalidModel(f"{name} lacks {', '.join(missing)}")
    return [path for path in paths.values() if path is not None]


def _file(name: str, file: str) -> Path | None:
    try:
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise InvalidModel(f"{name}: {file} can't be had: {one_line(error)}") from None
    return None if path is None else Path(path)
