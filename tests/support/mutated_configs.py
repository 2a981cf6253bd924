"""Mutations of adapter_config.json, and of what kind of files there are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from mutations import (
    CONFIG,
    WEIGHTS,
    Mutation,
    Spoil,
    config,
    content,
    instead,
    make_socket,
    replaced,
    sparse,
)
from peft import LoraConfig


def no_config() -> Iterator[Mutation]:
    """What is no JSON object at all, or not a sound one."""
    for name, change in {
        "list": lambda raw: b"[" + raw + b"]",
        "number": lambda raw: b"7",
        "text": lambda raw: b'"LORA"',
        "null": lambda raw: b"null",
        "true": lambda raw: b"true",
        "blank": lambda raw: b" \n ",
        "zeros": lambda raw: bytes(len(raw)),
        "UTF-16": lambda raw: raw.decode().encode("utf-16"),
        "byte-order mark": lambda raw: b"\xef\xbb\xbf" + raw,
        "Latin-1": lambda raw: raw.replace(b"LORA", b"L\xd6RA"),
        "half a surrogate": lambda raw: raw.replace(b"LORA", b"\\ud800"),
        "two objects": lambda raw: raw + raw,
        "very deep": lambda raw: b'{"r":' * 100_000 + b"1" + b"}" * 100_000,
        "deep": lambda raw: b'{"peft_type":' + b"[" * 500 + b"]" * 500 + b"}",
        "r twice": lambda raw: raw.replace(b'"r": 4', b'"r": 4, "r": 8'),
        "a nested key twice": lambda raw: raw.replace(b'"rank_pattern": {}', b'"rank_pattern": {"q": 1, "q": 2}'),
        "20,000 keys": lambda raw: json.dumps({f"k{i}": 0 for i in range(20_000)}).encode(),
        "a number of 5,000 digits": lambda raw: raw.replace(b'"r": 4', b'"r": ' + b"9" * 5000),
    }.items():
        yield Mutation(f"config, {name}", "lora", content(CONFIG, change), "")


def wrong_fields() -> Iterator[Mutation]:
    """Every field of the installed peft, with values of types that it can't have."""
    values = {"a map": {"an": ["odd", "map"]}, "a number": 1.5, "text": "an\nodd\x1btext"}
    fits = {
        "lora_alpha": "a number",
        "lora_dropout": "a number",
        "target_modules": "text",
        "exclude_modules": "text",
        "base_model_name_or_path": "text",
        "revision": "text",
        "peft_version": "text",
        "megatron_core": "text",
        "auto_mapping": "a map",
        "runtime_config": "a map",
        "corda_config": "a map",
        "eva_config": "a map",
        "loftq_config": "a map",
        "lora_ga_config": "a map",
    }
    for name in sorted(LoraConfig().to_dict()):
        for what, value in values.items():
            if fits.get(name) != what:
                yield Mutation(f"{name} is {what}", "lora", config(**{name: value}), name)


