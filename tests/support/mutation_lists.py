"""Every mutation, by the part of the folder that it spoils."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mutations import (
    CONFIG,
    WEIGHTS,
    Mutation,
    Spoil,
    Tensors,
    config,
    content,
    cut,
    entry,
    header,
    header_length,
    instead,
    key_of,
    last,
    make_socket,
    raw_header,
    replaced,
    sparse,
    tensor,
    tensors,
)
from peft import LoraConfig

A, B, V = "layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.q_proj.lora_B", "layers.1.self_attn.v_proj"

PARTS: Mapping[str, tuple[str, str]] = {
    "A": ("lora", A),
    "B": ("lora", B),
    "A of a pattern's rank": ("patterns", A),
    "magnitude": ("dora", "lora_magnitude_vector"),
    "bias of a LoRA module": ("bias", "q_proj.base_layer.bias"),
    "bias of another module": ("bias", "k_proj.bias"),
    "lora_bias": ("lora_bias", "lora_B.bias"),
    "saved head": ("saved", "lm_head.weight"),
    "saved norm": ("saved", "model.norm.weight"),
    "token rows": ("tokens", "trainable_tokens_delta"),
    "embedding A": ("embedding", "lora_embedding_A"),
    "embedding B": ("embedding", "lora_embedding_B"),
    "head A": ("embedding", "lm_head.lora_A"),
    "copy of the embedding": ("embedding", "embed_tokens.base_layer.weight"),
    "gate_up experts A": ("experts", "experts.base_layer.lora_A"),
    "gate_up experts B": ("experts", "experts.base_layer.lora_B"),
    "down experts A": ("experts", "experts.lora_A"),
    "down experts B": ("experts", "experts.lora_B"),
}
"""Every kind of tensor: which adapter has one, and what its name holds."""


def truncated() -> Iterator[Mutation]:
    for kind in ("lora", "experts"):
        for by in (0, 1, 7, 8, 9, 64):
            yield Mutation(f"weights cut to {by} bytes", kind, cut(WEIGHTS, 0, by), WEIGHTS)
        for share in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95):
            yield Mutation(f"weights cut to {share:.0%}", kind, cut(WEIGHTS, share), WEIGHTS)
        yield Mutation("weights without the last byte", kind, cut(WEIGHTS, 1, -1), "outside the")
    for by in (0, 1, 2, 3, 40):
        yield Mutation(f"config cut to {by} bytes", "lora", cut(CONFIG, 0, by), CONFIG)
    for share in (0.2, 0.5, 0.9):
        yield Mutation(f"config cut to {share:.0%}", "lora", cut(CONFIG, share), CONFIG)
    yield Mutation("config without its last brace", "lora", cut(CONFIG, 1, -1), CONFIG)


def of_every_tensor() -> Iterator[Mutation]:
    """What can be wrong with any tensor, done to one of each kind."""
    changes: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
        "NaN": (last(float("nan")), ""),
        "Inf": (last(float("inf")), ""),
        "int8": (lambda t: t.to(torch.int8), "int8"),
        "fp8": (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        "complex": (lambda t: t.to(torch.complex64), "complex64"),
        "one row short": (lambda t: t[:-1], ""),
        "a row more": (lambda t: torch.cat([t, t[:1]]), ""),
        "no dimensions": (lambda t: t.sum(), ""),
        "a dimension more": (lambda t: t[None], ""),
    }
    for what, (kind, part) in PARTS.items():
        for how, (change, words) in changes.items():
            yield Mutation(f"{what}, {how}", kind, tensor(part, change), words or part.split(".")[-1])
        if not what.startswith("copy"):
            yield Mutation(f"{what}, missing", kind, tensors(lambda t, part=part: t.pop(key_of(t, part))), "")  # type: ignore[misc]


def of_all_tensors() -> Iterator[Mutation]:
    def swap(held: Tensors) -> None:
        a, b = key_of(held, A), key_of(held, B)
        held[a], held[b] = held[b], held[a]

    def renamed(old: str, new: str) -> Spoil:
        return tensors(lambda held: held.update({(key := key_of(held, old)).replace(old, new): held.pop(key)}))

    def added(name: str, rows: int = 2) -> Spoil:
        return tensors(lambda held: held.update({name: torch.ones(rows, 2)}))

    top = "base_model.model."
    q = f"{top}model.layers.0.self_attn.q_proj"
    yield Mutation("A and B swapped", "lora", tensors(swap), "q_proj.lora_A: has shape")
    yield Mutation("no A", "lora", tensors(lambda t: [t.pop(k) for k in list(t) if "lora_A" in k]), "has no lora_A")
    yield Mutation("no B", "lora", tensors(lambda t: [t.pop(k) for k in list(t) if "lora_B" in k]), "has no lora_B")
    yield Mutation("no tensors", "lora", tensors(lambda t: t.clear()), "holds no tensors for it")
    yield Mutation("zero A", "lora", tensors(lambda t: [x.zero_() for k, x in t.items() if "lora_A" in k]), "nothing")
    yield Mutation("zero B", "lora", tensors(lambda t: [x.zero_() for k, x in t.items() if "lora_B" in k]), "nothing")
    yield Mutation(
        "beyond float32", "lora", tensors(lambda t: t.update({k: x.double() * 1e300 for k, x in t.items()})), "range of"
    )
    yield Mutation("overflowing product", "lora", tensors(lambda t: [x.mul_(1e38) for x in t.values()]), "away from")
    yield Mutation("other base's embedding", "embedding", tensor("tokens.base_layer", lambda t: t + 1), "differs from")
    yield Mutation("another magnitude's name", "dora", renamed("lora_magnitude_vector", "lora_magnitude"), "nothing")
    for name, words in {
        "": "printable",
        "..": "does not begin with",
        "../../etc/passwd": "does not begin with",
        "/etc/passwd": "does not begin with",
        f"{top}../../etc/passwd": "is nothing that",
        f"{top}weight": "is nothing that",
        f"{top}.weight": "is nothing that",
        f"{q}.lora_A.weight\n": "printable",
        f"{q}.lora_A\x00.weight": "printable",
        f"{q}.lora_A.weight\x1b[31m": "printable",
        "\u202eevil": "printable",
        f"{q}.lоra_A.weight": "is nothing that",  # noqa: RUF001 - a Cyrillic letter
        f"{top}模型.layers.0.q_proj.lora_A.weight": "not a module of this base",
        f"{q}.🧵.weight": "is nothing that",
        f"{q}.lora_A.default.weight": "is nothing that",
        f"{q}.lora_A.bias": "is nothing that",
        f"{q}.lora_embedding_A": "is nothing that",
        f"{q}.lora_magnitude_vector": "is nothing that",
        f"{q}.base_layer.lora_A.weight": "not a module of this base",
        f"{q}{'.base_layer' * 40}.lora_A.weight": "not a module of this base",
        f"{q}.base_layer.weight": "is nothing that",
        f"{q}.bias": "is nothing that",
        f"{top}model.layers.7.self_attn.q_proj.lora_A.weight": "not a module of this base",
        f"{top}model.layers.-1.self_attn.q_proj.lora_A.weight": "not a module of this base",
        f"{top}model.layers.0.self_attn.k_proj.lora_A.weight": "does not target it",
        f"{top}model.layers.0.mlp.experts.99.up_proj.lora_A.weight": "does not target it",
        f"{top}model.embed_tokens.token_adapter.trainable_tokens_delta": "does not explain",
        f"{top}lm_head.modules_to_save.weight": "is nothing that",
        "x" * 10_000: "characters long at most",
        f"{q}{'.base_layer' * 100_000}.lora_A.weight": "characters long at most",
    }.items():
        yield Mutation(f"a tensor named {ascii(name)[:60]}", "lora", added(name), words)
    yield Mutation(
        "2,000 tensors more",
        "lora",
        tensors(lambda t: t.update({f"t{i}": torch.ones(1) for i in range(2000)})),
        "does not begin with",
    )


def lying_header() -> Iterator[Mutation]:
    shape, dtype, offsets = "in the header", "has the type", "outside the"
    cases: dict[str, tuple[Spoil, str]] = {
        "negative shape": (entry(A, shape=[-4, -32]), shape),
        "2^60 shape": (entry(A, shape=[1 << 60, 1]), "larger than anything"),
        "2^60 by 2^60 shape": (entry(A, shape=[1 << 60, 1 << 60]), "larger than anything"),
        "2^63 by 0 shape": (entry(A, shape=[1 << 63, 0]), shape),
        "fractional shape": (entry(A, shape=[4.0, 32.0]), shape),
        "shape of booleans": (entry(A, shape=[True, 128]), shape),
        "shape of text": (entry(A, shape="4x32"), shape),
        "no shape": (entry(A, shape=None), shape),
        "nested shape": (entry(A, shape=[[4, 32]]), shape),
        "too small a shape": (entry(A, shape=[4, 31]), shape),
        "1,000 dimensions": (entry(A, shape=[1] * 1000), shape),
        "offsets to 2^60": (entry(A, data_offsets=[0, 1 << 60]), offsets),
        "offsets to 2^63": (entry(A, data_offsets=[0, 1 << 63]), offsets),
        "offsets from 2^63": (entry(A, data_offsets=[1 << 63, (1 << 63) + 512]), offsets),
        "negative offsets": (entry(A, data_offsets=[-512, 0]), offsets),
        "offsets that run back": (entry(A, data_offsets=[512, 0]), offsets),
        "one offset": (entry(A, data_offsets=[0]), offsets),
        "no offsets": (entry(A, data_offsets=None), offsets),
        "fractional offsets": (entry(A, data_offsets=[0.0, 512.0]), offsets),
        "offsets of text": (entry(A, data_offsets=["0", "512"]), offsets),
        "an entry that is a list": (header(lambda h: h.update({key_of(h, A): []})), offsets),
        "an entry that is null": (header(lambda h: h.update({key_of(h, A): None})), offsets),
        "an entry that is text": (header(lambda h: h.update({key_of(h, A): "F32"})), offsets),
        "bytes of no tensor at the end": (content(WEIGHTS, lambda data: data + bytes(64)), "belong to no tensor"),
        "a tensor without bytes of its own": (header(lambda h: h.update({"x": dict(h[key_of(h, A)])})), "is next"),
        "a hole": (header(lambda h: h.pop(key_of(h, A))), ""),
        "header of 0 bytes": (header_length(lambda n: 0), "JSON"),
        "header of 2^60 bytes": (header_length(lambda n: 1 << 60), "claims a header"),
        "header of 2^63 bytes": (header_length(lambda n: 1 << 63), "claims a header"),
        "header of 2^64 - 1 bytes": (header_length(lambda n: (1 << 64) - 1), "claims a header"),
        "a shorter header": (header_length(lambda n: n - 8), WEIGHTS),
        "a longer header": (header_length(lambda n: n + 8), WEIGHTS),
        "a huge header": (sparse(WEIGHTS, (17 << 20).to_bytes(8, "little"), 1 << 40), "claims a header"),
        "an empty header": (raw_header(lambda raw: b"{}"), "belong to no tensor"),
        "a list": (raw_header(lambda raw: b"[" + raw + b"]"), "not a JSON object"),
        "no JSON": (raw_header(lambda raw: raw[:-1]), "JSON"),
        "two JSON objects": (raw_header(lambda raw: raw + raw), "JSON"),
        "not UTF-8": (raw_header(lambda raw: raw.replace(b"lora_A", b"lor\xff_A")), "UTF-8"),
        "half a surrogate": (raw_header(lambda raw: raw.replace(b"lora_A", b"\\ud800_A")), "printable"),
        "a very deep header": (raw_header(lambda raw: b'{"a":' * 50_000 + raw), "nested too deep"),
        "a number of 5,000 digits": (raw_header(lambda raw: raw.replace(b"[0,", b"[" + b"9" * 5000 + b",")), "digits"),
        "NaN for an offset": (raw_header(lambda raw: raw.replace(b"[0,", b"[NaN,")), "NaN"),
        "a tensor twice": (raw_header(lambda raw: raw[:-1] + b"," + raw[1:]), "twice"),
        "dtype twice": (raw_header(lambda raw: raw.replace(b'"dtype"', b'"dtype": "F16", "dtype"', 1)), "twice"),
        "moved to one place": (header(lambda h: h[key_of(h, A)].update(data_offsets=[512, 1024])), "is next"),
    }
    for value in ("STR", "f32", "", "F4", "F6_E2M3", "F8_E8M0", "F128", "🧵", "F32\n", 32, None, ["F32"], {"F32": 1}):
        cases[f"dtype {value!a}"] = (entry(A, dtype=value), dtype)
    for value in ("F16", "BF16", "F64", "BOOL", "C64"):
        cases[f"dtype {value} on bytes of another"] = (entry(A, dtype=value), "is " + value)
    for name, (spoil, words) in cases.items():
        yield Mutation(f"header, {name}", "lora", spoil, words)


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
        ("lora", {"task_type": "SEQ_CLS"}, "task_type"),
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
    claim = json.dumps({"base_model.model.x": {"dtype": "F32", "shape": [1 << 37], "data_offsets": [0, 1 << 39]}})
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
    yield Mutation("huge weights", "lora", sparse(WEIGHTS, b"", 1 << 40), "JSON")
    yield Mutation("a huge tensor", "lora", sparse(WEIGHTS, huge, len(huge) + (1 << 39)), "larger than anything")
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


ALL = [
    mutation
    for part in (
        truncated,
        of_every_tensor,
        of_all_tensors,
        lying_header,
        no_config,
        wrong_fields,
        wrong_values,
        odd_files,
    )
    for mutation in part()
]
