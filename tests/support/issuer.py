"""An issuer of tokens: its keys, its JWKS, and tokens as they should and should not be."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

ISSUER, AUDIENCE = "https://issuer.example", "weft"


class Issuer:
    """Signs by RS256 under the key id "rsa", by ES256 under "ec"."""

    def __init__(self) -> None:
        self.rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.ec = ec.generate_private_key(ec.SECP256R1())

    @property
    def keys(self) -> list[dict[str, Any]]:
        """Its public keys."""
        return [
            {**RSAAlgorithm.to_jwk(self.rsa.public_key(), as_dict=True), "kid": "rsa", "use": "sig"},
            {**ECAlgorithm.to_jwk(self.ec.public_key(), as_dict=True), "kid": "ec", "alg": "ES256"},
        ]

    @property
    def jwks(self) -> bytes:
        return json.dumps({"keys": self.keys}).encode()

    def token(
        self,
        subject: str = "team-a",
        *,
        algorithm: str = "RS256",
        kid: str | None = None,
        without: str = "",
        **claims: Any,
    ) -> str:
        """Good for an hour unless told otherwise. without: a claim to leave out."""
        key = self.ec if algorithm.startswith("ES") else self.rsa
        headers = {"kid": kid or ("ec" if key is self.ec else "rsa")}
        whole: Mapping[str, Any] = {
            "sub": subject,
            "iss": ISSUER,
            "aud": AUDIENCE,
            "exp": int(time.time()) + 3600,
            **claims,
        }
        kept = {name: value for name, value in whole.items() if name != without}
        return jwt.encode(kept, key, algorithm=algorithm, headers=headers)
