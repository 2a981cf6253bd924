"""The frozen base: transformers' own class, loaded, looked over, and run on flat ragged rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from weft.adapters.base import Base, ModuleKind
from weft.errors import InvalidModel, one_line
from weft.kernels.lora import find_backend
from weft.kernels.native import FORMATS, Native
from weft.kernels.pointwise import NativePointwise, Pointwise
from weft.kernels.site import SiteGroup
from weft.server.config import ModelConfig
from weft.server.engine.adapting import Adapting, let_adapt
from weft.server.engine.attention import ATTENTION, PagedStep, WholePrompt, attends_in_place, see_last_hidden
from weft.server.engine.batch import Batch
from weft.server.engine.fusing import Fusion
from weft.server.engine.graphs import GraphRunner, Means
from weft.server.engine.kv_cache import KvCache, KvShape
from weft.server.engine.limits import CAUSAL
from weft.server.engine.linear import freeze
from weft.server.engine.request import Pooling
from weft.server.engine.step import Step, running
from weft.server.engine.survey import NO_INTERFACE, refusing, survey

_FAR = 1 << 20
"""A position beyond what models without a limit are tried at."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a step gave. logits: [len(batch.logit_rows), vocab]; the next step may write over them.

    hidden: of the last hidden states, [len(batch.hidden_rows), hidden]; None where none are wanted.
    """

    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class PagedModel:
    """A base model, its KV cache and its adapter sites.

    native: the C library that computes on a CPU, where there is one.

    Made in three moves, since sizes are known only once the model is loaded: `load`, then `attach` with the memory.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, native: Native | None = None) -> None:
        self.model = model
        self.device = device
        self.native = native
        self.dtype: torch.dtype = model.dtype
        surveyed = survey(model, device)
        self.kv_shapes: Mapping[int, KvShape] = surveyed.kv_shapes
        self.windows = surveyed.windows
        self.base: Base = surveyed.base
        self._linear_groups = surveyed.linear_groups
        self._selects_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.cache: KvCache | None = None
        self.adapting: Adapting | None = None
        self._graphs: GraphRunner | None = None
        self.fusion: Fusion | None = None

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: ids at or above it can't be fed in."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return weight.shape[0]

    @property
    def context_length(self) -> int | None:
        """Positions the model was made for; None where its config sets no limit.

        A rotary embedding that changes with the longest position in the row (dynamic, longrope) would let one request
        change another's answer, so such a model is served up to the length at which it starts to change.
        """
        config = self.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions")
        lengths = [getattr(config, name) for name in names if isinstance(getattr(config, name, None), int)]
        return min([*lengths[:1], *_stable_rope_lengths(config)], default=None)

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """What it can make of its last hidden states: nothing where no backbone is apart from the head."""
        return () if self.model.base_model is self.model else CAUSAL

    @property
    def token_bytes(self) -> int:
        """Bytes of KV cache one token takes."""
        return sum(shape.numbers for shape in self.kv_shapes.values()) * self.dtype.itemsize

    @property
    def attends_in_place(self) -> bool:
        """Whether attention takes no memory for copies of the cache and for masks."""
        return attends_in_place(self.native, self.dtype, self.device)

    def attach(
        self,
        cache: KvCache,
        groups: Mapping[tuple[str, ...], SiteGroup],
        lora_backend: str,
        pointwise: Pointwise | None = None,
    ) -> None:
        """Give the model its cache, adapters their place, and every product its fastest form.

        pointwise: what is between the products; None: the C library, where it computes.
        """
        self.cache = cache
        self.adapting = Adapting(groups, find_backend(lora_backend, self.native))
        freeze(self.model, self._linear_groups, self.native)
        linear = (ModuleKind.LINEAR, ModuleKind.HEAD)
        if self.poolings:
            self.model.base_model.register_forward_hook(see_last_hidden)
        let_adapt(self.model, (name for name, module in self.base.modules.items() if module.kind not in linear))
        if pointwise is None and self.native is not None and self.device.type == "cpu" and self.dtype in FORMATS:
            pointwise = NativePointwise(self.native)
        if pointwise is not None:
            with self._on_device():
                self.fusion = Fusion(self.model, pointwise, min(self.context_length or _FAR, _FAR), self.device)

    def use(self, cache: KvCache) -> None:
        """Take another KV cache in place of the attached one, which is let go."""
        self.cache = cache
        self._graphs = None

    def capture(self, means: Means, max_rows: int, width: int) -> GraphRunner:
        """Run decode steps of up to `max_rows` rows from buffers of fixed places, captured where the device can.

        width: blocks of the longest context.
        """
        if self.cache is None or self.adapting is None:
            raise RuntimeError("attach() comes before capture()")
        self._graphs = GraphRunner(self._run, self.cache, self.adapting, means, max_rows, width)
        return self._graphs

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Outputs:
        """Run one step, which writes the new keys and values. batch: on any device."""
        if self.cache is None or self.adapting is None:
            raise RuntimeError("attach() comes before forward()")
        with self._on_device():
            made = self._graphs.run(batch) if self._graphs is not None else None
            return Outputs(made) if made is not None else self._run_as_it_comes(batch.to(self.device))

    def _run_as_it_comes(self, batch: Batch) -> Outputs:
        assert self.cache is not None
        assert self.adapting is not None
        head = self.base.head if self._selects_logits else ""
        step = PagedStep(batch, self.cache, self.adapting, head, self.native)
        keep = {"logits_to_keep": batch.logit_rows} if self._selects_logits else {}
        logits = self._run(step, batch.input_ids, batch.positions, **keep)
        logits = logits if self._selects_logits else logits[batch.logit_rows]
        return Outputs(logits, None if batch.hidden_rows is None else step.hidden)

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, which each thread has its own of."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _run(self, step: Step, input_ids: torch.Tensor, positions: torch.Tensor, **keep: torch.Tensor) -> torch.Tensor:
        """input_ids, positions: int64 [1, T]; keep: whether not all logits are wanted. Returns [T, vocab]."""
        with running(step):
            output = self.model(input_ids=input_ids, position_ids=positions, use_cache=False, return_dict=True, **keep)
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def run_whole(self, input_ids: torch.Tensor) -> None:
        """Run one prompt, int64 [1, T], for the sake of what the running step sees of it."""
        positions = torch.arange(input_ids.shape[1], device=self.device)[None]
        self.model(input_ids=input_ids, position_ids=positions, use_cache=False, return_dict=True)

    @torch.inference_mode()
    def check_position(self, position: int) -> None:
        """Raises InvalidModel where a token at this position can't be run: a table of positions ends before it."""
        where = torch.tensor([[position]], device=self.device)
        name = f"{type(self.model).__name__} at position {position} (set --context-length to what it was made for)"
        with refusing(name), running(WholePrompt()):
            self.model(input_ids=where * 0, position_ids=where, use_cache=False, return_dict=True)

    @torch.inference_mode()
    def scrub(self, blocks: list[int]) -> None:
        """Zero blocks that may hold values that are not finite, before another sequence gets them."""
        if self.cache is not None and blocks:
            self.cache.scrub(blocks)


