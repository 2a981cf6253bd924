"""Encoders: one vector a prompt, and labels' logits of it, as transformers gives them; alone and mixed, to the bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from encoders import ENCODERS, POSITIONS, hidden_of, make_encoder, own_logits
from harness import Harness
from tiny import VOCAB
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from weft.errors import InvalidConfig, InvalidModel, InvalidRequest, Unsupported
from weft.server.engine.request import Pooling, Request, Stopping

LENGTHS = (40, 1, 23, 2, POSITIONS, 7, 90, 65)
NO_TOKENS = Stopping(max_tokens=0)
LIKE_THEM = ["xlm-roberta", "camembert", "electra", "ernie", "data2vec-text", "gte", "nomic_bert", "jina_embeddings_v3"]


@pytest.fixture(scope="module", params=ENCODERS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return make_encoder(request.param, folder, num_labels=3), folder


def start(folder: Path, **engine: object) -> Harness:
    return Harness(folder, **{"kv_tokens": None, "max_batch_tokens": 300, **engine})


@pytest.fixture(scope="module")
def harness(base: tuple[PreTrainedModel, Path]) -> Harness:
    return start(base[1])


def prompts() -> list[tuple[int, ...]]:
    rng = random.Random(0)
    return [tuple(rng.randrange(3, VOCAB) for _ in range(length)) for length in LENGTHS]


def embed(prompt: tuple[int, ...], pooling: Pooling) -> Request:
    return Request("embed", prompt, stopping=NO_TOKENS, pooling=pooling)


def classify(harness: Harness, prompt: tuple[int, ...]) -> Request:
    pooling = harness.engine.limits.abilities.class_pooling
    return Request("classify", prompt, stopping=NO_TOKENS, pooling=pooling, through_head=True)


def vectors(harness: Harness, requests: list[Request]) -> list[torch.Tensor]:
    answers = harness.run(requests)
    assert all(answer.vector is not None for answer in answers), answers
    return [answer.vector for answer in answers if answer.vector is not None]


def test_vectors_and_logits_are_those_of_transformers_in_one_batch(
    base: tuple[PreTrainedModel, Path], harness: Harness
) -> None:
    asked = [[classify(harness, prompt), *(embed(prompt, pooling) for pooling in Pooling)] for prompt in prompts()]
    made = vectors(harness, [request for each in asked for request in each])
    for index, prompt in enumerate(prompts()):
        hidden = hidden_of(base[0], prompt)
        pooled = {Pooling.LAST: hidden[-1], Pooling.MEAN: hidden.mean(0), Pooling.CLS: hidden[0]}
        expected = [own_logits(base[0], prompt), *(pooled[pooling] for pooling in Pooling)]
        for mine, theirs in zip(made[4 * index : 4 * index + 4], expected, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4)


def test_they_are_the_same_to_the_bit_alone_and_mixed(base: tuple[PreTrainedModel, Path], harness: Harness) -> None:
    requests = [classify(harness, prompt) for prompt in prompts()]
    requests += [embed(prompt, Pooling.MEAN) for prompt in prompts()]
    alone = [vectors(harness, [request])[0] for request in requests]
    for server in (harness, start(base[1], max_batch_tokens=POSITIONS, max_running_requests=3, threads=2)):
        together = vectors(server, requests)
        assert all(torch.equal(mine, other) for mine, other in zip(together, alone, strict=True))


def test_in_bfloat16_too(base: tuple[PreTrainedModel, Path]) -> None:
    server = start(base[1], dtype="bfloat16")
    requests = [classify(server, prompt) for prompt in prompts()]
    together = vectors(server, requests)
    assert all(torch.equal(vectors(server, [asked])[0], mine) for asked, mine in zip(requests, together, strict=True))
    expected = torch.stack([own_logits(base[0], prompt) for prompt in prompts()])
    assert (torch.stack(together) - expected).norm() < 0.1 * expected.norm()


def test_without_the_c_library_too(base: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_NATIVE", "0")
    server = start(base[1])
    made = vectors(server, [classify(server, prompt) for prompt in prompts()])
    expected = [own_logits(base[0], prompt) for prompt in prompts()]
    assert all(torch.allclose(mine, other, atol=1e-4, rtol=1e-4) for mine, other in zip(made, expected, strict=True))


def test_a_prompt_is_run_in_one_step_and_leaves_nothing(harness: Harness) -> None:
    answers = [harness.submit(classify(harness, prompt)) for prompt in prompts()[:4]]
    harness.step()
    assert all(answer.ended for answer in answers)
    assert harness.engine._scheduler.pool.num_free == harness.engine._scheduler.pool.capacity


def test_a_step_takes_prompts_whole_as_long_as_they_fit(base: tuple[PreTrainedModel, Path]) -> None:
    server = start(base[1], max_batch_tokens=POSITIONS)
    asked = [embed(prompt, Pooling.MEAN) for prompt in prompts()]  # 40 + 1 + 23 + 2 tokens, then all there can be
    answers = [server.submit(request) for request in asked]
    for ended in (4, 5, 7, 8):
        server.step()
        assert [answer.ended for answer in answers] == [True] * ended + [False] * (len(asked) - ended)


def test_what_has_no_place_is_refused_by_name(base: tuple[PreTrainedModel, Path], harness: Harness) -> None:
    assert harness.info.context_length == POSITIONS
    with pytest.raises(InvalidRequest, match=f"has {POSITIONS + 1} tokens; at most {POSITIONS} fit"):
        harness.submit(embed((5,) * (POSITIONS + 1), Pooling.CLS))
    with pytest.raises(Unsupported, match="is an encoder, which gives no text and no scores"):
        harness.submit(Request("generate", (5, 6)))
    with pytest.raises(Unsupported, match="is an encoder, which gives no text and no scores"):
        harness.submit(Request("score", (5, 6), stopping=NO_TOKENS, prompt_logprobs_from=1))
    with pytest.raises(InvalidConfig, match=r"--kv-tokens is 256; .* keeps no KV cache: leave the option out"):
        start(base[1], kv_tokens=256)


def test_a_shorter_context_is_a_smaller_step(base: tuple[PreTrainedModel, Path]) -> None:
    server = start(base[1], context_length=32, max_batch_tokens=16)
    assert server.info.context_length == 32
    assert len(vectors(server, [embed(prompts()[0][:32], Pooling.CLS)])) == 1


def test_the_start_says_what_it_is(base: tuple[PreTrainedModel, Path], harness: Harness) -> None:
    line = harness.info.startup_line
    assert line.startswith(f"{type(base[0]).__name__} in float32 on cpu")
    assert f"an encoder: no KV cache, prompts up to {POSITIONS}" in line
    assert harness.info.kv_tokens == 0


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])
@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert"])
def test_a_checkpoint_without_a_classifier_gives_vectors(kind: str, auto: type, tmp_path: Path) -> None:
    model = make_encoder(kind, tmp_path, auto)
    server = start(tmp_path)
    prompt = prompts()[0]
    (made,) = vectors(server, [embed(prompt, Pooling.MEAN)])
    assert torch.allclose(made, hidden_of(model, prompt).mean(0), atol=1e-4, rtol=1e-4)
    assert server.engine._model.own_head is None


@pytest.mark.parametrize("kind", [*LIKE_THEM])
def test_what_is_built_like_them_is_served_too(kind: str, tmp_path: Path) -> None:
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip("a class of later versions of transformers")
    model = make_encoder(kind, tmp_path, intermediate_size=96, max_position_embeddings=POSITIONS)
    server = start(tmp_path)
    made = vectors(server, [classify(server, prompt) for prompt in prompts()[:3]])
    for mine, prompt in zip(made, prompts(), strict=False):
        assert torch.allclose(mine, own_logits(model, prompt), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_that_lacks_more_is_refused(tmp_path: Path) -> None:
    make_encoder("bert", tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    with pytest.raises(InvalidModel, match=r"lacks 16 weights of its model, bert.encoder.layer.3"):
        start(tmp_path)


def test_mean_is_found_where_the_class_pools_by_it(tmp_path: Path) -> None:
    model = make_encoder("modernbert", tmp_path, classifier_pooling="mean")
    server = start(tmp_path)
    assert server.engine.limits.abilities.class_pooling is Pooling.MEAN
    (made,) = vectors(server, [classify(server, prompts()[0])])
    assert torch.allclose(made, own_logits(model, prompts()[0]), atol=1e-4, rtol=1e-4)


def test_an_encoder_that_was_made_a_decoder_generates(tmp_path: Path) -> None:
    make_encoder("bert", tmp_path, AutoModelForCausalLM, is_decoder=True)
    answers = Harness(tmp_path).run([Request("generate", (5, 6), stopping=Stopping(max_tokens=3, ignore_eos=True))])
    assert len(answers[0].ids) == 3


@pytest.mark.parametrize(("kind", "why"), [("albert", "attends twice"), ("fnet", "attention interface")])
def test_a_class_that_can_not_be_served_is_refused_in_one_line(kind: str, why: str, tmp_path: Path) -> None:
    make_encoder(kind, tmp_path)
    with pytest.raises(InvalidModel, match=why):
        start(tmp_path)
