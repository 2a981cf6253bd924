"""A server that asks everybody who they are, and those who do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from certificates import Credential, make_ca, make_certificate
from issuer import AUDIENCE, ISSUER, Issuer
from serving import served
from stubs import Stubs

from weft.server.api.access.keys import digest_of, new_key
from weft.server.app import Server
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import adapter_pb2

CALLERS = {
    "boss": 'roles = ["infer", "read", "admin"]',
    "team-a": (
        'roles = ["infer", "admin"]\nadapters = ["team-a/*"]\nbase = false\nsources = ["file:{adapters}/one"]\n'
    ),
    "tenant-a": 'roles = ["infer", "admin"]\nlabels = { tenant = "a" }\n',
    "tenant-b": 'roles = ["admin"]\nlabels = { tenant = "b" }\nsources = ["file:{adapters}/*"]\n',
    "asker": 'roles = ["infer"]',
    "reader": 'roles = ["read"]',
    "gateway": "on_behalf = true",
    "rare": "requests_per_minute = 1",
    "brief": "tokens_per_minute = 1",
    "single": "max_in_flight = 1",
}
"""By key, each. What the file says of them besides."""


@dataclass
class Guarded:
    """The server, its files, and what proves who somebody is."""

    server: Server
    folder: Path
    adapters: Path
    ca: Credential
    issuer: Issuer
    keys: dict[str, str] = field(default_factory=dict)

    def bearer(self, caller: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.keys[caller]}"),)

    @contextmanager
    def calling(
        self,
        caller: str = "",
        *metadata: tuple[str, str],
        certificate: str = "stranger",
        ca: Credential | None = None,
    ) -> Iterator[Stubs]:
        """caller: whose key is shown; empty for no key. ca: that the client trusts."""
        shown = make_certificate(self.ca, certificate)
        trusted = (ca or self.ca).certificate_pem
        credentials = grpc.ssl_channel_credentials(trusted, shown.key_pem, shown.certificate_pem)
        options = [("grpc.use_local_subchannel_pool", 1)]
        whole = (*metadata, *(self.bearer(caller) if caller else ()))
        with grpc.secure_channel(self.server.address, credentials, options) as channel:
            yield Stubs(grpc.intercept_channel(channel, _Adding(whole)))

    def catch_up(self) -> None:
        """Let the server look at its files until it has seen what they hold now."""
        watch = self.server._access_watch
        assert watch is not None
        for _ in range(2):
            asyncio.run_coroutine_threadsafe(self.server._access.catch_up(), watch.get_loop()).result(60)

    def rewrite(self, *without: str, more: str = "") -> None:
        """The access file, without some callers. more: further lines."""
        self.access.write_text(access_file(self.keys, self.adapters, without) + more)

    @property
    def access(self) -> Path:
        return self.folder / "access.toml"

    def create(self, name: str, folder: str = "one", **labels: str) -> None:
        adapter = adapter_pb2.Adapter(name=name, source=f"file:{self.adapters / folder}", labels=labels)
        with self.calling("boss") as boss:
            boss.adapters.CreateAdapter(adapter_pb2.CreateAdapterRequest(adapter=adapter, wait=True))


class _Adding(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    def __init__(self, metadata: Sequence[tuple[str, str]]) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._added(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._added(client_call_details), request)

    def _added(self, call: Any) -> Any:
        return call._replace(metadata=(*(call.metadata or ()), *self._metadata))


def access_file(keys: dict[str, str], adapters: Path, without: Sequence[str] = ()) -> str:
    jwt = f'[jwt]\njwks = "keys.json"\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\n'
    tables = [
        f'[callers.{name}]\nkey_sha256 = ["{digest_of(keys[name])}"]\n{rules.replace("{adapters}", str(adapters))}'
        for name, rules in CALLERS.items()
        if name not in without
    ]
    return "\n".join([*tables, '[callers.shown]\ncertificates = ["client-a"]', '[callers."*"]', jwt])


@contextmanager
def guarded(root: Path, folder: Path, adapters: Sequence[str] = ("one", "two", "three")) -> Iterator[Guarded]:
    """root: holds `base` and `adapters`. folder: for the server's files. adapters: which of them are loaded."""
    ca, issuer = make_ca(), Issuer()
    cert, key = make_certificate(ca, "server").write(folder, "server")
    client_ca, _ = ca.write(folder, "ca")
    (folder / "keys.json").write_bytes(json.dumps({"keys": issuer.keys}).encode())
    keys = {name: new_key() for name in CALLERS}
    access = folder / "access.toml"
    access.write_text(access_file(keys, root / "adapters"))
    config = ServerConfig(
        model=ModelConfig(str(root / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(max_batch_tokens=64, max_running_requests=4, kv_tokens=131072, adapter_pages=16, threads=1),
        port=0,
        metrics_port=0,
        source_roots=(root / "adapters",),
        drain_grace_s=0.0,
        max_request_s=7 * 86400.0,
        tls_cert=cert,
        tls_key=key,
        tls_client_ca=client_ca,
        access=access,
    )
    with served(config) as server:
        house = Guarded(server, folder, root / "adapters", ca, issuer, keys)
        names = (("team-a/one", {}), ("team-b/one", {"tenant": "b"}), ("shared/one", {"tenant": "a"}))
        for (name, labels), adapter in zip(names, adapters, strict=False):
            house.create(name, adapter, **labels)
        yield house
