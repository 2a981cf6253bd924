"""llama.cpp's server with an adapter a request. The binary is built by the benchmark from llama-cpp-python's sources.

A base request names an adapter at scale 0: without a `lora` field it was wrong and slow.
"""

from __future__ import annotations

import atexit
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gguf_files import write_adapter, write_base
from protocol import Answer, Job, Setup, Tokens, serve

SLOTS = 16
CONTEXT = 256


def load(setup: Setup) -> tuple[str, Answer]:
    port = start(setup)
    index = {name: number for number, name in enumerate(setup.adapters)}

    def ask(prompt: list[int], adapter: str, new_tokens: int) -> list[int]:
        lora = [{"id": index[adapter], "scale": 1.0}] if adapter else [{"id": 0, "scale": 0.0}]
        fields = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
            "lora": lora,
        }
        answered = post(port, "/completion", fields)
        if "tokens" not in answered:
            raise RuntimeError(str(answered))
        tokens: list[int] = answered["tokens"]
        return tokens

    def answer(job: Job) -> Tokens:
        with ThreadPoolExecutor(len(job.prompts)) as pool:
            return list(pool.map(ask, job.prompts, job.adapters, [job.new_tokens] * len(job.prompts)))

    return "llama.cpp of llama-cpp-python " + os.environ["LLAMA_CPP_VERSION"], answer


def start(setup: Setup) -> int:
    """The server, up; it ends with this process."""
    scratch = Path(setup.scratch) / f"gguf-{setup.dtype}"
    scratch.mkdir(parents=True, exist_ok=True)
    base = write_base(Path(setup.base), scratch / "base.gguf", setup.dtype)
    adapters = [
        write_adapter(Path(setup.base), Path(path), scratch / f"{name}.gguf", setup.dtype)
        for name, path in setup.adapters.items()
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    lora = ("--lora", ",".join(map(str, adapters)), "--lora-init-without-apply")
    threads = ("--threads", str(setup.threads), "--threads-batch", str(setup.threads), "--threads-http", str(SLOTS + 2))
    size = ("--ctx-size", str(SLOTS * CONTEXT), "--parallel", str(SLOTS), "--batch-size", "2048", "--no-warmup")
    binary = os.environ["LLAMA_SERVER"]
    process = subprocess.Popen(
        [binary, "--model", str(base), *lora, *threads, *size, "--host", "127.0.0.1", "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )
    atexit.register(process.kill)
    while process.poll() is None:
        try:
            if post(port, "/health", None).get("status") == "ok":
                return port
        except OSError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"llama-server ended with {process.returncode}")


def post(port: int, path: str, fields: dict[str, object] | None) -> dict[str, object]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = None if fields is None else json.dumps(fields)
    connection.request("GET" if fields is None else "POST", path, body, {"Content-Type": "application/json"})
    return json.loads(connection.getresponse().read())


if __name__ == "__main__":
    serve(load)
