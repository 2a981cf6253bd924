"""The commands, run in this process."""

from __future__ import annotations

import pytest
from commands import Ran, Run

from weft.server.cli import main


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*args: object) -> Ran:
        capfd.readouterr()
        exit_code = main([str(arg) for arg in args])
        captured = capfd.readouterr()
        return Ran(exit_code, captured.out, captured.err)

    return run
