"""`weft bench kernels` writes the table that "auto" reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from weft.kernels.lora import MEASURED, read_measured
from weft.server.cli.bench_kernels import kernels


@pytest.mark.slow
def test_a_table_is_measured_and_written_beside_what_is_known_of_other_devices(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    known = {"device": "cuda", "dtype": "int8", "rows": 1, "distinct": 1, "rank": 8, "d_in": 8, "d_out": 8, "ms": {}}
    path.write_text(json.dumps({"machines": {"cuda": {"name": "some"}}, "measurements": [known]}))
    result = CliRunner().invoke(kernels, ["--quick", "--threads", "1", "--output", str(path)])
    assert result.exit_code == 0, result.output
    measured = read_measured(path)
    assert {each.device for each in measured} == {"cpu", "cuda"}
    assert all(each.ms["torch"] > 0 for each in measured if each.device == "cpu")
    assert {each.dtype for each in measured if each.device == "cpu"} == {"float32", "bfloat16", "int8"}
    assert json.loads(path.read_text())["machines"].keys() == {"cpu", "cuda"}
    assert "over the fastest's" in result.output


@pytest.mark.parametrize("text", ["", "{", "[]", '{"measurements": [1]}', '{"machines": 3}'])
def test_a_file_that_is_no_table_is_told_before_the_measurement_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    result = CliRunner().invoke(kernels, ["--quick", "--output", str(path)])
    assert (result.exit_code, path.read_text()) == (1, text)
    assert "is no table of measurements" in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--output", "/nowhere/x.json"), "/nowhere/x.json can't be written: there is no folder /nowhere"),
        (("--device", "abacus"), "--device is 'abacus', which this machine does not have"),
    ],
)
def test_what_can_not_be_measured_is_one_line(args: tuple[str, ...], words: str) -> None:
    result = CliRunner().invoke(kernels, ["--quick", *args])
    assert (result.exit_code, result.output) == (1, f"Error: {words}\n")


def test_the_table_of_the_package_is_of_the_current_shape() -> None:
    measured = read_measured(MEASURED)
    assert {each.device for each in measured} >= {"cpu"}
    assert all(each.rows >= each.distinct > 0 < each.rank for each in measured)
