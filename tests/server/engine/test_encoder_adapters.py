"""Sequence classifiers on an encoder: PEFT's logits in one mixed batch, whatever each has trained, and to the bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import LINEAR, make_encoder, own_logits
from harness import Harness
from peft import PeftModel
from tiny import VOCAB, make_adapter, make_classifier, peft_classify
from transformers import AutoModel, AutoModelForMaskedLM, PreTrainedModel

from weft.adapters import pages
from weft.adapters.base import Base
from weft.adapters.content import LoraWeights
from weft.adapters.fold import Folded
from weft.adapters.records import NewAdapter
from weft.errors import InvalidAdapter
from weft.kernels.native import Native
from weft.kernels.patches import Affine
from weft.server.engine.request import Pooling, Request, Stopping

WHOLE = {"bert": "pooler", "roberta": "classifier", "modernbert": "head"}
"""What each class has between its backbone and its output."""
NO_TOKENS = Stopping(max_tokens=0)


def adapters_of(kind: str) -> Mapping[str, Mapping[str, Any]]:
    """Settings of each, by its name; the number of labels is that of its position, from 2 on."""
    return {
        "plain": {"target_modules": LINEAR[kind]},
        "odd": {"target_modules": LINEAR[kind][:1], "r": 13, "use_rslora": True},
        "dora": {"target_modules": LINEAR[kind], "r": 4, "use_dora": True},
        "biased": {"target_modules": LINEAR[kind][:2], "bias": "lora_only"},
        "all": {"target_modules": "all-linear", "r": 2},
        "whole": {"target_modules": LINEAR[kind][:2], "modules_to_save": [WHOLE[kind]]},
    }


@dataclass(frozen=True)
class Bench:
    """A server of an encoder and adapters for it."""

    kind: str
    root: Path
    model: PreTrainedModel
    harness: Harness = field(init=False)

    @property
    def names(self) -> list[str]:
        return list(adapters_of(self.kind))

    def start(self, **engine: object) -> Harness:
        folders = {name: self.root / name for name in self.names}
        return Harness(self.root / "base", folders, **{"kv_tokens": None, "adapter_pages": 512, **engine})


@pytest.fixture(scope="module", params=WHOLE)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    bench = Bench(kind, root, make_encoder(kind, root / "base", num_labels=7))
    for index, (name, settings) in enumerate(adapters_of(kind).items()):
        labels = [f"{name} {label}" for label in range(2 + index)]
        make_classifier(root / "base", root / name, labels, seed=index, **settings)
    object.__setattr__(bench, "harness", bench.start())
    return bench


def prompts(count: int) -> list[tuple[int, ...]]:
    rng = random.Random(0)
    return [tuple(rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 60))) for _ in range(count)]


def mixed(bench: Bench) -> list[Request]:
    """Classifications by each adapter, several times, by the base, and vectors, in turn."""
    names = [*bench.names, ""] * 3
    pooling = bench.harness.engine.limits.abilities.class_pooling
    asked = []
    for prompt, name in zip(prompts(len(names)), names, strict=True):
        adapters = ((name, 1.0),) if name else ()
        asked.append(Request("c", prompt, adapters, stopping=NO_TOKENS, pooling=pooling, through_head=True))
        asked.append(Request("e", prompt, adapters, stopping=NO_TOKENS, pooling=Pooling.MEAN))
    return asked


def vectors(harness: Harness, requests: list[Request]) -> list[torch.Tensor]:
    answers = harness.run(requests)
    assert all(answer.vector is not None for answer in answers), [answer.error for answer in answers]
    return [answer.vector for answer in answers if answer.vector is not None]


def test_a_mixed_batch_gives_the_logits_of_transformers_and_peft(bench: Bench) -> None:
    requests = [request for request in mixed(bench) if request.through_head]
    made = vectors(bench.harness, requests)
    assert {len(vector) for vector in made} == set(range(2, 8))
    for request, mine in zip(requests, made, strict=True):
        if request.adapters:
            name = request.adapters[0][0]
            theirs = peft_classify(bench.root / "base", bench.root / name, len(mine), request.prompt)
        else:
            theirs = own_logits(bench.model, request.prompt)
        assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4), request.adapters


def test_every_answer_is_the_same_to_the_bit_alone_and_mixed(bench: Bench) -> None:
    requests = mixed(bench)
    alone = [vectors(bench.harness, [request])[0] for request in requests]
    for server in (bench.harness, bench.start(max_batch_tokens=128, max_running_requests=5, adapter_probe=False)):
        together = vectors(server, requests)
        assert all(torch.equal(mine, other) for mine, other in zip(together, alone, strict=True))


def test_what_comes_after_the_backbone_is_proven_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [info.probe_error for info in bench.harness.store.list()]
    assert all(error is not None and error < 1e-5 for error in errors), errors
    right = pages.fold

    def wrong(weights: LoraWeights, base: Base, dtype: torch.dtype, native: Native | None) -> Folded:
        folded, module = right(weights, base, dtype, native), base.classifier.between[0]  # type: ignore[union-attr]
        shift = Affine(torch.zeros(64), torch.full((64,), 1e-2))
        return replace(folded, patches={**folded.patches, module: (*folded.patches[module], shift)})

    monkeypatch.setattr(pages, "fold", wrong)
    with pytest.raises(InvalidAdapter, match="away from PEFT's formula"):
        bench.harness.store.create(NewAdapter("wrong", f"file:{bench.root / 'whole'}"))


@pytest.mark.parametrize(("kind", "auto"), [("bert", AutoModelForMaskedLM), ("modernbert", AutoModel)])
def test_what_the_checkpoint_lacks_an_adapter_has_to_bring(kind: str, auto: type, tmp_path: Path) -> None:
    make_encoder(kind, tmp_path / "base", auto)
    settings = {"target_modules": LINEAR[kind][:2]}
    make_classifier(tmp_path / "base", tmp_path / "without", "abc", **settings)
    make_classifier(tmp_path / "base", tmp_path / "with", "abc", modules_to_save=[WHOLE[kind]], **settings)
    server = Harness(tmp_path / "base", {"with": tmp_path / "with"}, kv_tokens=None)
    prompt = prompts(1)[0]
    asked = Request("c", prompt, (("with", 1.0),), stopping=NO_TOKENS, pooling=Pooling.CLS, through_head=True)
    expected = peft_classify(tmp_path / "base", tmp_path / "with", 3, prompt)
    assert torch.allclose(vectors(server, [asked])[0], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(InvalidAdapter, match=r"has no weights in this base's checkpoint, and the file holds none"):
        server.store.create(NewAdapter("without", f"file:{tmp_path / 'without'}"))


def test_an_adapter_of_the_backbone_alone_gives_vectors(tmp_path: Path) -> None:
    make_encoder("roberta", tmp_path / "base")
    backbone = AutoModel.from_pretrained(tmp_path / "base", attn_implementation="eager", add_pooling_layer=False)
    settings = {"task_type": "FEATURE_EXTRACTION", "target_modules": LINEAR["roberta"]}
    make_adapter(backbone, tmp_path / "vectors", **settings)
    server = Harness(tmp_path / "base", {"vectors": tmp_path / "vectors"}, kv_tokens=None)
    prompt = prompts(1)[0]
    asked = Request("e", prompt, (("vectors", 1.0),), stopping=NO_TOKENS, pooling=Pooling.CLS)
    with torch.inference_mode():
        tuned = PeftModel.from_pretrained(backbone, tmp_path / "vectors")
        expected = tuned(input_ids=torch.tensor([prompt])).last_hidden_state[0, 0]
    assert torch.allclose(vectors(server, [asked])[0], expected, atol=1e-4, rtol=1e-4)
