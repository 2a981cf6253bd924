"""What a workload has to know of the server: its limits, its adapters, and tokens that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import grpc

from weft.errors import WeftError
from weft.server.bench.workload import Lengths, longest
from weft.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc, server_pb2, server_pb2_grpc

_TEXT = "The quick brown fox jumps over the lazy dog; 0123456789 + WEFT carries MANY threads at once, doesn't it?"
"""What prompts' tokens are taken from: its own tokens are all that any tokenizer is known to have."""

_READY = (adapter_pb2.ADAPTER_STATE_DISK, adapter_pb2.ADAPTER_STATE_HOST, adapter_pb2.ADAPTER_STATE_DEVICE)


class CannotLoad(WeftError):
    """The server can't take the workload as it is; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Target:
    """A running server. adapters: those that answer, in the order of their names; pool: ids of ordinary tokens."""

    version: str
    model: str
    dtype: str
    device: str
    context_tokens: int
    prompt_tokens: int
    adapters: tuple[str, ...]
    pool: tuple[int, ...]

    def choose(self, names: Sequence[str], pattern: str | None, otherwise: str = "") -> list[str]:
        """These, or those that match the pattern, or all. Raises CannotLoad where there are none, or not that one.

        otherwise: what can be done where there are none, but to load some.
        """
        missing = [name for name in names if name.partition("@")[0] not in self.adapters]
        if missing:
            known = ", ".join(self.adapters[:5]) + (", …" if len(self.adapters) > 5 else "")
            raise CannotLoad(f"--adapter is {missing[0]!r}, which the server does not have; it has {known or 'none'}")
        if names:
            return list(names)
        if not self.adapters:
            raise CannotLoad(f"the server has no adapters: load some with `weft adapters load`{otherwise}")
        chosen = [name for name in self.adapters if pattern is None or fnmatchcase(name, pattern)]
        if not chosen:
            raise CannotLoad(f"--match is {pattern!r}, which none of the server's {len(self.adapters)} adapters does")
        return chosen

    def check_fits(self, prompt_tokens: Lengths, new_tokens: Lengths) -> None:
        """Raises CannotLoad where the longest prompt, or it and the longest answer, are more than the server takes."""
        prompt, answer = longest(prompt_tokens), longest(new_tokens)
        if prompt + answer > self.context_tokens or prompt > self.prompt_tokens:
            raise CannotLoad(
                f"prompts of up to {prompt} tokens and answers of up to {answer} are more than the server's context of "
                f"{self.context_tokens}: give --fit, or smaller --prompt-tokens and --new-tokens"
            )

    def to_json(self) -> dict[str, object]:
        return {
            "version": self.version,
            "model": self.model,
            "dtype": self.dtype,
            "device": self.device,
            "context_tokens": self.context_tokens,
            "adapters": len(self.adapters),
        }


def survey(channel: grpc.Channel) -> Target:
    """Ask a server what it is. Raises grpc.RpcError."""
    info = server_pb2_grpc.ServerServiceStub(channel).GetServerInfo(server_pb2.GetServerInfoRequest())
    text = inference_pb2.TokenizeRequest(text=_TEXT, add_special_tokens=False)
    tokens = inference_pb2_grpc.InferenceServiceStub(channel).Tokenize(text)
    return Target(
        version=info.version,
        model=info.model,
        dtype=info.dtype,
        device=info.device,
        context_tokens=info.limits.max_context_tokens,
        prompt_tokens=info.limits.max_prompt_tokens,
        adapters=tuple(adapter.name for adapter in _adapters(channel) if adapter.state in _READY),
        pool=tuple(sorted(set(tokens.token_ids))),
    )


def _adapters(channel: grpc.Channel) -> Iterator[adapter_pb2.Adapter]:
    stub, token = adapter_pb2_grpc.AdapterServiceStub(channel), ""
    while True:
        page = stub.ListAdapters(adapter_pb2.ListAdaptersRequest(page_size=1000, page_token=token))
        yield from page.adapters
        token = page.next_page_token
        if not token:
            return
