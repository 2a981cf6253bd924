"""A page of examples, read and run: what it says to type, and what it says comes back.

In an indented block a line after `$ ` is typed, with those that a `\\` at its end continues; the lines below come back.
`…` stands for anything in a line, and alone for any lines. Numbers with a point may be off by a tenth or by 0.05, and
spaces are as wide as they are. A command ends with 0, unless `weft: ` and a reason comes back.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from commands import free_port

ADDRESSES = ("127.0.0.1:50051", "127.0.0.1:9090")
"""Of the server and its metrics on every page; others in a run, so that runs do not meet."""

_INDENT, _PROMPT, _ANYTHING = "    ", "$ ", "…"
_MARK = "\x1e"
_DECIMAL = re.compile(r"-?\d+\.\d+(?:e[+-]\d+)?|-?\d+e[+-]\d+")
_RELATIVE, _ABSOLUTE = 0.1, 0.05


@dataclass
class Step:
    """One command, with what comes back by the page."""

    command: str
    told: list[str] = field(default_factory=list)

    @property
    def is_background(self) -> bool:
        return self.command.endswith("&")

    @property
    def may_fail(self) -> bool:
        return any(line.startswith("weft: ") for line in self.told)


def steps_of(page: str) -> list[Step]:
    """What a page says to type, in order."""
    steps: list[Step] = []
    is_open = continues = False
    for line in page.splitlines():
        text = line.removeprefix(_INDENT)
        if not line.startswith(_INDENT):
            is_open = continues = False
        elif continues:
            steps[-1].command += f"\n{text}"
            continues = text.endswith("\\")
        elif text.startswith(_PROMPT):
            steps.append(Step(text.removeprefix(_PROMPT)))
            is_open, continues = True, text.endswith("\\")
        elif is_open:
            steps[-1].told.append(text)
    return steps


@dataclass(frozen=True)
class Ended:
    """What a step gave: both outputs together, as a terminal shows them."""

    exit_code: int
    lines: list[str]


def run(steps: Sequence[Step], folder: Path, log: Path, timeout_s: float) -> list[Ended]:
    """Run all in one shell; what goes on in the background writes to `log`, and is killed at the end.

    Raises AssertionError where they take longer than `timeout_s`.
    """
    others = [f"127.0.0.1:{free_port()}" for _ in ADDRESSES]
    script = "".join(_lines(steps, log))
    for address, other in zip(ADDRESSES, others, strict=True):
        script = script.replace(address, other)
    with subprocess.Popen(
        ["bash", "-c", script],  # noqa: S607 - the PATH's, as a reader's
        cwd=folder,
        env=_environment(*others),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as shell:
        try:
            output, _ = shell.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            told = (error.stdout or b"").decode(errors="replace")
            raise AssertionError(f"the page takes longer than {timeout_s:g} s, after\n{told}") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    for address, other in zip(ADDRESSES, others, strict=True):
        output = output.replace(other, address)
    return list(_ended(output))


def _lines(steps: Sequence[Step], log: Path) -> Iterator[str]:
    for step in steps:
        target = f">> '{log}'" if step.is_background else ""
        yield f"{{ {step.command}\n}} {target} 2>&1\nprintf '{_MARK}%d{_MARK}' $?\n"


def _environment(address: str, metrics: str) -> dict[str, str]:
    binaries = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        "PYTHONUTF8": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # two would wait for each other on a busy machine
        "WEFT_ADDRESS": address,
        "WEFT_PORT": address.rpartition(":")[2],
        "WEFT_METRICS_PORT": metrics.rpartition(":")[2],
    }


def _ended(output: str) -> Iterator[Ended]:
    texts = output.split(_MARK)
    for text, code in zip(texts[::2], texts[1::2], strict=False):
        yield Ended(int(code), text.splitlines())


def differences(steps: Sequence[Step], ended: Sequence[Ended]) -> Iterator[str]:
    """What came back otherwise than the page says."""
    for step, each in zip(steps, ended, strict=False):
        if not agrees(step.told, each.lines):
            told, came = ("\n".join(f"    {line}" for line in lines) for lines in (step.told, each.lines))
            yield f"$ {step.command}\nby the page:\n{told}\nit was:\n{came}"
        if each.exit_code and not step.may_fail:
            yield f"$ {step.command}\nended with {each.exit_code}"
    for step in steps[len(ended) :]:
        yield f"$ {step.command}\nwas not run"


def agrees(told: Sequence[str], came: Sequence[str]) -> bool:
    """Whether the lines that came back are those of the page."""
    if not told:
        return not came
    if told[0].strip() == _ANYTHING:
        return any(agrees(told[1:], came[skipped:]) for skipped in range(len(came) + 1))
    return bool(came) and _line_agrees(told[0], came[0]) and agrees(told[1:], came[1:])


def _line_agrees(told: str, came: str) -> bool:
    parts = (re.escape(" ".join(part.split())) for part in _DECIMAL.sub("\0", told).split(_ANYTHING))
    pattern = r".*".join(parts).replace(re.escape("\0"), f"({_DECIMAL.pattern})").replace(r"\ ", r"\s+")
    found = re.fullmatch(rf"\s*{pattern}\s*", came)
    numbers = (float(number) for number in _DECIMAL.findall(told))
    return found is not None and all(
        math.isclose(number, float(other), rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
        for number, other in zip(numbers, found.groups(), strict=True)
    )
