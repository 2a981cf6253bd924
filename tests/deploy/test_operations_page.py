"""docs/operations.md: what it says of errors, times and folders is so."""

from __future__ import annotations

import re
from pathlib import Path

from manifests import COMPONENTS, FOLDER, OVERLAYS

from weft.server.api import errors

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()


def test_every_error_of_the_table_is_explained_under_its_code() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", PAGE, re.MULTILINE))
    wanted = {row.reason: row.code.name for row in (*errors._TABLE.values(), errors._UNEXPECTED)}
    assert {reason: rows.get(reason) for reason in wanted} == wanted


def test_every_overlay_and_every_component_is_named() -> None:
    assert tuple(sorted(set(re.findall(r"`overlays/([a-z]+)`", PAGE)))) == OVERLAYS
    assert [name for name in COMPONENTS if f"`{name}`" not in PAGE and f"`components/{name}`" not in PAGE] == []


def test_the_times_of_a_pods_end_are_those_of_the_manifests() -> None:
    deployment = (FOLDER / "base" / "deployment.yaml").read_text()
    toml = (FOLDER / "base" / "weft.toml").read_text()
    times = PAGE.partition("The end of a pod")[2].partition("`drain-grace-seconds`")[0]
    sleep_s, drain_s, closing_s, whole_s = (int(seconds) for seconds in re.findall(r" (\d+) s  ", times))
    assert f"seconds: {sleep_s}\n" in deployment
    assert f"drain-grace-seconds = {drain_s}\n" in toml
    assert f"terminationGracePeriodSeconds: {whole_s}\n" in deployment
    assert sleep_s + drain_s + closing_s <= whole_s
