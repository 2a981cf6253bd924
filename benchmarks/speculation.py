"""What guessing ahead gives and costs, by the text, the number of requests and the adapters.

    python benchmarks/speculation.py          # prints the table and writes docs/performance.md
    python benchmarks/speculation.py --quick  # less of everything; prints the table only

The model has the SmolLM-135M shape and computes all of it, but its weights are set so that it recites: what follows a
token is always the same one. So a text can be made to repeat itself, or never to, at the full cost of a step. Texts:
"repeats": 24 tokens over and over; "new": no token comes twice; "misleading": four tokens in random order, where
guesses are found all the time and most are wrong. The ways take turns. Processor seconds of one thread are counted, so
that other work on the machine matters less.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
import transformers
from prometheus_client import CollectorRegistry
from report import Samples, machine, table, write_section
from rich.progress import Progress
from shapes import make_base, write_adapters
from transformers import LlamaForCausalLM

import weft
from weft.adapters.records import NewAdapter
from weft.adapters.residency import AdapterRef
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.server.engine.engine import Engine
from weft.server.engine.load import load_engine
from weft.server.engine.request import Delta, Request, Sampling, Stopping
from weft.server.engine.speculation import SMALL_STEP
from weft.server.metrics import Metrics

ROOT = Path(weft.__file__).parents[2]
PROMPT_TOKENS, PERIOD = 32, 24
TEXTS = ("repeats", "new", "misleading")


def make_reciter(shape: str, folder: Path) -> int:
    """A base in which token t is followed by t + 1, but for the first ones, which go round. Returns its vocabulary."""
    config = make_base(shape, folder).config
    config.tie_word_embeddings = False
    model = LlamaForCausalLM.from_pretrained(folder, config=config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        following = torch.arange(1, config.vocab_size + 1) % config.vocab_size
        following[PERIOD - 1], following[-1] = 0, PERIOD  # two circles, and every token follows one other
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.model.embed_tokens.weight))
        model.lm_head.weight[following] = model.model.embed_tokens.weight
        model.model.embed_tokens.weight.mul_(100)  # so that what adapters add changes no token
    model.save_pretrained(folder)
    return config.vocab_size


@dataclass
class Server:
    """An engine with its adapters, and what it took for each text."""

    engine: Engine
    registry: CollectorRegistry
    acquire: Callable[[Seq[tuple[str, float]]], tuple[AdapterRef, ...]]
    seconds: dict[tuple[str, int, bool], Samples] = field(default_factory=dict)
    accepted: dict[tuple[str, int, bool], float] = field(default_factory=dict)


def start(base: Path, adapters: Path, drafts: int) -> Server:
    registry = CollectorRegistry()
    config = ServerConfig(
        model=ModelConfig(str(base), dtype="float32", device="cpu"),
        engine=EngineConfig(
            speculative_tokens=drafts, kv_tokens=8192, adapter_probe=False, adapter_pages=32, threads=1
        ),
        source_roots=(adapters,),
    )
    loaded = load_engine(config, Metrics(registry))
    for path in sorted(adapters.iterdir()):
        loaded.store.create(NewAdapter(path.name, f"file:{path}"))
    return Server(loaded.engine, registry, loaded.store.acquire_all)


def make_requests(text: str, count: int, new_tokens: int, vocab: int, names: Seq[str]) -> list[Request]:
    """The last of the names is for the last request, and so on; none: the base alone."""
    requests = []
    for index in range(count):
        first = index % PERIOD if text == "repeats" else PERIOD + (index + 1) * (vocab // (count + 2))
        prompt = [first]
        while len(prompt) < PROMPT_TOKENS:
            prompt.append(0 if prompt[-1] == PERIOD - 1 else prompt[-1] + 1)
        sampling = Sampling()
        if text == "misleading":
            few = dict.fromkeys(prompt[:4], 1000.0)
            sampling = Sampling(temperature=1000.0, top_k=4, logit_bias=few, seed=index)
        adapters = ((names[index % len(names)], 1.0),) if names else ()
        stopping = Stopping(max_tokens=new_tokens, ignore_eos=True)
        requests.append(Request(f"r{index}", tuple(prompt), adapters, sampling, stopping))
    return requests


def run(server: Server, requests: Seq[Request]) -> tuple[float, list[list[int]]]:
    """Seconds from the first token of all on, and the answers."""
    engine, answers = server.engine, {request: list[int]() for request in requests}
    for request in requests:
        engine.add(request, server.acquire(request.adapters))
    started = time.process_time()
    while engine.has_work:
        for request, event in engine.step():
            assert isinstance(event, Delta)
            answers[request] += [token.id for token in event.tokens]
    return time.process_time() - started, list(answers.values())


def share_accepted(server: Server) -> tuple[float, float]:
    def count(outcome: str) -> float:
        return server.registry.get_sample_value("weft_speculative_tokens_total", {"outcome": outcome}) or 0.0

    return count("accepted"), count("rejected")


def measure(
    servers: dict[int, Server],
    cases: Seq[tuple[str, int, bool]],
    rounds: int,
    new_tokens: int,
    vocab: int,
    names: Seq[str],
    progress: Progress,
) -> None:
    work = progress.add_task("speculation", total=rounds * len(cases) * len(servers))
    for turn in range(rounds):
        for case in cases:
            text, count, adapted = case
            requests = [make_requests(text, count, new_tokens, vocab, names if adapted else ()) for _ in servers]
            told = []
            for server, mine in zip(servers.values(), requests, strict=True):
                before = share_accepted(server)
                seconds, answers = run(server, mine)
                told.append(answers)
                after = share_accepted(server)
                server.seconds.setdefault(case, Samples()).values.append(seconds)
                made = [b - a for a, b in zip(before, after, strict=True)]
                server.accepted[case] = made[0] / sum(made) if sum(made) else float("nan")
                progress.advance(work)
            assert all(answers == told[0] for answers in told), f"{case} in round {turn}: not the same answers"


def show(servers: dict[int, Server], cases: Seq[tuple[str, int, bool]]) -> str:
    plain = servers[0]
    guessing = {drafts: server for drafts, server in servers.items() if drafts}
    rows = []
    for case in cases:
        text, count, adapted = case
        row = [text, str(count), "each its own" if adapted else "none"]
        for server in guessing.values():
            pairs = zip(plain.seconds[case].values, server.seconds[case].values, strict=True)
            gain = Samples([before / after for before, after in pairs])
            accepted = server.accepted[case]
            row.append(
                f"{gain.show(digits=2)}x" + ("; none made" if math.isnan(accepted) else f"; {accepted:.0%} right")
            )
        rows.append(row)
    return table(["text", "requests", "adapters", *(f"{n} tokens ahead" for n in guessing)], rows)


@click.command(help=__doc__)
@click.option("--quick", is_flag=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--new-tokens", default=96, show_default=True)
@click.option("--shape", default="135m", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md", show_default=False)
def main(quick: bool, rounds: int, new_tokens: int, shape: str, output: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rounds, new_tokens = (1, 32) if quick else (rounds, new_tokens)
    counts = (1, 4) if quick else (1, 4, 8)
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        folder = Path(scratch)
        vocab = make_reciter(shape, folder / "base")
        names = [f"a{index:02d}" for index in range(max(counts))]
        write_adapters(shape, folder / "adapters", dict.fromkeys(names, 16))
        servers = {drafts: start(folder / "base", folder / "adapters", drafts) for drafts in (0, 4)}
        cases = [(text, count, False) for text in TEXTS for count in counts]
        cases += [("repeats", count, True) for count in counts]
        measure(servers, cases, rounds, new_tokens, vocab, names, progress)
    report = (
        f"Tokens a second over those without guesses, and how many guesses were right:\n\n{show(servers, cases)}\n\n"
        f"{PROMPT_TOKENS} + {new_tokens} tokens a request, prefill included; guesses only in steps of at most "
        f"{SMALL_STEP} tokens, so none beside {SMALL_STEP} requests or more; "
        f"every answer was the same as without.\n\nMachine: {machine()}; {rounds} rounds.\n"
    )
    click.echo(report)
    if not quick and shape == "135m":
        write_section(output, "speculation", report)


if __name__ == "__main__":
    main()
