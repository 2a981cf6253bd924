"""Folders of AdapterHub's library, converted or refused; server/engine/test_bottlenecks.py has them served."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterhub import FOLDER
from safetensors.torch import load_file, save_file

from weft.adapters.bottlenecks import BottleneckConfig, parse_bottleneck
from weft.errors import InvalidAdapter, InvalidConfig
from weft.kernels.bottleneck import Reads
from weft.making.adapterhub import convert

ATTENTION, MLP = "self_attn.o_proj", "mlp.down_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Pfeiffer adapter of both sub-layers with learned scales, to be changed."""
    return Path(shutil.copytree(FOLDER / "llama" / "pfeiffer-both", tmp_path / "hub"))


def set_fields(folder: Path, top: bool = False, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    (config if top else config["config"]).update(fields)
    path.write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pfeiffer", BottleneckConfig("relu", Reads.SUM, (MLP,), ())),
        ("pfeiffer-both", BottleneckConfig("gelu", Reads.SUM, (ATTENTION, MLP), ())),
        ("houlsby", BottleneckConfig("silu", Reads.OUTPUT, (ATTENTION, MLP), ())),
        ("parallel", BottleneckConfig("relu", Reads.RESIDUAL, (MLP,), ())),
        ("parallel-both", BottleneckConfig("tanh", Reads.RESIDUAL, (ATTENTION, MLP), ())),
        ("plus", BottleneckConfig("gelu", Reads.SUM, (MLP,), (f"model.layers.0.{MLP}",))),
        ("pickle", BottleneckConfig("leakyrelu", Reads.SUM, (MLP,), ())),
    ],
)
def test_what_is_written_says_what_the_librarys_config_means(
    name: str, expected: BottleneckConfig, tmp_path: Path
) -> None:
    assert convert(FOLDER / "llama" / name, tmp_path / "made") == expected
    written = json.loads((tmp_path / "made" / "adapter_config.json").read_text())
    assert parse_bottleneck(written, "made") == expected


def test_gpt2s_modules_have_their_own_names(tmp_path: Path) -> None:
    assert convert(FOLDER / "gpt2" / "houlsby", tmp_path / "made").target_modules == ("attn.c_proj", "mlp.c_proj")


def test_the_scale_goes_into_the_up_projection(folder: Path, tmp_path: Path) -> None:
    theirs = load_file(folder / "adapter.safetensors")
    convert(folder, tmp_path / "made")
    made = load_file(tmp_path / "made" / "adapter_model.safetensors")
    old = "model.layers.1.output_adapters.adapters.pfeiffer-both"
    new = f"model.layers.1.{MLP}"
    assert torch.equal(made[f"{new}.down.weight"], theirs[f"{old}.adapter_down.0.weight"])
    scale = theirs[f"{old}.scaling"]
    assert torch.allclose(made[f"{new}.up.weight"], scale * theirs[f"{old}.adapter_up.weight"])
    assert torch.allclose(made[f"{new}.up.bias"], scale * theirs[f"{old}.adapter_up.bias"])


