"""Every method trains, and a server answers with what it made as PEFT would."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from peft import PeftModel
from serving import served
from training_runs import judged, losses, make_base, shouted, trained, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from weft.errors import InvalidConfig, InvalidData
from weft.making.config import Columns
from weft.making.distilling import distillation_loss
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import inference_pb2 as pb2
from weft.v1 import inference_pb2_grpc

PROMPT = "tiger cloud="
TEACHER_PROMPT = "Say it in capital letters: "
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"method": {"name": "rslora"}},
    "dora": {"method": {"name": "dora"}},
    "lora-plus": {"method": {"name": "lora+"}},
    "head": {"method": {"name": "head"}},
    "important": {"method": {"modules": "importance:4"}},
    "expression": {"method": {"modules": r".*\.(0|2)\.self_attn\.[qv]_proj"}},
    "prompted": {"method": {"name": "distill"}, "distill": {"prompt": TEACHER_PROMPT}},
    "taught": {"method": {"name": "distill"}, "distill": {"adapter": "lora", "temperature": 2.0, "label_weight": 0.5}},
}

CLASSIFIERS: Mapping[str, Mapping[str, Any]] = {
    "judge": {},
    "judge-head": {"method": {"name": "head"}, "data": {"template": "Text: {text} Verdict:"}},
    "judge-dora": {"method": {"name": "dora", "modules": "importance:3"}},
    "judge-several": {"data": {"columns": Columns(label="labels")}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `prompts.jsonl`, and `adapters/` with one of each method."""
    folders = tmp_path_factory.mktemp("methods")
    base = make_base(folders / "base")
    prompts = write_rows(folders / "prompts.jsonl", shouted(16))
    for name, settings in METHODS.items():
        distill = dict(settings.get("distill", {}))
        if "adapter" in distill:
            distill["adapter"] = str(folders / "adapters" / distill["adapter"])
        trained(base, prompts, folders / "adapters" / name, **{**settings, "distill": distill})
    rows = [row | {"labels": [row["label"], "any"]} for row in judged(16)]
    texts = write_rows(folders / "texts.jsonl", rows)
    for name, settings in CLASSIFIERS.items():
        trained(base, texts, folders / "adapters" / name, **settings)
    return folders


@pytest.fixture(scope="module")
def stub(folders: Path) -> Iterator[inference_pb2_grpc.InferenceServiceStub]:
    config = ServerConfig(
        model=ModelConfig(str(folders / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(max_batch_tokens=64, max_running_requests=8, kv_tokens=4096, adapter_pages=64),
        port=0,
        metrics_port=0,
        adapters=folders / "adapters",
    )
    with served(config) as server, grpc.insecure_channel(server.address) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.mark.parametrize("name", METHODS)
def test_what_each_method_makes_is_served_as_peft_would(
    folders: Path, stub: inference_pb2_grpc.InferenceServiceStub, name: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    base = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    model = PeftModel.from_pretrained(base, folders / "adapters" / name).eval()
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, -1].log_softmax(-1)

    request = pb2.GenerateRequest(
        adapter_id=name,
        text=PROMPT,
        stopping=pb2.Stopping(max_tokens=1, ignore_eos=True),
        output=pb2.Output(top_logprobs=1),
    )
    token = stub.Generate(request).tokens[0]
    assert token.id == logits.argmax()
    assert token.logprob == pytest.approx(logits.max().item(), abs=1e-4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_is_served_as_peft_would(
    folders: Path, stub: inference_pb2_grpc.InferenceServiceStub, name: str
) -> None:
    text = CLASSIFIERS[name].get("data", {}).get("template", "{text}").format(text="lemon: nice")
    labels = ["any", "bad", "nice"] if name == "judge-several" else ["bad", "nice"]
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folders / "base", num_labels=len(labels))
    model = PeftModel.from_pretrained(base, folders / "adapters" / name).eval()
    with torch.inference_mode():
        logits = model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits[0]

    scores = stub.Classify(pb2.ClassifyRequest(adapter_id=name, text=text)).scores
    assert [score.label for score in scores] == labels
    assert [score.logit for score in scores] == pytest.approx(logits.tolist(), abs=1e-4)
    chances = logits.sigmoid() if name == "judge-several" else logits.softmax(-1)
    assert [score.score for score in scores] == pytest.approx(chances.tolist(), abs=1e-4)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "prompted"])
def test_each_method_learns(folders: Path, name: str) -> None:
    found = losses(folders / "adapters" / name)
    assert min(found[-2:]) < found[0]


def test_a_prompt_is_learnt_by_what_it_does_to_the_answers(folders: Path, tmp_path: Path) -> None:
    """The student without the prompt comes near the teacher with it, whatever the labels say."""
    settings = METHODS["prompted"] | {"loop": {"max_steps": 40}}
    made = trained(folders / "base", folders / "prompts.jsonl", tmp_path / "made", **settings)
    found = losses(made)
    assert sum(found[-5:]) / 5 < 0.3 * found[0]


@pytest.mark.parametrize(
    "row", [{"prompt": "river="}, {"messages": [{"role": "user", "content": "river="}]}], ids=["prompt", "chat"]
)
def test_answers_that_the_data_lacks_are_the_teachers_own(folders: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    """Those that it gives greedily, so with them written down the training is the same."""
    settings: dict[str, Any] = {"method": {"name": "distill"}, "distill": {"prompt": "Loud: ", "max_answer": 4}}
    data = write_rows(tmp_path / "asked.jsonl", [row, {**row}] * 4)
    asked = trained(folders / "base", data, tmp_path / "asked", **settings)

    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    teacher = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    if "prompt" in row:
        ids = tokenizer(f"Loud: {row['prompt']}", return_tensors="pt")["input_ids"]
    else:
        told = [{"role": "system", "content": "Loud: "}, *row["messages"]]
        text = tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    made = teacher.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    answer = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    if "prompt" in row:
        whole: dict[str, Any] = {**row, "completion": answer}
    else:
        whole = {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}
    given = trained(folders / "base", write_rows(tmp_path / "given.jsonl", [whole] * 8), tmp_path / "given", **settings)
    assert losses(asked) == losses(given)


def test_distillation_is_kl_and_cross_entropy() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(5, 7), torch.randn(5, 9), torch.randint(7, (5,))
    p, q = (torch.softmax(logits[:, :7] / 2, -1) for logits in (teacher, student))
    kl = (p * (p / q).log()).sum() * 4
    ce = -student.log_softmax(-1)[range(5), labels].sum()
    assert distillation_loss(student, teacher, labels, 2.0, 0.25).item() == pytest.approx(
        (0.75 * kl + 0.25 * ce).item(), rel=1e-5
    )


def test_a_teacher_of_another_vocabulary_is_refused(folders: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    settings = {"method": {"name": "distill"}, "distill": {"model": str(other)}}
    with pytest.raises(InvalidConfig, match="has another vocabulary than the model"):
        trained(folders / "base", folders / "prompts.jsonl", tmp_path / "made", **settings)


def test_what_is_too_long_with_the_teachers_prompt_is_refused(folders: Path, tmp_path: Path) -> None:
    settings = {"method": {"name": "distill"}, "distill": {"prompt": "x" * 250}}
    with pytest.raises(
        InvalidData, match=r"prompts.jsonl:1: has \d+ tokens with the teacher's prompt; the context is 256"
    ):
        trained(folders / "base", folders / "prompts.jsonl", tmp_path / "made", **settings)
