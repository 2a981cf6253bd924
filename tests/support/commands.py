"""The commands, run as a shell would: exit codes, standard output, one line on standard error."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCRIPT = "import sys; from weft.server.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    exit_code: int
    output: str
    error: str

    @property
    def error_line(self) -> str:
        """Standard error, which must be one line that names the program."""
        assert self.error.startswith("weft: ")
        assert self.error.count("\n") == 1
        return self.error.removeprefix("weft: ").rstrip("\n")


Run = Callable[..., Ran]


def shell(*args: str, script: str = SCRIPT, **options: Any) -> Ran:
    """As a fixture `run` does, in a process of its own."""
    command = [sys.executable, "-c", script, *args]
    ran = subprocess.run(command, check=False, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUTF8": "1"}, **options)
    return Ran(ran.returncode, "", ran.stderr.decode())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