def test_a_bare_models_names_are_those_of_its_class_with_a_head(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "made")
    change_tensors(folder, lambda tensors: rename(tensors, "model.layers.", "layers."))
    convert(folder, tmp_path / "bare")
    whole, bare = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("made", "bare"))
    assert whole.keys() == bare.keys()


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new)] = tensors.pop(name)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"phm_layer": True}, "phm_layer: is set, and Compacter"),
        ({"ln_before": True}, "ln_before: is set, and layer norms"),
        ({"ln_after": True}, "ln_after: is set"),
        ({"inv_adapter": "nice"}, "inv_adapter: is set"),
        ({"cross_adapter": True}, "cross_adapter: is set"),
        ({"use_gating": True}, "use_gating: is set, and its gate is a mean"),
        ({"architecture": "lora"}, "architecture: is set, and only bottleneck"),
        ({"original_ln_after": False}, "lose the residual stream or add it twice"),
        ({"residual_before_ln": False}, "lose the residual stream or add it twice"),
        ({"residual_before_ln": "post_add"}, "lose the residual stream or add it twice"),
        ({"mh_adapter": False, "output_adapter": False}, "one of them true"),
        ({"mh_adapter": "yes"}, "mh_adapter, output_adapter: must be true or false"),
        ({"non_linearity": "quick_gelu"}, "non_linearity: is 'quick_gelu'; must be one of"),
        ({"reduction_factor": 0}, "reduction_factor: is 0; must be a number from 0.01 on"),
        ({"reduction_factor": {"0": 2}}, "adapter_config.json needs [1, 8]"),
        ({"reduction_factor": 8}, "has shape [4, 8]; adapter_config.json needs [1, 8]"),
        ({"scaling": "learnt"}, "scaling: is 'learnt'; must be a number, 'learned' or 'channel'"),
        ({"scaling": 2.0}, "scaling: is nothing that adapter_config.json has there"),
        ({"scaling": "channel"}, "scaling: has shape [1]; adapter_config.json needs [8]"),
        ({"leave_out": ["0"]}, "leave_out: is ['0']; must be a list of layers"),
        ({"leave_out": [0]}, "is nothing that adapter_config.json has there"),
        ({"mh_adapter": False}, "attention_adapters.adapters.pfeiffer-both.scaling: is nothing that"),
        ({"new_trick": 3}, "'new_trick': is set, and not a field that is known here"),
    ],
)
def test_a_field_that_can_not_be_honoured_is_named(
    folder: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    set_fields(folder, **fields)
    with pytest.raises(InvalidAdapter) as caught:
        convert(folder, tmp_path / "made")
    assert words in str(caught.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"model_type": "bert"},
            "model_type: is 'bert'; must be one of gpt2, llama, mistral, whose",
        ),
        ({"version": "3.2.1"}, "version: is '3.2.1': load and save it with AdapterHub's `adapters` first"),
        ({"hidden_size": None}, "hidden_size, name: must be"),
        ({"config": "pfeiffer"}, "config: must hold an object"),
        ({"name": "another"}, "is nothing that adapter_config.json has there"),
        ({"parts": 2}, "'parts': is set"),
    ],
)
def test_so_is_one_beside_the_config(folder: Path, tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    set_fields(folder, top=True, **fields)
    with pytest.raises(InvalidAdapter) as caught:
        convert(folder, tmp_path / "made")
    assert words in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(folder: Path, tmp_path: Path) -> None:
    set_fields(folder, phm_layer=True, non_linearity="?")
    with pytest.raises(InvalidAdapter, match=r"phm_layer: .*; non_linearity: "):
        convert(folder, tmp_path / "made")


def test_a_missing_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    gone = "model.layers.1.output_adapters.adapters.pfeiffer-both.adapter_up.bias"
    change_tensors(folder, lambda tensors: tensors.pop(gone))
    with pytest.raises(InvalidAdapter, match=r"layers\.1\.output_adapters\.adapter_up\.bias: is not in the file"):
        convert(folder, tmp_path / "made")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("head_config.json", "tells of an output head: if it is the base's own, convert with --without-head"),
        ("adapter_fusion_config.json", "neither fusions nor models by interface"),
        ("adapter_interface.json", "neither fusions nor models by interface"),
    ],
)
def test_what_lies_beside_an_adapter_is_not_passed_over(folder: Path, tmp_path: Path, name: str, words: str) -> None:
    (folder / name).write_text("{}")
    with pytest.raises(InvalidAdapter, match=words):
        convert(folder, tmp_path / "made")


def test_a_head_is_left_out_where_that_is_asked(folder: Path, tmp_path: Path) -> None:
    (folder / "head_config.json").write_text("{}")
    convert(folder, tmp_path / "made", without_head=True)
    assert (tmp_path / "made" / "adapter_model.safetensors").exists()


class Opener:
    """Would open a file if it were unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("/dev/null", "w")


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps(Opener()), pickle.dumps([1])])
def test_a_pickle_of_anything_but_tensors_is_refused(folder: Path, tmp_path: Path, content: bytes) -> None:
    (folder / "adapter.safetensors").unlink()
    (folder / "pytorch_adapter.bin").write_bytes(content)
    with pytest.raises(InvalidAdapter, match=r"pytorch_adapter\.bin: is spoilt, or holds more than tensors"):
        convert(folder, tmp_path / "made")


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(InvalidAdapter, match=r"pytorch_adapter\.bin: can't be read: No such file"):
        convert(folder, tmp_path / "made")


def test_nothing_is_written_over(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="which is there already"):
        convert(folder, folder)
