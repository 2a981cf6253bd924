"""`weft serve` as a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Process:
    """Read line by line."""

    popen: subprocess.Popen[str]
    address: str = ""

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def read_until(self, text: str) -> str:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            if text in line:
                return line
        raise AssertionError(f"the process ended without saying {text!r}")

    def end(self) -> tuple[int, str]:
        """Its exit code and what else it said."""
        _, error = self.popen.communicate()
        return self.popen.returncode, error


@contextmanager
def serving_process(*options: str) -> Iterator[Process]:
    """Listens when the block begins, on any free ports, and is killed at its end."""
    command = [sys.executable, "-m", "weft.server.cli", "serve", "--threads", "1", "--port", "0", "--metrics-port", "0"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as popen:
        try:
            served = Process(popen)
            found = re.search(r"listening on (\S+),", served.read_until("listening on"))
            assert found is not None
            served.address = found[1]
            yield served
        finally:
            popen.kill()
