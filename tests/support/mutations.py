"""Good adapters of every kind for one tiny base, and ways to spoil the folder of one."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from features import LEGACY, make_legacy_adapter
from safetensors.torch import load_file, save_file
from tiny import make_adapter, make_model, save_tokenizer
from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYERS, HIDDEN = 2, 32

Spoil = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]

_Q_V = ["q_proj", "v_proj"]

GOOD: Mapping[str, dict[str, Any]] = {
    "lora": {},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "saved": {"modules_to_save": ["lm_head", "model.norm"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [9, 5, 30]}},
    "embedding": {"target_modules": [*_Q_V, "embed_tokens", "lm_head"]},
    "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "activated": {"alora_invocation_tokens": [104, 105]},
    "single-experts": {},
}
"""What each has that a plain one has not."""

STRANGERS: Mapping[str, dict[str, Any]] = {
    "wider": {"hidden_size": 64},
    "narrower heads": {"head_dim": 4},
    "more layers": {"num_hidden_layers": LAYERS + 1},
    "fewer layers": {"num_hidden_layers": LAYERS - 1},
}
"""Other bases, by what differs; those below differ where only some adapters reach."""

STRANGER_PARTS: Mapping[str, tuple[dict[str, Any], str]] = {
    "larger vocabulary, head": ({"vocab_size": 300}, "saved"),
    "smaller vocabulary, head": ({"vocab_size": 200}, "saved"),
    "larger vocabulary, embedding": ({"vocab_size": 300}, "embedding"),
    "more experts": ({"num_experts": 8}, "experts"),
    "wider experts": ({"moe_intermediate_size": 24}, "experts"),
}


def make_base(folder: Path, **differences: Any) -> PreTrainedModel:
    """A mixture of experts with biases: it has a place for everything that an adapter may hold."""
    sizes = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    common = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "attention_bias": True}
    model = make_model("qwen3_moe", folder, **{**sizes, **common, **differences})
    save_tokenizer(folder)
    return model


def make_good(model: PreTrainedModel, folder: Path, kind: str) -> Path:
    if kind == "single-experts":
        return make_legacy_adapter(model, folder, *LEGACY["qwen3_moe"])
    return make_adapter(model, folder, seed=len(kind), **{"r": 4, "target_modules": _Q_V, **GOOD[kind]})


@dataclass(frozen=True)
class Mutation:
    """A good adapter of some kind, what is done to it, and what the refusal must say."""

    id: str
    kind: str
    spoil: Spoil
    words: str


def config(**fields: Any) -> Spoil:
    """Set fields of the config."""

    def spoil(folder: Path) -> None:
        held = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**held, **fields}))

    return spoil


def content(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    """Change the bytes of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return spoil


def cut(name: str, share: float, by: int = 0) -> Spoil:
    """Keep a share of a file, and some bytes more or less."""
    return content(name, lambda data: data[: max(0, int(len(data) * share) + by)])


def tensors(change: Callable[[Tensors], object]) -> Spoil:
    """Change the tensors, and save them as safetensors does."""

    def spoil(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file({name: tensor.contiguous().clone() for name, tensor in held.items()}, folder / WEIGHTS)

    return spoil


def key_of(names: Mapping[str, Any], part: str) -> str:
    """The first name that holds a part."""
    return next(name for name in sorted(names) if part in name)


def tensor(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    """Put another tensor in the place of one."""
    return tensors(lambda held: held.update({(key := key_of(held, part)): change(held[key])}))


def last(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One number of a tensor, replaced."""

    def change(held: torch.Tensor) -> torch.Tensor:
        held.view(-1)[-1] = value
        return held

    return change


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Change what the header of the weights says, and nothing else."""

    def spoil(data: bytes) -> bytes:
        held, rest = _parts(data)
        change(held)
        return _with_header(json.dumps(held).encode(), rest)

    return content(WEIGHTS, spoil)


def entry(part: str, **fields: Any) -> Spoil:
    """Change what the header says of one tensor."""
    return header(lambda held: held[key_of(held, part)].update(fields))


def raw_header(change: Callable[[bytes], bytes]) -> Spoil:
    """Change the header's text."""
    return content(WEIGHTS, lambda data: _with_header(change(json.dumps((p := _parts(data))[0]).encode()), p[1]))


def header_length(change: Callable[[int], int]) -> Spoil:
    """Change how long the file says that its header is."""
    return content(WEIGHTS, lambda data: struct.pack("<Q", change(struct.unpack("<Q", data[:8])[0])) + data[8:])


def instead(name: str, make: Callable[[Path], object]) -> Spoil:
    """Put something else in the place of a file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def sparse(name: str, begin: bytes, num_bytes: int) -> Spoil:
    """A file that is huge, and takes no room on the disk."""

    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.write(begin)
            file.truncate(num_bytes)

    return instead(name, make)


def make_socket(path: Path) -> None:
    """A Unix socket; made by a short name, since theirs may not be long."""
    with socket.socket(socket.AF_UNIX) as made:
        short = Path(f"/tmp/weft-{os.getpid()}")  # noqa: S108 - moved away at once
        made.bind(str(short))
        shutil.move(short, path)


def replaced(folder: Path, make: Callable[[Path], object]) -> None:
    """Put something else in the place of the whole folder."""
    shutil.rmtree(folder)
    make(folder)


def _parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _with_header(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data
