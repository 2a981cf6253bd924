"""A Llama of Hugging Face's and its PEFT adapters as GGUF, by the `gguf` package. Written once; then left as it is.

Weights of q and k go by pairs of (even, odd) there, where Hugging Face's go by halves.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import load_file

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TYPES = {"float32": GGMLQuantizationType.F32, "bfloat16": GGMLQuantizationType.BF16}


def by_pairs(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """[heads · 2 · half, n] -> the same rows by [heads, half, 2]."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def heads_of(config: dict[str, int], name: str) -> int:
    """Of the rows that a projection makes; 0 where they stay in their order."""
    if name.endswith("q_proj"):
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if name.endswith("k_proj") else 0


def read_config(base: Path) -> dict[str, int]:
    config: dict[str, int] = json.loads((base / "config.json").read_text())
    return config


def write(writer: GGUFWriter, target: Path) -> Path:
    writer.write_header_to_file(target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def add(writer: GGUFWriter, name: str, data: numpy.ndarray, dtype: str) -> None:
    kind = TYPES[dtype] if data.ndim == 2 else GGMLQuantizationType.F32
    writer.add_tensor(name, quantize(numpy.ascontiguousarray(data, dtype=numpy.float32), kind), raw_dtype=kind)


def write_base(base: Path, target: Path, dtype: str) -> Path:
    if target.exists():
        return target
    config = read_config(base)
    writer = GGUFWriter(target, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")  # prompts are token ids: any words do
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{index}" for index in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    for key, tensor in load_file(base / "model.safetensors").items():
        name = key.removesuffix(".weight")
        if heads := heads_of(config, name):
            tensor = by_pairs(tensor, heads)  # noqa: PLW2901
        add(writer, f"{gguf_name(name)}.weight", tensor, dtype)
    return write(writer, target)


def write_adapter(base: Path, folder: Path, target: Path, dtype: str) -> Path:
    if target.exists():
        return target
    config = read_config(base)
    writer = GGUFWriter(target, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32(
        "adapter.lora.alpha", float(json.loads((folder / "adapter_config.json").read_text())["lora_alpha"])
    )
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name, _, part = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if part == "lora_B" and (heads := heads_of(config, name)):
            tensor = by_pairs(tensor, heads)  # noqa: PLW2901
        add(writer, f"{gguf_name(name)}.weight.{part.lower()}", tensor, dtype)
    return write(writer, target)


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if name in whole:
        return whole[name]
    _, _, layer, part = name.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}"
