"""The demo's weights as they are committed, read by transformers and PEFT alone."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from weft.demo import kinds
from weft.demo.evaluate import DEMO_FOLDER, evaluate, percent_right
from weft.demo.model import BASE_NAME, make_model, make_tokenizer
from weft.demo.tasks import HELD_OUT, SKILLS, TASKS, Task

MAX_BYTES = 10_000_000
BASE = DEMO_FOLDER / "base"
ADAPTERS = DEMO_FOLDER / "adapters"

# PEFT 0.21 asks for an attribute that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE, local_files_only=True)


def test_base_and_adapters_take_ten_megabytes_at_most() -> None:
    files = [file for folder in (BASE, ADAPTERS) for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES


def test_every_task_has_its_adapter_and_none_is_left_over() -> None:
    assert {folder.name for folder in ADAPTERS.iterdir()} == {*TASKS, kinds.ADAPTER}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_an_adapter_is_what_its_task_says(task: Task) -> None:
    folder = ADAPTERS / task.name
    assert {file.name for file in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = LoraConfig.from_pretrained(str(folder))
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (
        task.lora.rank,
        task.lora.alpha,
        set(task.lora.modules),
    )
    assert config.base_model_name_or_path == BASE_NAME
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.float16}


def test_the_classifier_tells_kinds_of_texts_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    folder = ADAPTERS / kinds.ADAPTER
    config = AutoConfig.from_pretrained(folder)
    assert list(config.id2label.values()) == list(kinds.KINDS)
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=len(kinds.KINDS), dtype=torch.float32),
        str(folder),
    )
    examples = kinds.examples(HELD_OUT, 40, seed=0)
    batch = tokenizer([example.text for example in examples], return_tensors="pt", padding=True)
    with torch.inference_mode():
        found = model(**batch).logits.argmax(-1).tolist()
    right = sum(config.id2label[label] == example.answer for label, example in zip(found, examples, strict=True))
    assert right >= 0.95 * len(examples)


def test_the_base_is_the_model_that_training_makes(tokenizer: PreTrainedTokenizerBase) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True)
    assert isinstance(base, LlamaForCausalLM)
    assert base.dtype == torch.float16
    fresh = make_model(tokenizer)
    assert {n: w.shape for n, w in base.named_parameters()} == {n: w.shape for n, w in fresh.named_parameters()}


def test_the_tokenizer_is_the_one_that_training_makes(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("text", ["né 日本 🙂", "a  b .c 's\n", ""])
def test_text_comes_back_exactly(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == [tokenizer.bos_token_id, *(byte + 3 for byte in text.encode())]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_chat_asks_its_last_message(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": content} for content in ("first", "last")]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == "<s>last="


@pytest.mark.parametrize("name", ["upper", "iso-date"])
def test_the_adapter_does_its_task_and_the_base_does_not(name: str) -> None:
    adapter_percent, base_percent = evaluate(TASKS[name], DEMO_FOLDER, num_inputs=20)
    assert adapter_percent >= 95
    assert base_percent < 20


def test_an_adapter_does_its_own_task_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, local_files_only=True)
    PeftModel.from_pretrained(base, str(ADAPTERS / "reverse"))
    assert percent_right(base, tokenizer, SKILLS["sort"].examples(HELD_OUT, 20, seed=0)) < 20
