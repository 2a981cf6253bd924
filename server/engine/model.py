"""The frozen base: transformers' own class, loaded, looked over, and run on flat ragged rows."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from weft.adapters.base import Base, Classifier, ModuleKind
from weft.errors import InvalidModel, one_line
from weft.kernels.lora import find_backend
from weft.kernels.native import FORMATS, Native
from weft.kernels.plan import Span, build_plan
from weft.kernels.pointwise import NativePointwise, Pointwise
from weft.kernels.site import SiteGroup
from weft.server.config import ModelConfig
from weft.server.engine.adapting import Adapting, keep_residual, let_adapt
from weft.server.engine.attention import (
    ATTENTION,
    AfterBackbone,
    PagedStep,
    WholePrompt,
    attends_in_place,
    see_last_hidden,
)
from weft.server.engine.batch import Batch
from weft.server.engine.encoders import is_encoder
from weft.server.engine.fusing import Fusion
from weft.server.engine.graphs import GraphRunner, Means
from weft.server.engine.kv_cache import KvCache, KvShape
from weft.server.engine.limits import CAUSAL, Abilities
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

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        native: Native | None = None,
        lacking: Collection[str] = (),
    ) -> None:
        """lacking: the parameters that the checkpoint does not have. Raises InvalidModel."""
        self.model = model
        self.device = device
        self.native = native
        self.dtype: torch.dtype = model.dtype
        surveyed = survey(model, device)
        self.kv_shapes: Mapping[int, KvShape] = surveyed.kv_shapes
        self.windows = surveyed.windows
        self.encoder = surveyed.encoder
        classifier = _brought(model, surveyed.base.classifier, lacking)
        self.base: Base = replace(surveyed.base, classifier=classifier)
        self.own_head = None if self.encoder is None or classifier is None or classifier.absent else self.encoder.head()
        """Of an encoder's checkpoint that brings all parameters of its classifier."""
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
        first = 0 if self.encoder is None else self.encoder.first_position
        lengths = [getattr(config, name) - first for name in names if isinstance(getattr(config, name, None), int)]
        return min([*lengths[:1], *_stable_rope_lengths(config)], default=None)

    @property
    def abilities(self) -> Abilities:
        """Nothing can be made of last hidden states where no backbone is apart from the head."""
        if self.encoder is None:
            return Abilities(poolings=() if self.model.base_model is self.model else CAUSAL)
        return Abilities(
            generates=False,
            poolings=(Pooling.MEAN, Pooling.CLS, Pooling.LAST),
            class_pooling=self.encoder.pooling,
            classes=self.encoder.classes() if self.own_head is not None else None,
        )

    @property
    def runs_whole(self) -> bool:
        """Whether a prompt has to be run in one step, after which nothing of it is needed any more."""
        return self.encoder is not None

    @property
    def token_bytes(self) -> int:
        """Bytes of KV cache one token takes."""
        shapes = set(self.kv_shapes.values()) if self.runs_whole else self.kv_shapes.values()
        return sum(shape.numbers for shape in shapes) * self.dtype.itemsize

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
        freeze(self.model, self._linear_groups, self.native, self.base.residuals)
        keep_residual(self.model, set(self.base.residuals.values()))
        linear = (ModuleKind.LINEAR, ModuleKind.HEAD)
        if self.abilities.poolings:
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
        if self.encoder is not None:
            with running(step):
                self._over(batch.input_ids, batch.positions)
            return Outputs(torch.empty(0, self.vocab_size, device=self.device), step.hidden)
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
            logits: torch.Tensor = self._over(input_ids, positions, **keep).logits[0]
        return logits

    def _over(self, input_ids: torch.Tensor, positions: torch.Tensor, **keep: torch.Tensor) -> Any:
        """Of rows of tokens, int64 [1, T]: the model's output; of an encoder the last hidden states, [T, hidden]."""
        if self.encoder is not None:
            return self.encoder.run(input_ids, positions)
        return self.model(input_ids=input_ids, position_ids=positions, use_cache=False, return_dict=True, **keep)

    @torch.inference_mode()
    def features(self, pooled: torch.Tensor, adapters: Span) -> torch.Tensor:
        """What an output head is to see of one pooled vector, float32 [hidden]. adapters: the prompt's, as its span."""
        if self.encoder is None:
            return pooled
        assert self.adapting is not None, "attach() comes before features()"
        with self._on_device(), running(AfterBackbone(self.adapting, build_plan([adapters], self.device))):
            return self.encoder.features(pooled[None].to(self.dtype))[0].float()

    @torch.inference_mode()
    def run_whole(self, input_ids: torch.Tensor) -> None:
        """Run one prompt, int64 [1, T], for the sake of what the running step sees of it."""
        made = self._over(input_ids, torch.arange(input_ids.shape[1], device=self.device)[None])
        if self.encoder is not None:
            self.encoder.features(made)

    @torch.inference_mode()
    def check_position(self, position: int) -> None:
        """Raises InvalidModel where a token at this position can't be run: a table of positions ends before it."""
        where = torch.tensor([[position]], device=self.device)
        name = f"{type(self.model).__name__} at position {position} (set --context-length to what it was made for)"
        with refusing(name), running(WholePrompt()):
            self._over(where * 0, where)

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
    """Load a causal language model, or an encoder, from a folder or the hub.

    Raises InvalidModel with one line that says why not.
    """
    check_path(config.path)
    device = torch.device(resolve_device(config.device))
    kind = "causal language model"
    try:
        encodes = is_encoder(AutoConfig.from_pretrained(config.path))
        kind = "sequence classifier" if encodes else kind
        loader: Any = AutoModelForSequenceClassification if encodes else AutoModelForCausalLM
        loaded: Any = loader.from_pretrained(
            config.path,
            dtype=_dtype(config.dtype, device),
            attn_implementation=ATTENTION,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever a folder makes transformers raise, the user gets one line
        if isinstance(error, KeyError) and error.args == (ATTENTION,):
            raise InvalidModel(f"{config.path}: its class {NO_INTERFACE}") from error
        raise InvalidModel(f"{config.path} can't be loaded as a {kind}: {one_line(error)}") from error
    model, report = loaded
    model.requires_grad_(False)
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    return PagedModel(model.eval().to(device), device, native, lacking)


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


def _brought(model: PreTrainedModel, classifier: Classifier | None, lacking: Collection[str]) -> Classifier | None:
    """The classifier, with what an adapter has to bring of it. Raises InvalidModel where anything else is lacking."""
    absent = frozenset(name.rpartition(".")[0] for name in lacking)
    if absent - ({*classifier.between, classifier.output} if classifier is not None else set()):
        raise InvalidModel(f"{model.name_or_path} lacks {len(lacking)} weights of its model, {min(lacking)} among them")
    return replace(classifier, absent=absent) if classifier is not None else None


def _stable_rope_lengths(config: PretrainedConfig) -> list[int]:
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [
        int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