def wrong_values() -> Iterator[Mutation]:
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("lora", {"r": 0}, "r: is 0"),
        ("lora", {"r": -4}, "r: is -4"),
        ("lora", {"r": True}, "r: is True"),
        ("lora", {"r": 8}, "has shape [4, 32]"),
        ("lora", {"r": 1 << 16}, "need [65536, 32]"),
        ("lora", {"r": 1 << 60}, "from 1 to"),
        ("lora", {"r": 1 << 63}, "from 1 to"),
        ("lora", {"lora_alpha": 0}, "changes nothing"),
        ("lora", {"lora_alpha": float("nan")}, "lora_alpha"),
        ("lora", {"lora_alpha": float("inf")}, "lora_alpha"),
        ("lora", {"lora_alpha": 1e300}, "lora_alpha"),
        ("lora", {"lora_alpha": 10**400}, "lora_alpha"),
        ("lora", {"lora_alpha": "9" * 100_000}, "lora_alpha"),
        ("lora", {"init_lora_weights": 1}, "init_lora_weights"),
        ("lora", {"init_lora_weights": "pissa"}, "init_lora_weights"),
        ("lora", {"rank_pattern": {"q_proj": 8}}, "q_proj.lora_A: has shape"),
        ("lora", {"rank_pattern": {".*": 1 << 16}}, "need [65536, 32]"),
        ("lora", {"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ("lora", {"rank_pattern": {"q_proj": "4"}}, "rank_pattern"),
        ("lora", {"rank_pattern": {"(": 4}}, "rank_pattern"),
        ("lora", {"rank_pattern": {"(?x)q_proj #": 4}}, "rank_pattern"),
        ("lora", {"rank_pattern": {"(" * 5000 + ")" * 5000: 4}}, "nested too deep"),
        ("lora", {"rank_pattern": {"(((((q{1000}){1000}){1000}){1000}){1000})": 4}}, "is too large"),
        ("lora", {"rank_pattern": {f"(?:{i}a?){{1000}}": 4 for i in range(1000)}}, "is too large"),
        ("lora", {"rank_pattern": {"(?:qproj){e}": 4}}, "holds '{e}'"),
        ("lora", {"rank_pattern": {"(?R)": 4}}, "not a regular expression"),
        ("lora", {"rank_pattern": {"a{99999999999}": 4}}, "rank_pattern"),
        ("patterns", {"rank_pattern": {}}, "has shape [2, 32]"),
        ("patterns", {"alpha_pattern": {"v_proj": float("nan")}}, "alpha_pattern"),
        ("patterns", {"alpha_pattern": {"v_proj": True}}, "alpha_pattern"),
        ("patterns", {"alpha_pattern": {"v_proj": 1e300}}, "alpha_pattern"),
        ("patterns", {"lora_alpha": 1e-300}, "lora_alpha"),
        ("patterns", {"lora_alpha": 1e-30, "alpha_pattern": {"v_proj": 1e30}}, "v_proj: has values beyond the range"),
        ("lora", {"target_modules": ["q_proj"]}, "does not target it"),
        ("lora", {"target_modules": ["q_proj", "v_proj", "o_proj"]}, "o_proj: is targeted"),
        ("lora", {"target_modules": []}, "non-empty"),
        ("lora", {"target_modules": ""}, "non-empty"),
        ("lora", {"target_modules": "["}, "not a regular expression"),
        ("lora", {"target_modules": r"(.+)+(q|v)_projx"}, ""),
        ("lora", {"target_modules": "(?:" + "a?" * 70_000 + ")"}, "is too large"),
        ("lora", {"target_modules": "all-linear"}, "is targeted"),
        ("lora", {"target_modules": [f"m{i}" for i in range(60_000)]}, "does not target it"),
        ("lora", {"exclude_modules": ["q_proj"]}, "does not target it"),
        ("lora", {"exclude_modules": ""}, "exclude_modules"),
        ("lora", {"layers_to_transform": [0]}, "does not target it"),
        ("lora", {"layers_to_transform": True}, "layers_to_transform"),
        ("lora", {"layers_to_transform": [-1]}, "layers_to_transform"),
        ("lora", {"layers_to_transform": [0, 1], "layers_pattern": ["(layers)|x"]}, "does not target it"),
        ("lora", {"layers_to_transform": [0, 1], "layers_pattern": ["(?P<idx>layers)"]}, "layers_pattern"),
        ("lora", {"layers_pattern": ["layers"]}, "layers_pattern: is set without"),
        ("lora", {"layers_to_transform": [0, 1], "target_modules": ".*[qv]_proj"}, "PEFT does not allow"),
        ("lora", {"bias": "all"}, "has no trained bias"),
        ("lora", {"bias": "lora_only"}, "has no trained bias"),
        ("bias", {"bias": "none"}, "is nothing that"),
        ("bias", {"bias": "lora_only"}, "k_proj"),
        ("lora", {"lora_bias": True}, "has no lora_B.bias"),
        ("lora_bias", {"lora_bias": False}, "lora_B.bias: is nothing"),
        ("lora", {"use_dora": True}, "has no lora_magnitude_vector"),
        ("dora", {"use_dora": False}, "lora_magnitude_vector: is nothing"),
        ("lora", {"use_dora": True, "lora_bias": True}, "PEFT does not allow"),
        ("lora", {"modules_to_save": ["lm_head"]}, "lm_head: is in modules_to_save"),
        ("lora", {"modules_to_save": "lm_head"}, "modules_to_save"),
        ("lora", {"modules_to_save": [""]}, "modules_to_save"),
        ("saved", {"modules_to_save": None}, "is nothing that"),
        ("saved", {"modules_to_save": ["lm_head"]}, "is nothing that"),
        ("lora", {"trainable_token_indices": [1]}, "trainable_token_indices"),
        ("tokens", {"trainable_token_indices": None}, "does not explain"),
        ("tokens", {"trainable_token_indices": {"embed_tokens": [9, 5]}}, "has shape [3, 32]"),
        ("tokens", {"trainable_token_indices": {"embed_tokens": [9, 5, 5]}}, "repeat"),
        ("tokens", {"trainable_token_indices": {"embed_tokens": [9, 5, 260]}}, "beyond this base's vocabulary"),
        ("tokens", {"trainable_token_indices": {"embed_tokens": [9, 5, 1 << 63]}}, "beyond this base's vocabulary"),
        ("tokens", {"trainable_token_indices": {"embed_tokens": [9, 5, -1]}}, "must be a list of token ids"),
        ("tokens", {"trainable_token_indices": {"embed_tokens": [9, 5, True]}}, "must be a list of token ids"),
        ("tokens", {"trainable_token_indices": {"embed_tokens": [9, 5, 30], "q_proj": [1]}}, "neither this base's"),
        ("lora", {"target_parameters": ["experts.gate_up_proj"]}, "it has no tensors"),
        ("lora", {"target_parameters": "experts.gate_up_proj"}, "target_parameters"),
        ("experts", {"target_parameters": []}, "targets no parameter"),
        ("experts", {"target_parameters": ["experts.down_proj"]}, ""),
        ("experts", {"r": 2}, "has shape"),
        ("activated", {"alora_invocation_tokens": [260]}, "no token of this base"),
        ("activated", {"alora_invocation_tokens": [1 << 70]}, "no token of this base"),
        ("activated", {"alora_invocation_tokens": [-1]}, "must be a list of token ids"),
        ("activated", {"bias": "all"}, "only A and B"),
        ("lora", {"peft_type": "IA3"}, "peft_type"),
        ("lora", {"peft_type": "lora"}, "peft_type"),
        ("lora", {"task_type": "TOKEN_CLS"}, "task_type"),
        ("lora", {"a_field_of_tomorrow": 1}, "a_field_of_tomorrow"),
        ("lora", {"R": 4}, "R: is not a LoRA field"),
        ("lora", {"\x1b[31mred\n": 1}, r"\x1b[31mred\n"),
        ("lora", {"k" * 100_000: 1}, "kkk"),
        ("lora", {"ключ": 1}, "ключ"),
        ("lora", {"../../r": 4}, "../../r"),
    ]
    for kind, fields, words in cases:
        yield Mutation(f"{kind} with {ascii(fields)[:70]}", kind, config(**fields), words)


def odd_files() -> Iterator[Mutation]:
    """Things that are no regular files, or not where they should be."""
    claim = json.dumps({"base_model.model.x": {"dtype": "F32", "shape": [1 << 29], "data_offsets": [0, 1 << 31]}})
    huge = len(claim).to_bytes(8, "little") + claim.encode()
    for name in (CONFIG, WEIGHTS):
        for what, make, words in (
            ("missing", lambda path: None, ""),
            ("a pipe", os.mkfifo, "not a regular file"),
            ("a folder", lambda path: path.mkdir(), ""),
            ("a socket", make_socket, ""),
            ("a link to a device", lambda path: path.symlink_to("/dev/zero"), "outside the allowed roots"),
            ("a link out of the root", lambda path: path.symlink_to("/etc/passwd"), "outside the allowed roots"),
            ("a link up and out", lambda path: path.symlink_to("../" * 40 + "etc/passwd"), "outside the allowed roots"),
            ("a link to itself", lambda path: path.symlink_to(path), ""),
            ("a link to nothing", lambda path: path.symlink_to(path.parent / "nothing"), ""),
            ("empty", lambda path: path.touch(), ""),
        ):
            yield Mutation(f"{name} is {what}", "lora", instead(name, make), words or name)
    yield Mutation("a pickle", "lora", instead(WEIGHTS, lambda p: p.with_suffix(".bin").touch()), "a pickle, which")
    yield Mutation("a huge config", "lora", sparse(CONFIG, b"{", 1 << 40), "")
    yield Mutation("huge weights", "lora", sparse(WEIGHTS, b"", 1 << 31), "JSON")
    yield Mutation("weights of a terabyte", "lora", sparse(WEIGHTS, huge, 1 << 40), "are allowed")
    yield Mutation("a huge tensor", "lora", sparse(WEIGHTS, huge, len(huge) + (1 << 31)), "larger than anything")
    for what, make_folder in {
        "a file": lambda path: path.touch(),
        "a pipe": os.mkfifo,
        "not there": lambda path: None,
        "a link to itself": lambda path: path.symlink_to(path),
        "a link out of the root": lambda path: path.symlink_to("/etc"),
        "a link to what holds it": lambda path: path.symlink_to(path.parent),
    }.items():
        spoil: Spoil = lambda folder, make=make_folder: replaced(folder, make)  # type: ignore[misc] # noqa: E731
        yield Mutation(f"a folder that is {what}", "lora", spoil, "")
