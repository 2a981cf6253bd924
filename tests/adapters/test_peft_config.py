"""adapter_config.json: each field honoured as peft honours it, or refused by name."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from weft.adapters.peft_config import _HONOURED, _NO_EFFECT, _REFUSED_WHEN_SET, PeftConfig, read_config
from weft.errors import InvalidAdapter

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
MODULES = [
    f"model.layers.{i}.{part}"
    for i in (0, 1, 11)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.q_proj_extra")
]


def read(folder: Path, **fields: Any) -> PeftConfig:
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **fields}))
    return read_config(folder, "test")


def test_every_field_of_the_installed_peft_is_honoured_harmless_or_refused() -> None:
    known = _HONOURED | _NO_EFFECT.keys() | _REFUSED_WHEN_SET.keys()
    assert set(LoraConfig().to_dict()) - known == set()


def test_a_config_that_peft_wrote_is_read(tmp_path: Path) -> None:
    LoraConfig(r=12, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = read_config(tmp_path, "test")
    assert (config.r, config.default_scale, config.use_rslora) == (12, 0.5, False)
    assert set(config.target_modules) == {"q_proj", "v_proj"}


def test_rslora_scales_by_the_square_root(tmp_path: Path) -> None:
    assert read(tmp_path, use_rslora=True).default_scale == 16 / math.sqrt(8)


def test_patterns_give_modules_their_own_rank_and_scale(tmp_path: Path) -> None:
    config = read(tmp_path, rank_pattern={"layers.1.self_attn.q_proj": 4}, alpha_pattern={r".*\.up_proj": 2})
    assert config.rank("model.layers.1.self_attn.q_proj") == 4
    assert config.scale("model.layers.1.self_attn.q_proj") == 16 / 4
    assert config.rank("model.layers.11.self_attn.q_proj") == 8
    assert config.scale("model.layers.0.mlp.up_proj") == 2 / 8


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "up_proj"]},
        {"target_modules": r".*self_attn\.(q|v)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["model.layers.0.mlp.up_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "blocks"]},
    ],
)
def test_modules_are_targeted_as_peft_targets_them(tmp_path: Path, fields: dict[str, Any]) -> None:
    ours = read(tmp_path, **fields)
    theirs = LoraConfig(**fields)
    for module in MODULES:
        assert ours.targets(module) == bool(check_target_module_exists(theirs, module)), module


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 2.5),
        ("r", True),
        ("r", 1 << 60),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("target_modules", []),
        ("target_modules", [1]),
        ("target_modules", "(unclosed"),
        ("target_modules", None),
        ("use_rslora", "yes"),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"(q_proj": 8}),
        ("layers_pattern", ["(layers"]),
        ("layers_to_transform", ["one"]),
        ("peft_type", "IA3"),
        ("task_type", "TOKEN_CLS"),
        ("task_type", ["SEQ_CLS"]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "pissa_niter_4"),
        ("use_dora", 1),
        ("bias", "unheard of"),
        ("modules_to_save", [3]),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1, -2]),
        ("trainable_token_indices", {"embed_tokens": "all"}),
        ("alora_invocation_tokens", "now"),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1}),
        ("megatron_config", {"a": 1}),
        ("monteclora_config", {"num_samples": 2}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("velora_config", {"rank": 1}),
        ("a_field_of_tomorrow", 3),
    ],
)
def test_a_bad_or_unserved_value_is_refused_by_the_name_of_its_field(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(InvalidAdapter) as refusal:
        read(tmp_path, **{field: value})
    assert any(problem.subject.startswith(field) for problem in refusal.value.problems), refusal.value


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter) as refusal:
        read(tmp_path, r=0, use_dora="yes", bias="some")
    assert {problem.subject for problem in refusal.value.problems} == {"r", "use_dora", "bias"}


@pytest.mark.parametrize(
    ("fields", "subject"),
    [
        ({"lora_bias": True, "use_dora": True}, "lora_bias"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alora_invocation_tokens": [1], "bias": "all"}, "bias"),
    ],
)
def test_fields_that_exclude_each_other_are_refused(tmp_path: Path, fields: dict[str, Any], subject: str) -> None:
    with pytest.raises(InvalidAdapter) as refusal:
        read(tmp_path, **fields)
    assert subject in {problem.subject for problem in refusal.value.problems}


def test_saved_modules_are_matched_by_the_end_of_a_name_and_hold_their_parts(tmp_path: Path) -> None:
    config = read(tmp_path, modules_to_save=["norm", "layers.1.mlp"])
    names = ["model.norm", "model.layers.0.input_layernorm", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"]
    assert [config.saves(name) for name in names] == [True, True, True, False]


def test_a_list_of_tokens_is_for_the_input_embedding(tmp_path: Path) -> None:
    config = read(tmp_path, trainable_token_indices=[4, 2])
    assert config.tokens_of("model.wte", is_embedding=True) == (4, 2)
    assert config.tokens_of("lm_head", is_embedding=False) == ()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"r": 8, "r": 9}', b'{"r": "\\ud800"}', b"null", b"[" * 100_000, b"\xff\xfe\x00"]
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json"):
        read_config(tmp_path, "test")


def test_no_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json.*No such file"):
        read_config(tmp_path, "test")


def test_a_pipe_is_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(InvalidAdapter, match="not a regular file"):
        read_config(tmp_path, "test")


def test_a_huge_config_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(" " * (1 << 20) + "{}")
    with pytest.raises(InvalidAdapter, match="larger than"):
        read_config(tmp_path, "test")