def check_path(name: str) -> None:
    """Raises InvalidModel for what is plainly neither a model's folder nor a hub id."""
    path = Path(name)
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or path.exists()):
        raise InvalidModel(f"{name} is not a folder: --model takes a Hugging Face model folder or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InvalidModel(f"{name} holds no config.json: it is not a Hugging Face model folder")


def load_model(config: ModelConfig, native: Native | None = None) -> PagedModel:
    """Load a causal language model from a folder or the hub. Raises InvalidModel with one line that says why not."""
    check_path(config.path)
    device = torch.device(resolve_device(config.device))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config.path,
            dtype=_dtype(config.dtype, device),
            attn_implementation=ATTENTION,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a folder makes transformers raise, the user gets one line
        if isinstance(error, KeyError) and error.args == (ATTENTION,):
            raise InvalidModel(f"{config.path}: its class {NO_INTERFACE}") from error
        raise InvalidModel(f"{config.path} can't be loaded as a causal language model: {one_line(error)}") from error
    model, report = loaded
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise InvalidModel(f"{config.path} lacks {len(lacking)} weights of its model, {lacking[0]} among them")
    model.requires_grad_(False)
    return PagedModel(model.eval().to(device), device, native)


def resolve_device(wanted: str) -> str:
    """The device that an option names. Raises InvalidModel where it is not to be had."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidModel(f"--device is {wanted}, but PyTorch finds no CUDA device here: use --device cpu")
    return wanted


def _dtype(wanted: str, device: torch.device) -> torch.dtype | str:
    """float32 on a CPU unless asked otherwise: half precision is slower there on most, and less exact on all."""
    if wanted == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


def _stable_rope_lengths(config: PretrainedConfig) -> list[int]:
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [
        int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
