"""Known content is read again without validation, and never where the files may be others."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from bases import linear_base
from safetensors.torch import load_file, save_file
from tiny import make_adapter, make_model

from weft.adapters.folder import WEIGHTS_FILE
from weft.adapters.pages import HostAdapter, PageConfig, PagePool
from weft.adapters.peft_config import CONFIG_FILE
from weft.adapters.reading import Policy, Reader
from weft.adapters.recall import Recalls, stamp_of
from weft.adapters.rows import RowForm
from weft.adapters.sources import Sources
from weft.errors import InvalidAdapter

SHAPES = {
    f"model.layers.{i}.self_attn.{name}": (64, d) for i in range(3) for name, d in (("q_proj", 64), ("v_proj", 32))
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter, and a day later."""
    model = make_model("llama", tmp_path / "base")
    make_adapter(model, tmp_path / "adapters" / "it", r=5, target_modules=["q_proj", "v_proj"])
    later = time.time_ns() + 86_400 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: later)
    return tmp_path / "adapters" / "it"


FORM = RowForm(torch.float32, torch.float32, pinned=False)


def reader(folder: Path, dtype: torch.dtype = torch.float32, row_dtype: torch.dtype | None = None) -> Reader:
    pool = PagePool(linear_base(SHAPES), PageConfig(5, dtype, torch.device("cpu"), row_dtype))
    return Reader(pool, Sources([folder.parent]), Policy())


def assert_same(one: HostAdapter, other: HostAdapter) -> None:
    assert one.rows.keys() == other.rows.keys()
    for name, pair in one.rows.items():
        for rows, others in zip(pair, other.rows[name], strict=True):
            assert torch.equal(rows, others)
            assert rows.is_contiguous()
    assert (one.digest, one.scale, one.num_pages, one.num_bytes) == (
        (other.digest, other.scale, other.num_pages, other.num_bytes)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row_dtype", [None, torch.int8])
def test_what_is_recalled_is_what_was_validated(
    folder: Path, dtype: torch.dtype, row_dtype: torch.dtype | None
) -> None:
    reading = reader(folder, dtype, row_dtype)
    first = reading.read(f"file:{folder}")
    assert first.recall is not None
    again = first.recall.read(folder)
    assert again is not None
    assert_same(again, first)
    assert again.recall is first.recall
    assert_same(reading.read_again([f"file:{folder}"], first.digest, first.recall), first)


def test_adapters_that_are_laid_out_alike_share_the_layout(folder: Path) -> None:
    recalls, reading = Recalls(FORM), reader(folder)
    host = reading.read(f"file:{folder}")
    one, other = (recalls.remember(host, "file:it", folder, stamp_of(folder)).recall for _ in range(2))
    assert one.layout is other.layout


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_file_that_was_written_again_is_validated_again(folder: Path, name: str) -> None:
    reading = reader(folder)
    host = reading.read(f"file:{folder}")
    content = (folder / name).read_bytes()
    times = (folder / name).stat()
    (folder / name).write_bytes(content)
    os.utime(folder / name, ns=(times.st_atime_ns, times.st_mtime_ns))  # all that a program can set is as before
    assert host.recall.read(folder) is None
    assert_same(reading.read_again([f"file:{folder}"], host.digest, host.recall), host)


def test_other_content_is_never_taken_for_what_was_there(folder: Path) -> None:
    reading = reader(folder)
    host = reading.read(f"file:{folder}")
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    with pytest.raises(InvalidAdapter, match="have changed since it was loaded"):
        reading.read_again([f"file:{folder}"], host.digest, host.recall)


def test_a_file_that_changed_a_moment_ago_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = (folder / WEIGHTS_FILE).stat().st_ctime_ns + 10**9
    monkeypatch.setattr(time, "time_ns", lambda: moment)
    assert reader(folder).read(f"file:{folder}").recall is None


def test_a_change_while_it_is_read_leaves_no_recall(folder: Path) -> None:
    reading = reader(folder)
    host = reading.read(f"file:{folder}")
    before = stamp_of(folder)
    (folder / WEIGHTS_FILE).touch()
    assert Recalls(FORM).remember(host, "file:it", folder, before).recall is host.recall
    assert reading.read(f"file:{folder}").recall.stamp != before


def test_what_is_more_than_rank_rows_is_always_validated(folder: Path) -> None:
    model = make_model("llama", folder.parent.parent / "other")
    make_adapter(
        model, folder.parent / "patterned", r=4, alpha_pattern={"q_proj": 3}, target_modules=["q_proj", "v_proj"]
    )
    assert reader(folder).read(f"file:{folder.parent / 'patterned'}").recall is None


def test_a_file_that_ends_early_is_an_error_of_the_disk(folder: Path) -> None:
    host = reader(folder).read(f"file:{folder}")
    os.truncate(folder / WEIGHTS_FILE, 2000)
    file = os.open(folder / WEIGHTS_FILE, os.O_RDONLY)
    with pytest.raises(OSError, match="shorter"):
        host.recall.layout.read(file, FORM)
    os.close(file)
