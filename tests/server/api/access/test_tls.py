"""The server's certificate: what is refused at the start, in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from certificates import Credential, key_pem, make_ca, make_certificate
from cryptography.hazmat.primitives.asymmetric import ed25519

from weft.errors import InvalidConfig
from weft.server.api.access.tls import Certificates, Pair, read_pair


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Certificate, key, and the clients' authority."""
    ca = make_ca()
    cert, key = make_certificate(ca, "server").write(tmp_path, "server")
    client_ca, _ = ca.write(tmp_path, "ca")
    return cert, key, client_ca


def read(cert: Path, key: Path, client_ca: Path | None = None) -> Pair:
    return read_pair(cert, key, client_ca, lambda path: path)


def other() -> Credential:
    return make_certificate(make_ca(), "other")


BAD: dict[str, Callable[[Path, Path, Path], object]] = {
    "--tls-cert .*can't be read: No such file": lambda cert, key, ca: cert.unlink(),
    "--tls-key .*can't be read: No such file": lambda cert, key, ca: key.unlink(),
    "--tls-client-ca .*can't be read: No such file": lambda cert, key, ca: ca.unlink(),
    "--tls-cert .*holds no certificate in PEM": lambda cert, key, ca: cert.write_text("-----BEGIN CERTIFICATE-----\nx"),
    "--tls-key .*holds no private key in PEM": lambda cert, key, ca: key.write_bytes(b"\xff"),
    "--tls-client-ca .*holds no certificate": lambda cert, key, ca: ca.write_text("nothing"),
    "--tls-key .*is not the key of --tls-cert": lambda cert, key, ca: key.write_bytes(other().key_pem),
    "--tls-key .*is encrypted": lambda cert, key, ca: key.write_bytes(key_pem(other().key, b"password")),
    "--tls-key .*is neither an RSA nor an EC key": lambda cert, key, ca: key.write_bytes(
        key_pem(ed25519.Ed25519PrivateKey.generate())
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_each_fault_is_named(good: tuple[Path, Path, Path], words: str) -> None:
    BAD[words](*good)
    with pytest.raises(InvalidConfig, match=words) as raised:
        read(*good)
    assert "\n" not in str(raised.value)
    assert "PRIVATE KEY-----\n" not in str(raised.value)


def test_what_fits_together_is_taken(good: tuple[Path, Path, Path]) -> None:
    cert, key, client_ca = good
    assert read(cert, key).client_ca is None
    assert read(cert, key, client_ca).client_ca == client_ca.read_bytes()


def test_one_that_has_expired_is_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[float] = []
    credential = make_certificate(make_ca(), "server", days=-1)
    with caplog.at_level(logging.WARNING):
        Certificates(told.append).use(read(*credential.write(tmp_path, "server")))
    assert "has expired" in caplog.text
    assert told == [credential.certificate.not_valid_after_utc.timestamp()]
