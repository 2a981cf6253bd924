"""Which models are served, and how the others are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import Harness
from tiny import make_adapter, make_model, save_tokenizer

from weft.errors import InvalidConfig, InvalidModel
from weft.server.config import ModelConfig
from weft.server.engine.model import load_model

SERVED = ["gemma", "gpt_neox", "olmo2", "granite", "cohere2", "phi", "starcoder2", "opt", "qwen3_moe", "smollm3"]


def save(kind: str, folder: Path, **settings: object) -> Path:
    make_model(kind, folder, **settings)
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", SERVED)
def test_classes_that_use_the_attention_interface_are_served(kind: str, tmp_path: Path) -> None:
    harness = Harness(save(kind, tmp_path))
    assert "from transformers' own" in harness.info.startup_line


def test_float16_is_pytorchs_with_all_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        harness = Harness(save("llama", tmp_path), dtype="float16", threads=3)
        assert " in float16 on cpu (no C library, 3 threads), " in harness.info.startup_line
        assert torch.get_num_threads() == 3
        with pytest.raises(InvalidConfig, match="--lora-backend is cpu, the C library, which serves nothing here"):
            Harness(tmp_path, dtype="float16", lora_backend="cpu")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bloom", "does not use transformers' attention interface"),
        ("mamba", "layers of the kind linear_attention"),
        ("llama4_text", "layers of the kind chunked_attention"),
        ("bart", "can't be served"),
        ("mpt", "can't be served"),
        ("falcon", "does not use transformers' attention interface"),
    ],
)
def test_others_are_refused_in_one_line(kind: str, words: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path)
    with pytest.raises(InvalidModel, match=words) as refusal:
        Harness(folder)
    assert "\n" not in str(refusal.value)


def test_a_model_that_is_wrong_in_a_mixed_row_is_caught_by_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The position embedding of this copy looks at the row, not at position_ids: right alone, wrong in company."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder, forward = save("llama", tmp_path), LlamaRotaryEmbedding.forward

    def by_row(self: LlamaRotaryEmbedding, x: object, position_ids: object) -> object:
        return forward(self, x, position_ids=(position_ids * 0).cumsum(-1) + (position_ids * 0 + 1).cumsum(-1) - 1)

    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", by_row)
    with pytest.raises(InvalidModel, match="can't be served exactly"):
        Harness(folder)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "missing", "is not a folder"),
        (tmp_path, "holds no config.json"),
        (save_adapter(tmp_path), "holds no config.json"),
    ):
        with pytest.raises(InvalidModel, match=words):
            load_model(ModelConfig(str(path)))


def save_adapter(root: Path) -> Path:
    return make_adapter(make_model("llama", root / "base"), root / "adapter", target_modules=["q_proj"])


def test_broken_or_lacking_weights_are_refused(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(InvalidModel, match=r"lacks \d+ weights of its model"):
        load_model(ModelConfig(str(folder)))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InvalidModel, match="can't be loaded"):
        load_model(ModelConfig(str(folder)))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(InvalidModel, match="can't be loaded"):
        load_model(ModelConfig(str(folder)))


def test_a_rope_that_changes_with_length_is_served_as_far_as_it_does_not(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    harness = Harness(save("llama", tmp_path, rope_parameters=rope))
    assert harness.info.context_length == 64


def test_a_context_beyond_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="--context-length is 300; this model is exact up to 256"):
        Harness(save("llama", tmp_path), context_length=300)
    assert Harness(tmp_path, context_length=100).info.context_length == 100
    assert Harness(tmp_path, kv_tokens=64).info.context_length == 64


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    make_model("llama", tmp_path)
    with pytest.raises(InvalidModel, match="tokenizer"):
        Harness(tmp_path)


@pytest.mark.parametrize("broken", [{"num_attention_heads": 0}, {"num_attention_heads": "4"}, {"hidden_size": -1}])
def test_configs_that_make_no_sense_are_refused_in_one_line(tmp_path: Path, broken: dict[str, object]) -> None:
    config = save("llama", tmp_path) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **broken}))
    with pytest.raises(InvalidModel) as refusal:
        Harness(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_files_that_hold_a_list_are_refused_in_one_line(tmp_path: Path, file: str) -> None:
    (save("llama", tmp_path) / file).write_text("[]")
    with pytest.raises(InvalidModel) as refusal:
        Harness(tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_router_that_derives_from_linear_is_left_alone(tmp_path: Path) -> None:
    harness = Harness(save("phimoe", tmp_path, num_local_experts=4))
    assert not any("router" in name for name in harness.store._pool.base.modules)


def test_an_end_of_text_outside_the_vocabulary_is_ignored(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [2, 99999]}))
    assert Harness(folder).info.eos_token_ids == frozenset([2])


def test_too_small_a_cache_is_refused_by_its_option(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="--kv-tokens is 16; must be at least 32"):
        Harness(save("llama", tmp_path), kv_tokens=16)


def test_more_pages_than_memory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="--adapter-pages is 1048576, which takes"):
        Harness(save("llama", tmp_path), adapter_pages=1 << 20)


def test_positions_beyond_a_table_are_refused(tmp_path: Path) -> None:
    folder = save("gpt2", tmp_path, max_position_embeddings=64)
    assert Harness(folder).info.context_length == 64
    model = load_model(ModelConfig(str(folder)))
    with pytest.raises(InvalidModel, match="at position 64"):
        model.check_position(64)


def test_a_cache_larger_than_the_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"--kv-tokens is 1000000000000, which takes .* MiB"):
        Harness(save("llama", tmp_path), kv_tokens=10**12)


def test_half_precision_is_served_within_its_precision(tmp_path: Path) -> None:
    folder = save("llama", tmp_path)
    model = load_model(ModelConfig(str(folder), dtype="bfloat16"))
    assert str(model.dtype) == "torch.bfloat16"
