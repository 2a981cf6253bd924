"""Weft, transformers and PEFT on the same model, adapters and prompts, in one run.

    python benchmarks/side_by_side.py              # prints the table and writes docs/performance.md
    python benchmarks/side_by_side.py --shape tiny # a quick try of the script itself

16 requests of 64 + 64 tokens, greedy, EOS ignored; tokens a second from the first submission to the last token. The
systems take turns, so that a slow moment of the machine hits all of them; the table shows median and range. Weft runs
as a server of its own and is asked over gRPC.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import grpc
import torch
import transformers
from loaded import weft_server
from peft import PeftModel
from report import machine, write_section
from rich.progress import Progress
from shapes import make_adapters, make_base
from transformers import LlamaForCausalLM

import weft
from weft.v1 import inference_pb2, inference_pb2_grpc

ROOT = Path(weft.__file__).parents[2]
NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 16, 64, 64
Tokens = list[list[int]]


@dataclass
class System:
    """Something that answers all prompts; `run` returns the new tokens of each."""

    name: str
    run: Callable[[], Tokens]
    seconds: list[float] = field(default_factory=list)
    tokens: Tokens = field(default_factory=list)

    def measure(self) -> None:
        started = time.perf_counter()
        self.tokens = self.run()
        self.seconds.append(time.perf_counter() - started)

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each round, lowest first."""
        return sorted(NUM_REQUESTS * NEW_TOKENS / seconds for seconds in self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def make_prompts(vocab_size: int) -> Tokens:
    rng = random.Random(1)
    return [[rng.randrange(1, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_REQUESTS)]


def generate(model: LlamaForCausalLM | PeftModel, prompts: Tokens, **kwargs: object) -> Tokens:
    """Greedy continuation by transformers."""
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **kwargs,
        )
    return [row[PROMPT_TOKENS:] for row in out.tolist()]


def merge_one_at_a_time(model: PeftModel, names: list[str], prompts: Tokens) -> Tokens:
    """What serving without batching costs: merge each adapter into the base, generate, take it out again."""
    made = []
    for name, prompt in zip(names, prompts, strict=True):
        model.set_adapter(name)
        model.merge_adapter([name])
        made += generate(model, [prompt])
        model.unmerge_adapter()
    return made


def ask_weft(address: str, prompts: Tokens, names: list[str]) -> Tokens:
    """All prompts at once, each a streaming request with its own adapter ("" is the base)."""

    async def one(stub: inference_pb2_grpc.InferenceServiceStub, prompt: list[int], name: str) -> list[int]:
        request = inference_pb2.StreamGenerateRequest(
            adapter_id=name,
            token_ids=inference_pb2.TokenIds(ids=prompt),
            stopping=inference_pb2.Stopping(max_tokens=NEW_TOKENS, ignore_eos=True),
        )
        return [token.id async for message in stub.StreamGenerate(request) for token in message.tokens]

    async def everything() -> Tokens:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            return await asyncio.gather(*(one(stub, *pair) for pair in zip(prompts, names, strict=True)))

    return asyncio.run(everything())


def load_peft(base: LlamaForCausalLM, paths: dict[str, Path]) -> PeftModel:
    """All adapters on one base, as PEFT's mixed batches want them."""
    first, *others = paths
    model = PeftModel.from_pretrained(base, paths[first], adapter_name=first)
    for name in others:
        model.load_adapter(paths[name], adapter_name=name)
    return model.eval()


def read_bandwidth() -> float:
    """Bytes a second of a large read: the sum of 1 GiB, best of five."""
    data = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - started)
    return data.nbytes / min(times)


def floor_ratio(base: LlamaForCausalLM, paths: dict[str, Path]) -> float:
    """Decode speed with all adapters over that with none, if both were bound by the bytes that a step reads.

    It reads the base's weights once and each distinct adapter's once.
    """
    base_bytes = sum(parameter.nbytes for parameter in base.parameters())
    lora_bytes = sum((path / "adapter_model.safetensors").stat().st_size for path in paths.values())
    return base_bytes / (base_bytes + lora_bytes)


def table(systems: list[System], ceiling: System) -> str:
    lines = ["| system | tokens/s, median (range) | over Weft's base |", "|---|---|---|"]
    for system in systems:
        low, high = system.rates[0], system.rates[-1]
        ratio = system.median / ceiling.median
        lines.append(f"| {system.name} | {system.median:.1f} ({low:.1f} to {high:.1f}) | {ratio:.2f} |")
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--shape", default="135m", show_default=True)
@click.option("--rounds", default=3, show_default=True, help="How often each system takes its turn.")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md", show_default=False)
def main(shape: str, rounds: int, output: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        folder = Path(scratch)
        work = progress.add_task("making the model and 16 adapters", total=None)
        base = make_base(shape, folder / "base")
        paths = make_adapters(base, folder / "adapters", NUM_REQUESTS)
        prompts = make_prompts(base.config.vocab_size)
        ratio, bandwidth = floor_ratio(base, paths), read_bandwidth()
        plain = make_base(shape, folder / "base")
        adapted = load_peft(base, paths)
        names = list(paths)
        progress.update(work, description="starting weft serve")
        options = ("--adapters", folder / "adapters", "--max-batch-tokens", 1024)
        with weft_server(folder / "base", *options) as address:
            weft_base = System("Weft, base only", lambda: ask_weft(address, prompts, [""] * NUM_REQUESTS))
            weft_mixed = {
                count: System(
                    f"Weft, {count} adapter{'s' * (count > 1)} in the batch",
                    lambda count=count: ask_weft(address, prompts, [names[i % count] for i in range(NUM_REQUESTS)]),
                )
                for count in (1, 4, 16)
            }
            mixed_peft = System(
                "PEFT, 16 adapters in the batch", lambda: generate(adapted, prompts, adapter_names=names)
            )
            systems = [
                System("transformers `generate`, base only", lambda: generate(plain, prompts)),
                weft_base,
                *weft_mixed.values(),
                mixed_peft,
                System("PEFT, merge one, generate, unmerge", lambda: merge_one_at_a_time(adapted, names, prompts)),
            ]
            progress.update(work, total=rounds * len(systems))
            for _ in range(rounds):
                for system in systems:
                    progress.update(work, description=system.name)
                    system.measure()
                    progress.advance(work)
    agree = sum(a == b for a, b in zip(weft_mixed[16].tokens, mixed_peft.tokens, strict=True))
    report = (
        f"{table(systems, weft_base)}\n\n"
        f"{agree} of {NUM_REQUESTS} rows of the 16-adapter batch have the same {NEW_TOKENS} tokens in Weft and PEFT. "
        f"Were decoding bound by reading weights alone (at {bandwidth / 1e9:.1f} GB/s, measured in this run), "
        f"16 distinct adapters would run at {ratio:.2f} of the base; "
        "a base step that takes longer than its bytes can pass that.\n\n"
        f"Machine: {machine()}; {rounds} rounds.\n"
    )
    click.echo(report)
    if shape == "135m":
        write_section(output, "side_by_side", report)


if __name__ == "__main__":
    main()
