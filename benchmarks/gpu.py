"""A GPU in one command: every kernel checked against its specification, then decode steps with and without adapters.

    python benchmarks/gpu.py                            # an H100 or better with 80 GB, about eight minutes
    python benchmarks/gpu.py --device cpu --shape tiny  # that the script runs; with TRITON_INTERPRET=1

Weights are random and made on the device. Each figure is over the floor: what the bytes of weights, KV cache and
adapters take at the bandwidth of a large copy, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import torch
import transformers
import triton
from gpu_checks import check_all
from gpu_engine import compare_ahead, compare_compiled
from gpu_kernels import Timer, compare_attention, compare_kernels, copy_bandwidth
from transformers import AutoModelForCausalLM, LlamaConfig

from weft.adapters.pages import PageConfig, PagePool
from weft.kernels.plan import PAGE_ROWS, PagedAdapter, build_plan
from weft.kernels.triton_lora import DeviceWork
from weft.server.engine.attention import ATTENTION
from weft.server.engine.batch import Batch, build_batch
from weft.server.engine.decode_attention import attend_in_place
from weft.server.engine.graphs import CudaCapture, GraphRunner, Means, replay_nothing
from weft.server.engine.kv_cache import KvCache
from weft.server.engine.model import PagedModel
from weft.server.engine.request import Request
from weft.server.engine.scheduler import Scheduled
from weft.server.engine.sequence import Sequence as EngineSequence
from weft.server.engine.text import OutputText

ROOT = Path(__file__).parents[1]
_CPU = torch.device("cpu")
_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to measure with, and what to measure; context: tokens a row sees in the table, and of prompts.

    decoded: tokens of answers, where an engine is measured.
    """

    config: dict[str, int]
    dtype: torch.dtype
    batches: tuple[int, ...]
    ranks: tuple[int, ...]
    context: int
    decoded: int


SHAPES = {
    "llama-3-8b": Shape(
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        torch.bfloat16,
        (1, 8, 32, 64, 128),
        (16, 64),
        128,
        64,
    ),
    "tiny": Shape(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 64,
        },
        torch.float32,
        (2,),
        (12,),
        8,
        3,
    ),
}
POPULARITIES = ("identical", "distinct", "uniform", "skewed")


def popularity(kind: str, batch: int) -> list[int]:
    """Which adapter each row uses: Punica's four (https://arxiv.org/abs/2310.18547, section 7)."""
    if kind == "identical":
        return [0] * batch
    if kind == "distinct":
        return list(range(batch))
    if kind == "uniform":
        return [row % math.ceil(math.sqrt(batch)) for row in range(batch)]
    rows: list[int] = []
    while len(rows) < batch:  # each adapter has 1.5 times the rows of the next one
        rest = batch - len(rows)
        rows += [max(rows, default=-1) + 1] * max(1, rest - int(rest / 1.5))
    return rows[:batch]


