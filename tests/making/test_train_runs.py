"""Runs that are killed and go on, that share their work, and whose disk fills up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from disks import needs_a_disk, on_disk
from training_runs import losses, make_base, recipe, shouted, trained, write_rows
from watchfiles import watch

from weft.errors import InvalidConfig, WeftError
from weft.making.checkpoints import Checkpoints
from weft.making.training import train

WEFT = (sys.executable, "-m", "weft.server.cli")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", shouted(20))


def arguments(base: Path, prompts: Path, output: Path, *options: str) -> list[str]:
    """As `recipe` has it."""
    told = {"model": base, "data": prompts, "output": output, "rank": 4, "alpha": 8, "batch-size": 4}
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    return ["train", *words, "--learning-rate", "0.01", *options]


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)


def killed_after_its_first_checkpoint(command: Sequence[str], checkpoints: Path) -> None:
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        for changes in watch(checkpoints.parent, step=10, debounce=50, recursive=True):
            if any(Path(path).parent == checkpoints and "checkpoint-" in path for _, path in changes):
                break
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(base: Path, prompts: Path, tmp_path: Path) -> None:
    """Losses and weights, with dropout: the random numbers go on too."""
    method, loop = {"dropout": 0.1}, {"max_steps": 80, "save_every": 5, "schedule": "cosine"}
    options = ("--dropout", "0.1", "--max-steps", "80", "--save-every", "5", "--schedule", "cosine")
    made, checkpoints = tmp_path / "made", tmp_path / "made.checkpoints"
    killed_after_its_first_checkpoint([*WEFT, *arguments(base, prompts, made, *options)], checkpoints)
    assert not made.exists()
    whole = sorted(path.name for path in checkpoints.glob("checkpoint-*"))
    assert whole

    with pytest.raises(InvalidConfig, match="holds checkpoints of a run that did not end: go on with --resume"):
        train(recipe(base, prompts, made, method=method, loop=loop), "weft train")
    with pytest.raises(InvalidConfig, match=r"--resume: method.dropout was 0.1 .* and is 0.2 now"):
        train(recipe(base, prompts, made, method={"dropout": 0.2}, loop=loop, resume=True), "weft train")
    trained(base, prompts, made, method=method, loop=loop, resume=True)
    assert not checkpoints.exists()

    straight = trained(base, prompts, tmp_path / "straight", method=method, loop=loop)
    assert losses(made) == losses(straight)
    weights = [folder / "adapter_model.safetensors" for folder in (made, straight)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_resume_begins_where_there_is_nothing_to_go_on_from(base: Path, prompts: Path, tmp_path: Path) -> None:
    assert len(losses(trained(base, prompts, tmp_path / "made", resume=True))) == 6


def test_resume_of_a_run_that_only_lacks_its_output_trains_no_further(
    base: Path, prompts: Path, tmp_path: Path
) -> None:
    made, kept = tmp_path / "made", tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "made.checkpoints").symlink_to(kept)  # what it leads to is not removed at the end
    loop = {"max_steps": 30, "learning_rate": 0.5, "eval_every": 2, "early_stop": 2, "schedule": "constant"}
    first = trained(base, prompts, made, data={"eval_share": 0.2}, loop=loop).rename(tmp_path / "first")
    trained(base, prompts, made, data={"eval_share": 0.2}, loop=loop, resume=True)
    assert losses(made) == losses(first)
    weights = [folder / "adapter_model.safetensors" for folder in (made, first)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_too_little_memory_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(WeftError, match="the device has too little memory: lower --batch-size"),
        Checkpoints(tmp_path / "made").failures_in_words(),
    ):
        raise torch.OutOfMemoryError


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(base: Path, prompts: Path, tmp_path: Path) -> None:
    options = ["--max-steps", "6", "--accumulate", "2", "--eval-share", "0.2", "--eval-every", "3"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = run([*launch, "-m", "weft.server.cli", *arguments(base, prompts, tmp_path / "two", *options)])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("\n") == 1, "one of them tells"

    loop = {"accumulate": 2, "eval_every": 3}
    one = trained(base, prompts, tmp_path / "one", data={"eval_share": 0.2}, loop=loop)
    for name in ("loss", "eval_loss", "grad_norm"):
        assert losses(tmp_path / "two", name) == pytest.approx(losses(one, name), rel=1e-4)


@pytest.mark.slow
@needs_a_disk
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(base: Path, prompts: Path, tmp_path: Path) -> None:
    """There is room for one checkpoint and a half."""
    disk, seen = tmp_path / "disk", tmp_path / "seen"
    disk.mkdir()
    options = ("--rank", "64", "--max-steps", "4", "--save-every", "1")
    command = [*WEFT, *arguments(base, prompts, disk / "made", *options)]
    script = f'"$@"; code=$?; cp -r {disk} {seen}; exit $code'
    ran = run(on_disk(disk, 3300, ["sh", "-c", script, "sh", *command]))
    assert ran.returncode == 1
    assert "checkpoint-2 can't be written to " in ran.stderr
    assert "checkpoint-1 is whole: make room and go on with --resume" in ran.stderr
    assert ran.stderr.count("\n") == 1
    kept = seen / "made.checkpoints"
    assert [path.name for path in kept.glob("**/checkpoint-*")] == ["checkpoint-1"]
    assert json.loads((kept / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
