"""The fine-tune that docs/training.md extracts from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from weft.demo.fine_tune import main
from weft.demo.train import ADAPTER_WARMUP, BASE, DEMO_FOLDER
from weft.server.cli import main as weft


@pytest.mark.slow
def test_an_adapter_is_extracted_from_it(tmp_path: Path) -> None:
    steps = str(ADAPTER_WARMUP + 1)
    ran = CliRunner().invoke(main, ["upper", "--output", str(tmp_path / "tuned"), "--steps", steps])
    assert ran.exit_code == 0, ran.output
    models = ["--base", str(DEMO_FOLDER / BASE), "--tuned", str(tmp_path / "tuned")]
    assert weft(["extract", *models, "--output", str(tmp_path / "made"), "--rank", "4", "--others", "keep"]) == 0
    report = json.loads((tmp_path / "made" / "extraction.json").read_text())
    assert len(report["modules"]) == 5 * 7
    assert {"lm_head", "model.embed_tokens", "model.norm"} <= set(report["kept"])
    assert 0 < report["error"] < 1