class Bench:
    """A model, its cache and its adapters, all random, and its captured decode steps."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.max_positions = 8192
        config = LlamaConfig(**shape.config, max_position_embeddings=self.max_positions, tie_word_embeddings=False)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype, attn_implementation=ATTENTION)
        model.requires_grad_(False)
        self.model = PagedModel(model.eval().to(device), device)
        self.weight_bytes = sum(
            parameter.nbytes for name, parameter in model.named_parameters() if "embed_tokens" not in name
        )
        most = max(shape.batches)
        self.blocks_a_row = -(-(shape.context + shape.decoded) // _BLOCK_TOKENS)
        self.num_blocks = 1 + most * self.blocks_a_row
        self.cache = KvCache(self.model.kv_shapes, self.num_blocks, _BLOCK_TOKENS, shape.dtype, device)
        num_pages = 1 + most * (-(-max(shape.ranks) // PAGE_ROWS))
        self.pages = PagePool(self.model.base, PageConfig(num_pages, shape.dtype, device))
        for group in self.pages.groups.values():
            group.a[:, 1:].normal_(0, 0.02)
            for site in group.sites:
                site.b[1:].normal_(0, 0.02)
        self.model.attach(self.cache, self.pages.groups, "triton")
        capture = CudaCapture(device) if device.type == "cuda" else replay_nothing
        self._adapters: dict[tuple[int, int], PagedAdapter] = {}
        self.means = Means(capture, attend_in_place, DeviceWork)
        self.graphs = self.capture()

    def capture(self) -> GraphRunner:
        """Steps as the model runs them now, each size when it first comes."""
        return self.model.capture(self.means, max(self.shape.batches), self.blocks_a_row)

    def adapter(self, index: int, rank: int) -> PagedAdapter:
        """The same one each time: rows share their work where they share an adapter."""
        if (index, rank) not in self._adapters:
            pages = -(-rank // PAGE_ROWS)
            sites = frozenset(site.index for site in self.pages.sites.values())
            runs = ((1 + index * pages, 1 + (index + 1) * pages),)
            self._adapters[index, rank] = PagedAdapter(runs, 2.0, sites)
        return self._adapters[index, rank]

    def batch(self, rows: int) -> Batch:
        """A decode step of base rows, each the last token of its own context."""
        picked = []
        for row in range(rows):
            rng = Random(row)
            prompt = tuple(rng.randrange(self.shape.config["vocab_size"]) for _ in range(self.shape.context))
            sequence = EngineSequence(Request(f"r{row}", prompt), (), OutputText(lambda ids: ""), rng, 0.0)
            sequence.num_computed = len(prompt) - 1
            first = 1 + row * self.blocks_a_row
            sequence.blocks = list(range(first, first + self.blocks_a_row))
            picked.append(Scheduled(sequence, 1))
        return build_batch(picked, _BLOCK_TOKENS, _CPU)

    def with_adapters(self, batch: Batch, kind: str, rank: int) -> tuple[Batch, int]:
        """The same step with adapters, and how many distinct ones."""
        chosen = popularity(kind, batch.num_tokens)
        plan = build_plan([(1, [(self.adapter(index, rank), 1.0)]) for index in chosen], _CPU)
        return replace(batch, plan=plan), len(set(chosen))

    def step(self, batch: Batch) -> list[int]:
        """A whole step, to the tokens on the host."""
        tokens: list[int] = self.model.forward(batch).logits.argmax(-1).tolist()
        return tokens

    def kv_bytes(self, rows: int) -> int:
        return rows * self.shape.context * self.model.token_bytes

    def adapter_bytes(self, rank: int) -> int:
        """Of all its real rows."""
        return rank * self.pages.page_bytes // PAGE_ROWS


@torch.inference_mode()
def measure_steps(bench: Bench, timer: Timer, bandwidth: float, deadline_s: float) -> Iterator[dict[str, object]]:
    """The table of decode steps; each row's base is measured beside it."""
    for rows in bench.shape.batches:
        plain = bench.batch(rows)
        for rank in bench.shape.ranks:
            for kind in POPULARITIES[: 1 if rows == 1 else None]:
                if time.monotonic() > deadline_s:
                    return
                mixed, distinct = bench.with_adapters(plain, kind, rank)
                base_ms, mixed_ms = timer.compare(partial(bench.graphs.run, plain), partial(bench.graphs.run, mixed))
                step_ms = timer.wall(partial(bench.step, mixed))
                first, second = (bench.model.forward(mixed).logits.clone() for _ in range(2))
                base_bytes = bench.weight_bytes + bench.kv_bytes(rows)
                lora_bytes = distinct * bench.adapter_bytes(rank)
                floor = 1 + lora_bytes / base_bytes
                yield {
                    "rows": rows,
                    "rank": rank,
                    "popularity": kind,
                    "distinct": distinct,
                    "base_ms": base_ms,
                    "mixed_ms": mixed_ms,
                    "step_with_host_ms": step_ms,
                    "base_floor_ms": base_bytes / bandwidth * 1000,
                    "lora_floor_ms": lora_bytes / bandwidth * 1000,
                    "ratio": mixed_ms / base_ms,
                    "floor_ratio": floor,
                    "over_floor": mixed_ms / base_ms / floor,
                    "repeats": bool(torch.equal(first, second)),
                }


@torch.inference_mode()
def check_graphs(bench: Bench) -> dict[str, object]:
    """The captured step against the same one run as it comes: its largest relative error, and tokens that agree."""
    rows = bench.shape.batches[-1]
    batch, _ = bench.with_adapters(bench.batch(rows), "skewed", bench.shape.ranks[0])
    captured = bench.model.forward(batch).logits.float().clone()
    fresh = replace(batch, wants_all=False)
    eager = bench.model.forward(fresh).logits.float()
    agree = int((captured.argmax(-1) == eager.argmax(-1)).sum())
    return {
        "rows": rows,
        "tokens_that_agree": agree,
        "largest_relative_error": float(((captured - eager).norm(dim=-1) / eager.norm(dim=-1)).max()),
    }


