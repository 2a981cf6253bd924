"""The frozen base: transformers' own class, loaded, looked over, and run on flat ragged rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from weft.adapters.folder import ModuleShapes
from weft.errors import InvalidModel
from weft.kernels.lora import BACKENDS
from weft.kernels.plan import Plan
from weft.kernels.site import Site
from weft.server.config import ModelConfig
from weft.server.engine.attention import (
    ATTENTION,
    AttentionOptions,
    KvCache,
    KvShape,
    PagedStep,
    attend,
    running,
)
from weft.server.engine.batch import Batch
from weft.server.engine.linear import freeze, is_linear, linear_shapes

_NO_INTERFACE = "does not use transformers' attention interface, so Weft can't page its cache"
_SERVED_LAYERS = frozenset({"full_attention", "sliding_attention"})


class PagedModel:
    """A base model, its KV cache and its adapter sites.

    Made in three moves, since sizes are known only once the model is loaded: `load`, then `attach` with the memory.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model = model
        self.device = device
        self.dtype: torch.dtype = model.dtype
        survey = _survey(model, device)
        self.kv_shapes: Mapping[int, KvShape] = survey.kv_shapes
        self.windows: frozenset[int] = frozenset(survey.windows)
        self.module_shapes: ModuleShapes = linear_shapes(model, survey.adaptable)
        self._linear_names = survey.linear_names
        self._selects_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.cache: KvCache | None = None

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
    def token_bytes(self) -> int:
        """Bytes of KV cache one token takes."""
        return sum(shape.numbers for shape in self.kv_shapes.values()) * self.dtype.itemsize

    def attach(self, cache: KvCache, sites: Mapping[str, Site], lora_backend: str) -> None:
        """Give the model its cache, every site its place, and every product its fastest form."""
        self.cache = cache
        freeze(self.model, self._linear_names, sites, BACKENDS[lora_backend])

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Run one step: writes the new keys and values, returns logits [len(batch.logit_rows), vocab]."""
        if self.cache is None:
            raise RuntimeError("attach() comes before forward()")
        keep = {"logits_to_keep": batch.logit_rows} if self._selects_logits else {}
        with running(PagedStep(batch, self.cache)):
            output = self.model(
                input_ids=batch.input_ids,
                position_ids=batch.positions,
                use_cache=False,
                return_dict=True,
                **keep,
            )
        logits: torch.Tensor = output.logits[0]
        return logits if self._selects_logits else logits[batch.logit_rows]

    @torch.inference_mode()
    def check_position(self, position: int) -> None:
        """Raises InvalidModel where a token at this position can't be run: a table of positions ends before it."""
        where = torch.tensor([[position]], device=self.device)
        name = f"{type(self.model).__name__} at position {position} (set --context-length to what it was made for)"
        with refusing(name), running(_Survey()):
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


def load_model(config: ModelConfig) -> PagedModel:
    """Load a causal language model from a folder or the hub. Raises InvalidModel with one line that says why not."""
    check_path(config.path)
    device = torch.device(_device(config.device))
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
            raise InvalidModel(f"{config.path}: its class {_NO_INTERFACE}") from error
        raise InvalidModel(f"{config.path} can't be loaded as a causal language model: {one_line(error)}") from error
    model, report = loaded
    lacking = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if lacking:
        raise InvalidModel(f"{config.path} lacks {len(lacking)} weights of its model, {lacking[0]} among them")
    model.requires_grad_(False)
    return PagedModel(model.eval().to(device), device)


def _device(wanted: str) -> str:
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


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line that is not too long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:300] + " …"


def _stable_rope_lengths(config: PretrainedConfig) -> list[int]:
    parameters: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return [
        int(kind.get("original_max_position_embeddings") or config.max_position_embeddings)
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]


class _Survey:
    """A step that looks: one plain causal run over a single prompt that notes each layer's shapes and options.

    linear_names: linear modules that are called; adaptable: those of them that see the whole row exactly once.
    """

    plan: Plan | None = None

    def __init__(self) -> None:
        self.kv_shapes: dict[int, KvShape] = {}
        self.windows: set[int] = set()
        self.linear_names: list[str] = []
        self.adaptable: list[str] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        if layer in self.kv_shapes:
            raise InvalidModel(f"layer {layer} attends twice: the model shares or crosses its attention")
        self.kv_shapes[layer] = KvShape(key.shape[0], key.shape[2], value.shape[2])
        if options.window is not None:
            self.windows.add(options.window)
        return attend(query[None], key[None], value[None], None, options, causal=True)[0].transpose(0, 1)


@torch.inference_mode()
def _survey(model: PreTrainedModel, device: torch.device) -> _Survey:
    """Find out what the model's layers keep and which linear modules see the whole row exactly once.

    Raises InvalidModel where the model does not go through the attention interface, or keeps other state.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    odd = sorted(set(getattr(config, "layer_types", None) or []) - _SERVED_LAYERS)
    if odd:
        raise InvalidModel(f"{name} has layers of the kind {', '.join(odd)}; only attention layers can be served")
    survey, num_tokens = _Survey(), 5
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    calls: dict[str, list[bool]] = {}
    handles = [
        module.register_forward_pre_hook(_note_call(calls.setdefault(path, []), num_tokens))
        for path, module in model.named_modules()
        if is_linear(module)
    ]
    positions = torch.arange(num_tokens, device=device)[None]
    try:
        with refusing(name), running(survey):
            model(input_ids=positions, position_ids=positions, use_cache=False, return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    if not survey.kv_shapes:
        raise InvalidModel(f"{name} {_NO_INTERFACE}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or []) and not survey.windows:
        raise InvalidModel(f"{name} has sliding-window layers, but does not pass the window to its attention")
    survey.linear_names = [path for path, whole in calls.items() if whole]
    survey.adaptable = [
        path for path, whole in calls.items() if whole == [True] and model.get_submodule(path) is not head
    ]
    return survey


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """A model whose forward pass fails on a plain prompt is refused, in one line."""
    try:
        yield
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        raise InvalidModel(f"{name} can't be served: its forward pass fails ({one_line(error)})") from error


def _note_call(seen: list[bool], num_tokens: int) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
    def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].shape[:-1].numel() == num_tokens)

    return note
