"""What TLS and knowing who calls cost of throughput: servers that differ in nothing else, asked in turn.

A closed loop of streams, one message a token, against a small model on one thread: so gRPC's share is as large as it
gets. Each round asks every server once, in an order that changes, and is compared with the plain server's. Connections
are made before the clock runs. The server's processor time a token says the same of a machine that others use, too.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import jwt
import transformers
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from jwt.algorithms import ECAlgorithm
from loaded import Load, closed_loop, processor_s, weft_process
from report import Samples, machine, table, write_section
from rich.progress import Progress
from shapes import SHAPES, make_base

from weft.server.api.access.keys import digest_of, new_key
from weft.server.cli.client import Endpoint, Tls, TlsFiles
from weft.v1 import inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).parents[1]
PLAIN = "neither"
NAME = "caller"


@dataclass(frozen=True, slots=True)
class Effort:
    shape: str
    rounds: int
    requests: int
    clients: int
    load: Load


QUICK = Effort("tiny", 3, 40, 8, Load(SHAPES["tiny"]["vocab_size"], 8, 8))
FULL = Effort("demo", 11, 192, 16, Load(SHAPES["demo"]["vocab_size"], 16, 48))


@dataclass(frozen=True, slots=True)
class Proofs:
    """What servers and clients show, and the options that make servers ask for it."""

    tls: tuple[object, ...]
    mutual: tuple[object, ...]
    access: tuple[object, ...]
    trusting: Tls
    showing: Tls
    key: str
    token: str

    @classmethod
    def make(cls, folder: Path) -> Proofs:
        signer, subject = ec.generate_private_key(ec.SECP256R1()), _name(NAME)
        certificate = _sign(signer, subject)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        secret = signer.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        cert_file, key_file = folder / "cert.pem", folder / "key.pem"
        cert_file.write_bytes(pem)
        key_file.write_bytes(secret)
        public = {**ECAlgorithm.to_jwk(signer.public_key(), as_dict=True), "kid": "1"}
        (folder / "keys.json").write_text(json.dumps({"keys": [public]}))
        key, access = new_key(), folder / "access.toml"
        access.write_text(
            f'[callers.{NAME}]\nkey_sha256 = ["{digest_of(key)}"]\n'
            '[jwt]\njwks = "keys.json"\nissuer = "here"\naudience = "weft"\n'
        )
        claims = {"sub": NAME, "iss": "here", "aud": "weft", "exp": int(time.time()) + 86400}
        tls = ("--tls-cert", cert_file, "--tls-key", key_file)
        return cls(
            tls=tls,
            mutual=(*tls, "--tls-client-ca", cert_file),
            access=(*tls, "--access", access),
            trusting=Tls(TlsFiles(cert_file, None, None), pem, None, None),
            showing=Tls(TlsFiles(cert_file, cert_file, key_file), pem, secret, pem),
            key=key,
            token=jwt.encode(claims, signer, algorithm="ES256", headers={"kid": "1"}),
        )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _sign(signer: ec.EllipticCurvePrivateKey, subject: x509.Name) -> x509.Certificate:
    now, names = datetime.now(UTC), [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(signer.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(signer, hashes.SHA256())
    )


@dataclass
class Measured:
    """Of one server, round by round: tokens a second, and its processor's microseconds a token."""

    speeds: Samples = field(default_factory=Samples)
    costs: Samples = field(default_factory=Samples)


async def tokens_per_s(server: Endpoint, effort: Effort, seed: int) -> float:
    async with server.aio_channel([]) as channel:
        await channel.channel_ready()
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def ask(adapter: str, turn: int) -> None:
            request = inference_pb2.StreamGenerateRequest(**effort.load.fields(adapter, seed * 100_000 + turn))
            count = 0
            async for message in stub.StreamGenerate(request, metadata=server.metadata):
                count += len(message.tokens)
            assert count == effort.load.new_tokens, "tokens are missing"

        taken_s = await closed_loop(ask, [""] * effort.requests, effort.clients)
    return effort.requests * effort.load.new_tokens / taken_s


def measure(servers: Mapping[str, tuple[Endpoint, int]], effort: Effort, progress: Progress) -> dict[str, Measured]:
    """By kind of server, given with its process's id. The first round, which warms up, is left out."""
    found = {kind: Measured() for kind in servers}
    num_tokens = effort.requests * effort.load.new_tokens
    work = progress.add_task("warming up", total=(effort.rounds + 1) * len(servers))
    kinds = list(servers)
    for turn in range(effort.rounds + 1):
        for kind in kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]:
            server, process_id = servers[kind]
            before_s = processor_s(process_id)
            speed = asyncio.run(tokens_per_s(server, effort, turn))
            if turn:
                found[kind].speeds.values.append(speed)
                found[kind].costs.values.append((processor_s(process_id) - before_s) / num_tokens * 1e6)
            progress.update(work, advance=1, description=f"round {turn} of {effort.rounds}: {kind}")
    return found


def over(samples: Samples, plain: Samples) -> str:
    pairs = zip(samples.values, plain.values, strict=True)
    return Samples([mine / other for mine, other in pairs]).show(digits=3)


def show(found: Mapping[str, Measured]) -> str:
    plain = found[PLAIN]
    rows = [
        [
            *(kind, each.speeds.show(digits=0), over(each.speeds, plain.speeds)),
            *(each.costs.show(digits=0), over(each.costs, plain.costs)),
        ]
        for kind, each in found.items()
    ]
    head = ["TLS and credentials", "tokens/s", "over neither, in its round", "processor, µs a token", "over neither"]
    return table(head, rows)


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="Less of everything; writes nothing.")
@click.option("--rounds", type=click.IntRange(1), help="[default: 11; with --quick, 3]")
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "docs" / "performance.md")
def main(quick: bool, rounds: int | None, output: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    given = QUICK if quick else FULL
    effort = Effort(given.shape, rounds or given.rounds, given.requests, given.clients, given.load)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack, Progress() as progress:
        folder = Path(scratch)
        make_base(effort.shape, folder / "base")
        proofs = Proofs.make(folder)
        kinds = {
            PLAIN: ((), None, ""),
            "TLS": (proofs.tls, proofs.trusting, ""),
            "TLS, an API key": (proofs.access, proofs.trusting, proofs.key),
            "TLS, a token": (proofs.access, proofs.trusting, proofs.token),
            "mutual TLS": (proofs.mutual, proofs.showing, ""),
        }
        servers = {}
        for kind, (options, certificates, secret) in kinds.items():
            address, process_id = stack.enter_context(weft_process(folder / "base", *options, threads=1))
            servers[kind] = Endpoint(address, secret, tls=certificates), process_id
        found = measure(servers, effort, progress)
    load = effort.load
    report = (
        f"{show(found)}\n\n{effort.requests} streams a round from {effort.clients} clients, prompts of "
        f"{load.prompt_tokens} tokens and answers of {load.new_tokens}.\n\n"
        f"Machine: {machine()}; the {effort.shape} shape, {effort.rounds} rounds, 1 thread a server.\n"
    )
    click.echo(report)
    if not quick:
        write_section(output, "access", report)


if __name__ == "__main__":
    main()
