"""A `weft serve` process seen from outside: its log, its metrics, and what /proc says that it holds."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from prometheus_client.parser import text_string_to_metric_families

_SERVING = re.compile(r"gRPC on (\S+), metrics on http://(\S+)/metrics")
_TROUBLE = re.compile(r" (ERROR|CRITICAL) |^Traceback|^E\d{4} (?!.*hpack_parser)")
"""Lines by which the server, Python or gRPC's core say that something went wrong; bytes that are no HTTP/2 are not."""

END_S = 60.0


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds now."""

    rss_bytes: int
    anonymous_bytes: int
    threads: int
    files: int
    sockets: int
    children: int


@dataclass
class ServerProcess:
    """A running server. trouble: lines of its log that tell of failures; log: its last lines; kept: where all go."""

    process: subprocess.Popen[str]
    address: str = ""
    metrics_address: str = ""
    trouble: list[str] = field(default_factory=list)
    log: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    kept: TextIO | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    def read_log(self) -> None:
        """Until it serves, or has ended."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._note(line)
            if found := _SERVING.search(line):
                self.address, self.metrics_address = found[1], found[2]
                threading.Thread(target=self._read_on, name="read the log", daemon=True).start()
                return
        raise RuntimeError(f"weft serve did not start: {''.join(self.log)}")

    def _read_on(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._note(line)

    def _note(self, line: str) -> None:
        self.log.append(line)
        if self.kept is not None:
            self.kept.write(line)
        if _TROUBLE.search(line):
            self.trouble.append(line.rstrip())

    def metrics(self) -> Mapping[str, float]:
        """Each sample's value, summed up over its labels."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=30) as response:
            text = response.read().decode()
        values: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] += sample.value  # type: ignore[assignment]  # a Counter of floats
        return values

    def held(self) -> Held:
        proc = Path(f"/proc/{self.pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines() if ":" in line)
        links = list(_links(proc / "fd"))
        return Held(
            rss_bytes=_kib(status["VmRSS"]),
            anonymous_bytes=_kib(status["RssAnon"]),
            threads=sum(1 for _ in (proc / "task").iterdir()),
            files=len(links),
            sockets=sum(link.startswith("socket:") for link in links),
            children=sum(len(path.read_text().split()) for path in (proc / "task").glob("*/children")),
        )

    def rest(self, *, sockets: int, threads: int | None = None, within_s: float = END_S) -> Held:
        """What it holds once no request is left, and no more sockets and threads than these; or after so long.

        gRPC's own threads end some time after they were of use.
        """
        end_s = time.monotonic() + within_s
        while True:
            metrics, held = self.metrics(), self.held()
            is_busy = metrics["weft_requests_running"] + metrics["weft_requests_waiting"] > 0
            is_more = held.sockets > sockets or (threads is not None and held.threads > threads)
            if not (is_busy or is_more) or time.monotonic() > end_s:
                return held
            time.sleep(0.2)

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _links(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        try:
            yield str(path.readlink())
        except FileNotFoundError:  # closed meanwhile
            continue


def _kib(text: str) -> int:
    return int(text.removesuffix("kB")) * 1024


@contextmanager
def weft_process(model: Path, *options: object, log: TextIO | None = None) -> Iterator[ServerProcess]:
    """A server on free ports that serves; ended at the end of the block. log: where its log is kept."""
    command = [sys.executable, "-m", "weft.server.cli", "serve", "--model", model, "--port", 0, "--metrics-port", 0]
    process = subprocess.Popen([str(part) for part in (*command, *options)], stderr=subprocess.PIPE, text=True)
    server = ServerProcess(process, kept=log)
    try:
        server.read_log()
        yield server
    finally:
        server.stop()
        assert process.stderr is not None
        process.stderr.close()
