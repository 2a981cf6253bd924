"""`weft score` against a running server."""

from __future__ import annotations

import io
import json

import pytest
from commands import Run


def test_continuations_are_ranked(run: Run, address: str) -> None:
    given = ("one", "two", "three four")
    rows = [line.split() for line in run("score", "count: ", *given, "--address", address).output.splitlines()]
    assert rows[0] == ["continuation", "share", "logprob"]
    assert sorted(" ".join(row[:-2]) for row in rows[1:]) == sorted(given)
    logprobs = [float(row[-1]) for row in rows[1:]]
    assert logprobs == sorted(logprobs, reverse=True)
    assert sum(float(row[-2]) for row in rows[1:]) == pytest.approx(1, abs=1e-3)


def test_an_adapter_scores_what_the_lines_of_standard_input_say(
    run: Run, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    ran = run("score", "count: ", "-", "--adapter", "one", "--json", "--address", address)
    response = json.loads(ran.output)
    assert len(response["scores"]) == 2
    assert response["adapters"][0]["adapter_id"] == "one"


def test_what_goes_wrong_is_one_line(run: Run, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = run("score", "x", "y", "--adapter", "nobody", "--address", address)
    assert ran.exit_code == 1
    assert "nobody" in ran.error_line
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "holds no continuations" in run("score", "x", "-", "--address", address).error
    assert run("score", "x", "--address", address).exit_code == 2
