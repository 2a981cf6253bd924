"""Bottleneck adapters served, against AdapterHub's own library: alone, and in one batch with other kinds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from adapterhub import FOLDER, LOGITS, PROMPT, make_plain
from harness import Harness
from natives import builds
from safetensors.torch import load_file
from tiny import linear_names, make_adapter, make_model, peft_logits, save_tokenizer

from weft.errors import InvalidRequest
from weft.making.adapterhub import convert
from weft.server.config import ModelConfig
from weft.server.engine.model import load_model
from weft.server.engine.request import Request, Stopping


@dataclass
class Case:
    """A base with every converted adapter, a LoRA, a DoRA, and what each should give."""

    harness: Harness
    expected: dict[str | None, torch.Tensor]

    def logits(self, names: list[str | None], chunk: int = 64) -> list[torch.Tensor]:
        return self.harness.logits([request(name) for name in names], chunk)


def request(*names: str | None, max_tokens: int = 1) -> Request:
    mix = tuple((name, 1.0) for name in names if name is not None)
    return Request("r", PROMPT, mix, stopping=Stopping(max_tokens=max_tokens, ignore_eos=True))


def make_case(kind: str, root: Path, dtype: str = "float32") -> Case:
    model = make_plain(kind)
    model.save_pretrained(root / "base")
    save_tokenizer(root / "base")
    expected: dict[str | None, torch.Tensor] = dict(load_file(FOLDER / kind / LOGITS))
    for name in list(expected):
        convert(FOLDER / kind / str(name), root / str(name))
    for name, use_dora in (("lora", False), ("dora", True)):
        make_adapter(model, root / name, r=4, target_modules=linear_names(kind)[:2], use_dora=use_dora)
        expected[name] = peft_logits(model, root / name, [PROMPT])[0]
    served = {str(name): root / str(name) for name in expected}
    expected[None] = peft_logits(model, None, [PROMPT])[0]
    return Case(Harness(root / "base", served, adapter_pages=256, kv_tokens=512, dtype=dtype), expected)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("chunk", [64, 2])
def test_each_gives_what_its_library_gives_in_one_mixed_batch(case: Case, chunk: int) -> None:
    names = list(case.expected)
    for name, made in zip(names, case.logits(names, chunk), strict=True):
        expected = case.expected[name]
        assert float((made - expected).norm() / expected.norm()) < 1e-4, name


def test_so_does_pytorch_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_NATIVE", "0")
    test_each_gives_what_its_library_gives_in_one_mixed_batch(make_case("llama", tmp_path), chunk=3)


@pytest.mark.parametrize(("kind", "ends"), [("qwen3", ["self_attn.o_proj", "mlp.down_proj"]), ("gemma3_text", [])])
def test_the_modules_that_end_a_sub_layer_are_found_where_nothing_is_done_to_what_they_give(
    kind: str, ends: list[str], tmp_path: Path
) -> None:
    make_model(kind, tmp_path)
    residuals = load_model(ModelConfig(str(tmp_path), device="cpu")).base.residuals
    assert list(residuals) == [f"model.layers.{layer}.{end}" for layer in range(3) for end in ends]


def test_every_adapter_moves_the_logits(case: Case) -> None:
    base = case.expected[None]
    moved = {name: float((logits - base).norm() / base.norm()) for name, logits in case.expected.items()}
    assert all(far > 1e-2 for name, far in moved.items() if name), moved


@pytest.mark.skipif(not builds(), reason="the C library was not built")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_or_mixed_in_any_chunks_is_the_same_to_the_bit(dtype: str, tmp_path: Path) -> None:
    case = make_case("llama", tmp_path, dtype)
    names = list(case.expected)
    for name, mixed in zip(names, case.logits([*names, *names], chunk=3), strict=False):
        assert torch.equal(case.logits([name])[0], mixed), name


def test_decoding_mixed_gives_the_tokens_of_decoding_alone(case: Case) -> None:
    requests = [request(name, max_tokens=12) for name in case.expected]
    alone = [case.harness.run([each])[0].ids for each in requests]
    assert [answer.ids for answer in case.harness.run(requests, list(range(len(requests))))] == alone


def test_they_are_proven_at_loading_and_told_of(case: Case) -> None:
    (info,) = (info for info in case.harness.store.list() if info.name == "houlsby")
    assert info.probe_error is not None
    assert 0 < info.probe_error < 1e-5
    assert info.ranks == (2,)
    report = case.harness.store.inspect(info.source)
    assert {module.kind for module in report.modules} == {"linear: bottleneck of 2"}
    assert [module.num_pages for module in report.modules] == [0] * 4
    assert report.num_pages > 0


def test_no_weighted_mix_takes_one(case: Case) -> None:
    with pytest.raises(InvalidRequest, match="pfeiffer-both"):
        case.harness.store.acquire_all(request("lora", "pfeiffer-both").adapters)
