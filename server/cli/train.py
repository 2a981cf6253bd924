"""`weft train`: an adapter from a file of examples."""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from weft.making.config import (
    METHODS,
    PRECISIONS,
    SCHEDULES,
    TASKS,
    Columns,
    DataConfig,
    DistillConfig,
    LoopConfig,
    MethodConfig,
    TrainConfig,
)
from weft.server.cli.client import Endpoint, connected, describe, push_options
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import adapter_pb2_grpc

if TYPE_CHECKING:
    from weft.making.results import Trained

_PATH = click.Path(path_type=Path, dir_okay=False)
_COUNT = click.IntRange(1)
_MAX_LAYERS = 10_000
_POSITIVE = click.FloatRange(0, min_open=True)
_SHARE = click.FloatRange(0, 1, max_open=True)


def _names(_context: click.Context, _option: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",")) if text else ()


def _layers(_context: click.Context, _option: click.Parameter, text: str) -> tuple[int, ...]:
    """0-3,5 as 0 1 2 3 5."""
    layers: set[int] = set()
    for part in text.split(",") if text else ():
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < _MAX_LAYERS):
            raise click.UsageError(f"--layers is {text!r}; must be layers and ranges of them, such as 0-3,5")
        layers |= set(range(int(first), int(last) + 1))
    return tuple(sorted(layers))


