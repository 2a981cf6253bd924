"""What `weft train` is told, checked once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from weft.errors import InvalidConfig

Task = Literal["generate", "classify"]
Method = Literal["lora", "rslora", "dora", "lora+", "head", "distill"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

METHODS: tuple[Method, ...] = ("lora", "rslora", "dora", "lora+", "head", "distill")
PRECISIONS: tuple[Precision, ...] = ("auto", "float32", "bfloat16", "float16")
TASKS: tuple[Task, ...] = ("generate", "classify")
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")

ALL_LINEAR = "all-linear"
IMPORTANCE = "importance:"
TEXT_MARK = "{text}"


@dataclass(frozen=True, slots=True)
class Columns:
    """What the columns of the data are called."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"
    label: str = "label"


@dataclass(frozen=True, slots=True)
class DataConfig:
    """The examples.

    labels: in the order of the head's outputs; empty for those that the data holds, sorted. template: what a text to
    classify is put into, at {text}. max_length: in tokens; None for the model's context.
    """

    files: tuple[Path, ...]
    eval_files: tuple[Path, ...] = ()
    eval_share: float = 0.0
    columns: Columns = field(default_factory=Columns)
    task: Task | None = None
    labels: tuple[str, ...] = ()
    template: str = ""
    max_length: int | None = None
    truncate: bool = False

    def __post_init__(self) -> None:
        if self.eval_files and self.eval_share:
            raise InvalidConfig("--eval-data and --eval-share are both given: choose one")
        if self.template and TEXT_MARK not in self.template:
            raise InvalidConfig(f"--template is {self.template!r}; must hold {TEXT_MARK}, where the text goes")
        if len(set(self.labels)) < len(self.labels):
            raise InvalidConfig(f"--labels names one twice: {', '.join(self.labels)}")

    @property
    def has_evaluation(self) -> bool:
        return bool(self.eval_files or self.eval_share)


@dataclass(frozen=True, slots=True)
class MethodConfig:
    """What is trained.

    modules: `all-linear`, names with commas, a regular expression of whole names, or `importance:N`. layers: all where
    empty.
    """

    name: Method = "lora"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    modules: str = ALL_LINEAR
    layers: tuple[int, ...] = ()
    loraplus_ratio: float = 16.0

    def __post_init__(self) -> None:
        count = self.modules.removeprefix(IMPORTANCE)
        if count != self.modules and not (count.isdecimal() and int(count) > 0):
            raise InvalidConfig(f"--modules is {self.modules!r}; must be {IMPORTANCE}N with a number of modules from 1")


@dataclass(frozen=True, slots=True)
class DistillConfig:
    """Whose answers the adapter learns: the base, unless a model is named, with an adapter and a prompt where given.

    max_answer: in tokens, of those that it writes where the data has none.
    """

    model: str = ""
    adapter: str = ""
    prompt: str = ""
    temperature: float = 1.0
    label_weight: float = 0.0
    max_answer: int = 128

    @property
    def is_given(self) -> bool:
        return bool(self.is_another or self.prompt)

    @property
    def is_another(self) -> bool:
        """Whether it is a model besides the student's base."""
        return bool(self.model or self.adapter)


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """How long and how fast. batch_size: of all processes together; a step is so many times `accumulate` examples."""

    batch_size: int = 8
    accumulate: int = 1
    epochs: float = 3.0
    max_steps: int | None = None
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    schedule: str = "linear"
    warmup: float = 0.0
    clip: float = 1.0
    eval_every: int | None = None
    early_stop: int | None = None
    save_every: int = 500


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """All of it."""

    model: str
    output: Path
    data: DataConfig
    method: MethodConfig = field(default_factory=MethodConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    precision: Precision = "auto"
    device: str = "auto"
    seed: int = 0
    resume: bool = False

    def __post_init__(self) -> None:
        if (self.method.name == "distill") != self.distill.is_given:
            raise InvalidConfig(
                "--method distill needs a teacher, and only it has one: give it with "
                "--teacher-prompt, --teacher or --teacher-adapter"
            )
        if self.loop.eval_every and not self.data.has_evaluation:
            raise InvalidConfig("--eval-every needs something to evaluate on: give --eval-data or --eval-share")
        if self.loop.early_stop and not self.data.has_evaluation:
            raise InvalidConfig("--early-stop goes by evaluations: give --eval-data or --eval-share")
        if self.method.name == "distill" and self.data.task == "classify":
            raise InvalidConfig("--method distill is for --task generate: a teacher gives tokens")

    def told(self) -> Mapping[str, Any]:
        """Every setting that what is trained depends on, for a run that goes on to be held to."""
        settings = asdict(self)
        del settings["resume"], settings["output"]
        return dict(_flat(settings))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", [str(item) for item in value] if isinstance(value, tuple) else value
