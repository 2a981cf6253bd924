"""What the files say together at a server's start, and a server that takes certificates alone."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
import web
from certificates import make_ca, make_certificate
from issuer import AUDIENCE, ISSUER, Issuer

from weft.errors import InvalidConfig, Unauthenticated
from weft.server.api.access.access import Access
from weft.server.api.callers import ANYBODY, Caller
from weft.server.config import ModelConfig, ServerConfig


class Counts:
    def __init__(self) -> None:
        self.reloads: list[tuple[str, str]] = []

    def quota_refused(self, limit: str) -> None: ...

    def reloaded(self, what: str, outcome: str) -> None:
        self.reloads.append((what, outcome))

    def certificate_expires(self, at_s: float) -> None: ...


class Shown:
    """A call, as far as the gate looks at it."""

    def __init__(self, *metadata: tuple[str, str], common: str = "", also: tuple[str, ...] = ()) -> None:
        self._metadata = metadata
        self._names = {
            "x509_common_name": [common.encode()] if common else [],
            "x509_subject_alternative_name": [name.encode() for name in also],
        }

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def auth_context(self) -> dict[str, list[bytes]]:
        return self._names


CONFIG = ServerConfig(ModelConfig("unused"))


async def caller(access: Access, shown: Shown) -> Caller:
    return await access.gate.authenticate(shown)  # type: ignore[arg-type]


@pytest.fixture
def tls(tmp_path: Path) -> ServerConfig:
    """A configuration with mutual TLS."""
    ca = make_ca()
    cert, key = make_certificate(ca, "server").write(tmp_path, "server")
    return replace(CONFIG, tls_cert=cert, tls_key=key, tls_client_ca=ca.write(tmp_path, "ca")[0])


def test_without_anything_everybody_is_anybody() -> None:
    async def main() -> None:
        access = Access(CONFIG, Counts(), lambda: 0.0)
        assert access.credentials is None
        assert await caller(access, Shown(("x-api-key", "whatever"))) is ANYBODY

    asyncio.run(main())


def test_with_certificates_alone_each_is_a_caller_of_its_name(tls: ServerConfig) -> None:
    async def main() -> None:
        access = Access(tls, Counts(), lambda: 0.0)
        assert access.credentials is not None
        assert (await caller(access, Shown(common="one"))).name == "one"
        assert (await caller(access, Shown(also=("spiffe://two", "three")))).name == "spiffe://two"
        with pytest.raises(Unauthenticated, match="names nobody: it needs a common or alternative name"):
            await caller(access, Shown())

    asyncio.run(main())


def test_a_certificate_that_names_two_callers_is_neither(tls: ServerConfig, tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "access.toml"
        path.write_text('[callers.a]\ncertificates = ["one", "uno"]\n[callers.b]\ncertificates = ["two"]\n')
        access = Access(replace(tls, access=path), Counts(), lambda: 0.0)
        assert (await caller(access, Shown(common="one", also=("uno", "other")))).name == "a"
        with pytest.raises(Unauthenticated, match="names several callers"):
            await caller(access, Shown(common="one", also=("two",)))

    asyncio.run(main())


def test_keys_of_tokens_come_from_afar_and_follow_the_file(tmp_path: Path) -> None:
    async def main() -> None:
        issuer, path = Issuer(), tmp_path / "access.toml"
        shown = Shown(("authorization", f"Bearer {issuer.token()}"))
        with web.serving() as far:
            far.files["/one"] = far.files["/two"] = issuer.jwks

            def jwt(name: str) -> str:
                claims = f'issuer = "{ISSUER}"\naudience = "{AUDIENCE}"\n'
                return f'[callers.team-a]\n[jwt]\njwks = "{far.url}/{name}"\n{claims}'

            path.write_text(jwt("one"))
            counts = Counts()
            access = Access(replace(CONFIG, access=path), counts, lambda: 0.0)
            for _ in range(3):
                assert (await caller(access, shown)).name == "team-a"
            assert [seen.path for seen in far.seen] == ["/one"]
            path.write_text(jwt("two") + "# changed\n")
            for _ in range(2):
                await access.catch_up()
            assert (await caller(access, shown)).name == "team-a"
            assert [seen.path for seen in far.seen] == ["/one", "/two"]
        assert counts.reloads == [("jwks", "ok"), ("access", "ok"), ("jwks", "ok")]

    asyncio.run(main())


def test_a_bad_file_of_keys_is_named_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    path.write_text(f'[callers."*"]\n[jwt]\njwks = "keys.json"\nissuer = "{ISSUER}"\naudience = "{AUDIENCE}"\n')
    with pytest.raises(InvalidConfig, match=r"jwt\.jwks .*keys\.json can't be read: No such file"):
        Access(replace(CONFIG, access=path), Counts(), lambda: 0.0)
    (tmp_path / "keys.json").write_text(json.dumps({"keys": []}))
    with pytest.raises(InvalidConfig, match="holds no public key that tokens could be signed with"):
        Access(replace(CONFIG, access=path), Counts(), lambda: 0.0)
    (tmp_path / "keys.json").write_bytes(Issuer().jwks)
    Access(replace(CONFIG, access=path), Counts(), lambda: 0.0)


def test_certificates_in_the_file_need_an_authority(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    path.write_text('[callers.a]\ncertificates = ["one"]\n')
    with pytest.raises(InvalidConfig, match="needs --tls-client-ca"):
        Access(replace(CONFIG, access=path), Counts(), lambda: 0.0)
