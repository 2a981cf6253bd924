"""`weft train` is peft and the Trainer, and what it writes is what they trained."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from training_runs import judged, losses, make_base, recipe, shouted, trained, write_rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from weft.errors import InvalidConfig, WeftError
from weft.making.training import train

IGNORED = -100


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", shouted(20))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "texts.jsonl", judged(24))


def test_it_is_a_plain_script_of_peft_and_trainer(base: Path, prompts: Path, tmp_path: Path) -> None:
    """Same seed, same losses, same weights."""
    made = trained(base, prompts, tmp_path / "made", loop={"accumulate": 2, "warmup": 2, "weight_decay": 0.1}, seed=5)

    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = []
    for line in prompts.read_text().splitlines():
        row = json.loads(line)
        asked = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        examples.append({"input_ids": asked + answer, "labels": [IGNORED] * len(asked) + answer})

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids, labels = ([torch.tensor(each[key]) for each in batch] for key in ("input_ids", "labels"))
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(each) for each in ids], True)
        return {"input_ids": pad(ids, True), "attention_mask": mask, "labels": pad(labels, True, IGNORED)}

    set_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=2,
        seed=5,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, collate, examples)
    trainer.train()

    assert losses(made) == [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = load_file(made / "adapter_model.safetensors")
    plain = {name.replace(".default", ""): weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[name], plain[name]) for name in plain)


def test_what_it_leaves_is_told(base: Path, prompts: Path, tmp_path: Path) -> None:
    made = trained(base, prompts, tmp_path / "made")
    assert {path.name for path in made.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.json",
        "loss.png",
        "README.md",
    }
    digest = f"sha256:{hashlib.sha256(prompts.read_bytes()).hexdigest()}"
    metrics = json.loads((made / "metrics.json").read_text())
    assert (metrics["steps"], metrics["examples"], metrics["data_digest"]) == (6, 20, digest)
    assert metrics["settings"]["method.rank"] == 4
    card = (made / "README.md").read_text()
    assert digest in card
    assert "    weft train\n" in card
    assert list(tmp_path.iterdir()) == [made], "no checkpoint stays behind"


def test_a_classifier_says_its_labels(base: Path, texts: Path, tmp_path: Path) -> None:
    made = trained(base, texts, tmp_path / "made", data={"eval_share": 0.25}, loop={"max_steps": 30, "eval_every": 10})
    config = json.loads((made / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "nice"}
    assert config["problem_type"] == "single_label_classification"
    assert losses(made, "eval_accuracy")[-1] == 1.0

    tokenizer = AutoTokenizer.from_pretrained(base)
    served = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), made)
    for place, label in enumerate(("bad", "nice")):
        ids = tokenizer(f"lemon: {label}", return_tensors="pt")["input_ids"]
        assert served(input_ids=ids).logits.argmax().item() == place


def test_several_labels_are_learnt_each_by_itself(base: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": [row["label"], "any"]} for row in judged(12)]
    data = write_rows(tmp_path / "data.jsonl", rows)
    made = trained(base, data, tmp_path / "made", loop={"accumulate": 2})
    assert json.loads((made / "config.json").read_text())["problem_type"] == "multi_label_classification"
    assert losses(made)[-1] < losses(made)[0]


def test_it_stops_early_and_keeps_the_best(base: Path, prompts: Path, tmp_path: Path) -> None:
    loop = {"max_steps": 40, "learning_rate": 0.5, "eval_every": 2, "early_stop": 2, "schedule": "constant"}
    made = trained(base, prompts, tmp_path / "made", data={"eval_share": 0.2}, loop=loop)
    metrics = json.loads((made / "metrics.json").read_text())
    evaluated = losses(made, "eval_loss")
    assert metrics["best_step"] == 2 * (evaluated.index(min(evaluated)) + 1)
    assert metrics["steps"] == metrics["best_step"] + 4 < 40


def test_the_most_important_modules_are_those_with_the_largest_gradients(
    base: Path, prompts: Path, tmp_path: Path
) -> None:
    made = trained(base, prompts, tmp_path / "made", method={"modules": "importance:3"})
    chosen = json.loads((made / "adapter_config.json").read_text())["target_modules"]

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    totals: dict[str, torch.Tensor] = {}
    for line in prompts.read_text().splitlines()[:16]:
        row = json.loads(line)
        asked = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        text = f"{row['prompt']}{row['completion']}<eos>"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : asked.shape[1]] = IGNORED
        model(input_ids=ids, labels=labels).loss.backward()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert module.weight.grad is not None
            totals[name] = module.weight.grad.norm()
    assert set(chosen) == set(sorted(totals, key=lambda name: -totals[name])[:3])


def test_layers_may_be_chosen(base: Path, prompts: Path, tmp_path: Path) -> None:
    made = trained(base, prompts, tmp_path / "made", method={"layers": (1,)})
    assert {name.split(".")[4] for name in load_file(made / "adapter_model.safetensors")} == {"1"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": {"modules": "q_prj"}}, "--modules names 'q_prj', which the model has not; its linear modules are"),
        ({"method": {"modules": "(q"}}, "which is no regular expression"),
        ({"method": {"modules": r".*\d\.none"}}, "can't be trained"),
        ({"method": {"modules": r".*q_proj$", "layers": (0,)}}, "put the layers into the expression"),
        ({"method": {"modules": "importance:99"}}, "asks for more than the 21 modules"),
        ({"method": {"layers": (3,)}}, "--layers names 3; the model has the layers 0 to 2"),
        ({"data": {"eval_share": 0.01}}, "leaves none to train or to evaluate on"),
        ({"data": {"max_length": 999}}, "--max-length is 999; the model's context is 256"),
        ({"precision": "float16"}, "--precision float16 needs a GPU"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(
    base: Path, prompts: Path, tmp_path: Path, settings: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        train(recipe(base, prompts, tmp_path / "made", **settings), "weft train")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": {"name": "distill"}}, "--method distill needs a teacher"),
        ({"method": {"modules": "importance:x"}}, "must be importance:N"),
        ({"loop": {"eval_every": 2}}, "--eval-every needs something to evaluate on"),
        ({"loop": {"early_stop": 2}}, "--early-stop goes by evaluations"),
        ({"data": {"template": "x"}}, "must hold {text}"),
        ({"data": {"labels": ("a", "a")}}, "--labels names one twice"),
        ({"data": {"eval_share": 0.1, "eval_files": (Path("x"),)}}, "choose one"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        recipe(Path("base"), Path("data"), Path("made"), **settings)  # type: ignore[arg-type]


def test_a_training_that_comes_apart_ends(base: Path, prompts: Path, tmp_path: Path) -> None:
    loop = {"learning_rate": 1e30, "clip": 0.0}
    with pytest.raises(WeftError, match=r"the loss is nan at step [0-9]+: lower --learning-rate"):
        train(recipe(base, prompts, tmp_path / "made", loop=loop), "weft train")
    assert not (tmp_path / "made").exists()
