"""The server's certificate, and who may sign its clients'."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from weft.errors import InvalidConfig
from weft.server.api.access.files import Opening

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate with those that lead to its authority, and its key, in PEM. client_ca: None, clients show none."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime


def read_pair(cert: Path, key: Path, client_ca: Path | None, opening: Opening) -> Pair:
    """Raises InvalidConfig, in words, where gRPC would fail at each connection."""
    certificate_pem, key_pem = _bytes("--tls-cert", opening(cert)), _bytes("--tls-key", opening(key))
    certificate = _certificates("--tls-cert", cert, certificate_pem)[0]
    if _private_key(key, key_pem).public_key() != _public_key(cert, certificate):
        raise InvalidConfig(f"--tls-key {key} is not the key of --tls-cert {cert}: give the two that belong together")
    client_ca_pem = None
    if client_ca is not None:
        client_ca_pem = _bytes("--tls-client-ca", opening(client_ca))
        _certificates("--tls-client-ca", client_ca, client_ca_pem)
    return Pair(certificate_pem, key_pem, client_ca_pem, certificate.not_valid_after_utc)


class Certificates:
    """The pair that connections from now on are made with."""

    def __init__(self, tell_expiry: Callable[[float], None]) -> None:
        """tell_expiry: is told when each pair expires, in seconds since the epoch."""
        self._tell_expiry = tell_expiry
        self._now: grpc.ServerCertificateConfiguration | None = None
        self._has_client_ca = False

    def use(self, pair: Pair) -> None:
        """Connections that are there already stay as they are."""
        self._now = grpc.ssl_server_certificate_configuration([(pair.key, pair.certificate)], pair.client_ca)
        self._has_client_ca = pair.client_ca is not None
        self._tell_expiry(pair.expires.timestamp())
        if pair.expires <= datetime.now(UTC):
            _log.warning("--tls-cert has expired on %s: clients will refuse it", pair.expires.date())

    def credentials(self) -> grpc.ServerCredentials:
        """For a port; there must be a pair. gRPC asks for it again at each connection, on a thread of its own."""
        return grpc.dynamic_ssl_server_credentials(self._latest(), self._latest, self._has_client_ca)

    def _latest(self) -> grpc.ServerCertificateConfiguration:
        assert self._now is not None, "no certificate was read"
        return self._now


def _bytes(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidConfig(f"{option} {path} can't be read: {error.strerror}") from None


def _certificates(option: str, path: Path, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise InvalidConfig(f"{option} {path} holds no certificate in PEM (-----BEGIN CERTIFICATE-----)") from None


def _public_key(path: Path, certificate: x509.Certificate) -> object:
    try:
        return certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidConfig(f"--tls-cert {path} is for a key of a kind that is not known") from None


def _private_key(path: Path, pem: bytes) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except TypeError:
        raise InvalidConfig(
            f"--tls-key {path} is encrypted: give one without a password, in a file for the server alone"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidConfig(f"--tls-key {path} holds no private key in PEM (-----BEGIN PRIVATE KEY-----)") from None
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise InvalidConfig(f"--tls-key {path} is neither an RSA nor an EC key, which TLS is served with")
    return key
