"""How a benchmark and a peer talk: one JSON object a line, a question and its answer. The standard library only.

    {"base": …, "adapters": {name: folder}, "dtype": …, "threads": …, "scratch": …, "mode": …}  ->  {"version": …}
    {"prompts": [[…]], "adapters": [name or ""], "new_tokens": n}  ->  {"seconds": …, "tokens": [[…]]}

A failure is {"error": …}. What libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

Tokens = list[list[int]]


@dataclass(frozen=True)
class Setup:
    """What a peer loads. dtype: float32 or bfloat16; scratch: a folder for what it converts."""

    base: str
    adapters: dict[str, str]
    dtype: str
    threads: int
    scratch: str
    mode: str = ""


@dataclass(frozen=True)
class Job:
    """Greedy, EOS ignored; adapters: one a prompt, "" is the base."""

    prompts: Tokens
    adapters: list[str]
    new_tokens: int

    def groups(self) -> dict[str, list[int]]:
        """Which prompts each adapter has."""
        rows: dict[str, list[int]] = {}
        for row, adapter in enumerate(self.adapters):
            rows.setdefault(adapter, []).append(row)
        return rows

    def gather(self, parts: dict[str, Tokens]) -> Tokens:
        """What each group made, in the order of the prompts."""
        made: Tokens = [[] for _ in self.prompts]
        for adapter, rows in self.groups().items():
            for row, tokens in zip(rows, parts[adapter], strict=True):
                made[row] = tokens
        return made


class NotSupported(Exception):
    """This peer can't do that; the message says why."""


Answer = Callable[[Job], Tokens]
Load = Callable[[Setup], tuple[str, Answer]]
"""Loads; returns the versions, and what answers a job."""


def serve(load: Load) -> None:
    """Answer until the other side is gone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer: Answer | None = None
    for line in sys.stdin:
        given = json.loads(line)
        try:
            if answer is None:
                version, answer = load(_read(Setup, given))
                reply: dict[str, Any] = {"version": version}
            else:
                job = _read(Job, given)
                started = time.perf_counter()
                tokens = answer(job)
                reply = {"seconds": time.perf_counter() - started, "tokens": tokens}
        except NotSupported as error:
            reply = {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is its answer
            traceback.print_exc()
            reply = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def _read(kind: type[Any], given: dict[str, Any]) -> Any:
    return kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})
