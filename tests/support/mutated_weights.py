"""Mutations of the tensors, their header, and the bytes of the files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from mutations import (
    CONFIG,
    WEIGHTS,
    Mutation,
    Spoil,
    Tensors,
    content,
    cut,
    entry,
    header,
    header_length,
    key_of,
    last,
    raw_header,
    sparse,
    tensor,
    tensors,
)

A, B = "layers.0.self_attn.q_proj.lora_A", "layers.0.self_attn.q_proj.lora_B"

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
    "an expert's A": ("single-experts", "layers.1.mlp.experts.3.up_proj.lora_A"),
    "an expert's B": ("single-experts", "layers.0.mlp.experts.0.down_proj.lora_B"),
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
            if kind == "single-experts":
                words = "rows for"  # noqa: PLW2901
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
    expert = f"{top}model.layers.0.mlp.experts."

    def without(part: str) -> Spoil:
        return tensors(lambda held: [held.pop(key) for key in list(held) if part in key])

    yield Mutation("no first layer", "single-experts", without("layers.0."), "has no rows for its experts")
    yield Mutation("no last expert", "single-experts", without("experts.3."), "of each of 4 experts")
    yield Mutation("no gates", "single-experts", without("gate_proj"), "one of gate and up projection")
    yield Mutation("expert 3 as 9", "single-experts", renamed("experts.3.up_proj", "experts.9.up_proj"), "more experts")
    yield Mutation(
        "expert 4 besides",
        "single-experts",
        added(f"{expert}4.up_proj.lora_A.weight"),
        "more experts",
    )
    yield Mutation(
        "expert 03 besides",
        "single-experts",
        added(f"{expert}03.up_proj.lora_A.weight"),
        "another name",
    )
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
        "a huge header": (sparse(WEIGHTS, (17 << 20).to_bytes(8, "little"), 1 << 31), "claims a header"),
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