def _text(_context: click.Context, _option: click.Parameter, text: str) -> str:
    """@FILE for what a file holds."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise click.UsageError(f"--teacher-prompt {text} can't be read: {error.strerror}") from None


_DATA = (
    click.option(
        "--data", "files", type=_PATH, multiple=True, required=True, help="JSONL, CSV or Parquet; repeatable."
    ),
    click.option("--eval-data", "eval_files", type=_PATH, multiple=True, help="To evaluate on; repeatable."),
    click.option("--eval-share", type=_SHARE, default=0.0, help="Of --data, to evaluate on instead."),
    *(
        click.option(
            f"--{name}-column", name, default=name, show_default=True, help=f"What the column {name} is called."
        )
        for name in Columns.__slots__
    ),
    click.option("--task", type=click.Choice(TASKS), help="[default: what the columns are for]"),
    click.option(
        "--labels", default="", callback=_names, metavar="NAME,…", help="[default: those of the data, sorted]"
    ),
    click.option("--template", default="", metavar="TEXT", help="What a text to classify is put into, at {text}."),
    click.option("--max-length", type=_COUNT, help="In tokens.  [default: the model's context]"),
    click.option("--truncate", is_flag=True, help="Cut what is longer, and say how much was cut."),
)
_METHOD = (
    click.option("--method", "name", type=click.Choice(METHODS), default="lora", show_default=True),
    click.option("--rank", type=click.IntRange(1, 65536), default=8, show_default=True),
    click.option("--alpha", type=_COUNT, default=16, show_default=True),
    click.option("--dropout", type=_SHARE, default=0.0, show_default=True),
    click.option(
        *("--modules",),
        default="all-linear",
        show_default=True,
        metavar="NAME,…|REGEX|importance:N",
        help="importance:N takes those with the largest gradients on a few batches.",
    ),
    click.option("--layers", default="", callback=_layers, metavar="0-3,5", help="[default: all]"),
    click.option(
        "--loraplus-ratio", type=_POSITIVE, default=16.0, show_default=True, help="B's rate to A's, in lora+."
    ),
)
_DISTILL = (
    click.option("--teacher", "teacher_model", default="", metavar="MODEL", help="Another model of this vocabulary."),
    click.option("--teacher-adapter", default="", metavar="DIR", help="An adapter of the teacher."),
    click.option(
        *("--teacher-prompt",), default="", callback=_text, metavar="TEXT|@FILE", help="Goes before what it is asked."
    ),
    click.option("--temperature", type=_POSITIVE, default=1.0, show_default=True),
    click.option("--max-answer", type=_COUNT, default=128, show_default=True, help="Tokens, where it writes answers."),
    click.option(
        *("--label-weight",),
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        help="Of the data's own answers in the loss.",
    ),
)
_LOOP = (
    click.option("--batch-size", type=_COUNT, default=8, show_default=True, help="Of all processes together."),
    click.option("--accumulate", type=_COUNT, default=1, show_default=True, help="So many batches a step."),
    click.option("--epochs", type=_POSITIVE, default=3.0, show_default=True),
    click.option("--max-steps", type=_COUNT, help="In the place of --epochs."),
    click.option("--learning-rate", type=_POSITIVE, default=2e-4, show_default=True),
    click.option("--weight-decay", type=click.FloatRange(0), default=0.0, show_default=True),
    click.option("--schedule", type=click.Choice(SCHEDULES), default="linear", show_default=True),
    click.option("--warmup", type=click.FloatRange(0), default=0.0, show_default=True, help="Steps; below 1, a share."),
    click.option(
        "--clip", type=click.FloatRange(0), default=1.0, show_default=True, help="The gradient's norm; 0 is off."
    ),
    click.option("--eval-every", type=_COUNT, help="Steps.  [default: each epoch]"),
    click.option("--early-stop", type=_COUNT, help="After so many evaluations that are no better."),
    click.option("--save-every", type=_COUNT, default=500, show_default=True, help="Steps; with evaluations, at each."),
)
_REST = (
    click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True),
    click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True),
    click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
    click.option("--resume", is_flag=True, help="Go on from the last checkpoint, if there is one."),
    click.option("--name", "pushed_name", metavar="NAME", help="On the server.  [default: the output folder's]"),
)


def _with(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.command()
@click.option("--model", required=True, metavar="DIR|HUB_ID", help="The base.")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="A new folder for the adapter.")
@_with((*_DATA, *_METHOD, *_DISTILL, *_LOOP, *_REST))
@push_options
def train(model: str, output: Path, server: Endpoint | None, pushed_name: str | None, **given: Any) -> None:
    """Train an adapter, which `weft serve` serves and PEFT loads."""
    config = _config(model, output, given)
    try:
        from weft.making.training import train as run  # noqa: PLC0415 - an extra, and slow
    except ModuleNotFoundError as error:
        raise click.ClickException(f"weft train needs {error.name}: pip install 'weft[train]'") from None
    from weft.server.cli.quiet import quiet_transformers  # noqa: PLC0415

    quiet_transformers()
    warnings.simplefilter("ignore")  # advice of the libraries to each other
    trained, is_first = run(config, _command(sys.argv[1:]))
    if is_first:
        _tell(trained)
        if server is not None:
            push(server, pushed_name or output.name, output)


def _command(words: Sequence[str]) -> str:
    """As it was typed, for the model card; without the key, which others will read there."""
    shown = ["weft"]
    for word in words:
        is_key = shown[-1] == "--api-key"
        shown.append("…" if is_key else "--api-key=…" if word.startswith("--api-key=") else word)
    return shlex.join(shown)


def _config(model: str, output: Path, given: dict[str, Any]) -> TrainConfig:
    def take(kind: type[Any]) -> dict[str, Any]:
        return {name: given.pop(name) for name in kind.__slots__ if name in given}

    columns = Columns(**take(Columns))
    distill = DistillConfig(
        model=given.pop("teacher_model"),
        adapter=given.pop("teacher_adapter"),
        prompt=given.pop("teacher_prompt"),
        temperature=given.pop("temperature"),
        label_weight=given.pop("label_weight"),
        max_answer=given.pop("max_answer"),
    )
    data = DataConfig(columns=columns, **take(DataConfig))
    method, loop = MethodConfig(**take(MethodConfig)), LoopConfig(**take(LoopConfig))
    return TrainConfig(model, output, data, method, distill, loop, **given)


def _tell(trained: Trained) -> None:
    click.echo(f"{trained.config.output}: {trained.summary}")


def push(server: Endpoint, name: str, folder: Path) -> None:
    """Create the adapter on a server, or move its name to this folder. Raises ClickException where it is refused."""
    adapter = pb2.Adapter(name=name, source=f"file:{folder.absolute()}")
    with connected(server) as channel:
        stub = adapter_pb2_grpc.AdapterServiceStub(channel)
        try:
            try:
                made = stub.CreateAdapter(pb2.CreateAdapterRequest(adapter=adapter, wait=True)).adapter
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise
                mask = FieldMask(paths=["source"])
                made = stub.UpdateAdapter(pb2.UpdateAdapterRequest(adapter=adapter, update_mask=mask)).adapter
        except grpc.RpcError as error:
            words = f"{server.address} did not take it: {describe(error, server)}. The adapter is in {folder}"
            raise click.ClickException(words) from None
    click.echo(f"{server.address} serves it as {made.name}, {made.digest}")