def machine(device: torch.device) -> str:
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else "a CPU, Triton interpreted: no timing means anything"
    )
    return (
        f"{name}, torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}, "
        f"Python {sys.version.split()[0]}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def describe(result: dict[str, object]) -> str:
    """The section of docs/performance.md."""
    checks: list[dict[str, object]] = result["checks"]  # type: ignore[assignment]
    steps: list[dict[str, float]] = result["steps"]  # type: ignore[assignment]
    kernels: list[dict[str, float]] = result["kernels"]  # type: ignore[assignment]
    attention: list[dict[str, float]] = result["attention"]  # type: ignore[assignment]
    ahead: list[dict[str, float]] = result["ahead"]  # type: ignore[assignment]
    compiled: list[dict[str, float]] = result["compiled"]  # type: ignore[assignment]
    graphs: dict[str, object] = result["graphs"]  # type: ignore[assignment]
    right = sum(bool(check["right"]) for check in checks)
    parts = [
        f"`python benchmarks/gpu.py`, on {result['machine']}. A large copy moves {result['copy_tb_s']:.2f} TB/s.\n",
        f"{right} of {len(checks)} checks of kernels against their specification hold, bit for bit on repeat.",
        f"Captured and eager steps agree on {graphs['tokens_that_agree']} of {graphs['rows']} tokens.\n",
        f"Decode steps, context {result['context']}, median of {result['repeats']}; the floor is bytes.\n",
        table(
            ("rows", "rank", "adapters", "base, ms", "mixed, ms", "ratio", "floor", "over floor", "with host, ms"),
            [
                (
                    str(row["rows"]),
                    str(row["rank"]),
                    f"{row['popularity']}, {row['distinct']}",
                    *(f"{row[key]:.3f}" for key in ("base_ms", "mixed_ms", "ratio", "floor_ratio", "over_floor")),
                    f"{row['step_with_host_ms']:.3f}",
                )
                for row in steps
            ],
        ),
        "Steps of an engine, distinct adapters, from step to step with the host's work, in ms.\n",
        table(
            ("rows", "launched in turn", "launched ahead", "same tokens"),
            [
                (str(row["rows"]), f"{row['in_turn_ms']:.3f}", f"{row['ahead_ms']:.3f}", str(bool(row["same_tokens"])))
                for row in ahead
            ],
        ),
        f"Decode steps without and with `--compile`, which took {compiled[0]['compiling_s']:.1f} s; in ms.\n",
        table(
            ("rows", "base", "base, compiled", "mixed", "mixed, compiled", "largest relative error"),
            [
                (
                    str(row["rows"]),
                    *(f"{row[key]:.3f}" for key in ("base_ms", "compiled_base_ms", "mixed_ms", "compiled_mixed_ms")),
                    f"{row['largest_relative_error']:.1e}",
                )
                for row in compiled
            ],
        ),
        "The adapters' part alone, all layers, distinct adapters, in ms; of the copy's bandwidth.\n",
        table(
            ("rows", "rank", "Weft", "of the bandwidth", "gather + bmm", "grouped_mm"),
            [
                (
                    str(row["rows"]),
                    str(row["rank"]),
                    f"{row['weft_ms']:.3f}",
                    f"{row['of_bandwidth']:.0%}",
                    *("-" if row[key] is None else f"{row[key]:.3f}" for key in ("gather_bmm_ms", "grouped_mm_ms")),
                )
                for row in kernels
            ],
        ),
        "Attention of one layer's decode rows, in ms; of the copy's bandwidth.\n",
        table(
            ("rows", "context", "in place", "of the bandwidth", "gathered", "varlen_attn"),
            [
                (
                    str(row["rows"]),
                    str(row["context"]),
                    f"{row['in_place_ms']:.3f}",
                    f"{row['of_bandwidth']:.0%}",
                    *("-" if row[key] is None else f"{row[key]:.3f}" for key in ("gathered_ms", "varlen_ms")),
                )
                for row in attention
            ],
        ),
    ]
    return "\n".join(parts)


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU here: --device cpu --shape tiny with TRITON_INTERPRET=1 shows that it runs")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("on a CPU, Triton's kernels are interpreted: set TRITON_INTERPRET=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--minutes", type=float, default=8.0, help="no new row of the table is begun after them")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    parser.add_argument("--report", type=Path, help="the document whose section `gpu` to replace")
    options = parser.parse_args()
    check_device(parser, options.device)
    device, shape = torch.device(options.device), SHAPES[options.shape]
    deadline_s = time.monotonic() + options.minutes * 60
    timer = Timer(device)
    result: dict[str, object] = {"machine": machine(device), "context": shape.context, "repeats": timer.repeats}
    print(result["machine"], flush=True)

    def keep(key: str, value: object) -> None:
        """Write down what there is so far: a run that is cut off keeps it."""
        result[key] = value
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")

    def keep_rows(key: str, rows: Iterable[dict[str, object]]) -> None:
        kept: list[dict[str, object]] = []
        keep(key, kept)
        for row in rows:
            kept.append(row)
            keep(key, kept)
            shown = {name: round(value, 3) if isinstance(value, float) else value for name, value in row.items()}
            print(key, shown, flush=True)

    checks = check_all(device, thorough=device.type == "cuda")
    keep("checks", checks)
    wrong = [check for check in checks if not check["right"]]
    print(f"{len(checks) - len(wrong)} of {len(checks)} checks hold", *wrong, sep="\n", flush=True)
    bandwidth = copy_bandwidth(timer)
    keep("copy_tb_s", bandwidth / 1e12)
    print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    bench = Bench(shape, device)
    keep("graphs", check_graphs(bench))
    print("captured against eager:", result["graphs"], flush=True)
    keep_rows("kernels", compare_kernels(bench, timer, bandwidth))
    keep_rows("attention", compare_attention(bench, timer, bandwidth))
    keep_rows("ahead", compare_ahead(bench))
    keep_rows("steps", measure_steps(bench, timer, bandwidth, deadline_s))
    keep_rows("compiled", compare_compiled(bench, timer))
    if options.report is not None:
        from report import write_section  # noqa: PLC0415 - brings what a GPU machine may lack

        write_section(options.report, "gpu", describe(result))
    else:
        print(describe(result))
    if wrong:
        sys.exit("a kernel is wrong")


if __name__ == "__main__":
    main()
