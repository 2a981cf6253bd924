"""docs/training.md names every option of `weft train`, and none that it has not."""

from __future__ import annotations

import re
from pathlib import Path

from weft.making.config import METHODS
from weft.server.cli.train import train

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
TRAIN = PAGE.split("## Train\n")[1].split("\n## ")[0]
CONNECTION = {"--api-key", "--api-key-file", "--tls", "--tls-ca", "--tls-cert", "--tls-key"}
ELSEWHERE = {"--adapters", "--source-root", "--adapter", "--nproc-per-node"}


def test_every_option_is_in_the_table() -> None:
    table = TRAIN.split("### Options\n")[1].split("\n### ")[0]
    named = set(
        re.findall(r"`(--[a-z-]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    options = {name for option in train.params for name in option.opts if name.startswith("--")}
    assert named == options - CONNECTION


def test_no_other_option_is_named() -> None:
    options = {name for option in train.params for name in option.opts}
    assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", TRAIN.replace("…", ""))) - ELSEWHERE <= options


def test_every_method_is_explained() -> None:
    table = TRAIN.split("### Methods\n\n")[1].split("\n\n")[0]
    assert re.findall(r"^\| `([a-z+]+)`", table, re.MULTILINE) == list(METHODS)
