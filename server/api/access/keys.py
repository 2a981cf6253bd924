"""API keys: long random texts, of which the server knows only the SHA-256.

A key holds 256 random bits, so that nothing slower than one round of SHA-256 is needed: there is nothing to guess.
"""

from __future__ import annotations

import hashlib
import re
import secrets

PREFIX = "weft_"
NUM_BYTES = 32

MIN_CHARACTERS = 32
"""Of a key that somebody else made: shorter ones could be guessed from their hashes."""

MAX_CHARACTERS = 7000
"""Of a key or a token: gRPC takes 8 KiB of metadata in all."""

_KEY = re.compile(r"[!-~]+")
_DIGEST = re.compile(r"[0-9a-f]{64}")


def new_key() -> str:
    """One that nobody has."""
    return PREFIX + secrets.token_urlsafe(NUM_BYTES)


def digest_of(key: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_digest(text: str) -> bool:
    """Whether it can be a key's SHA-256, in hex."""
    return _DIGEST.fullmatch(text) is not None


def can_be_sent(key: str) -> bool:
    """Whether gRPC's metadata can hold it: printable ASCII without spaces."""
    return len(key) <= MAX_CHARACTERS and _KEY.fullmatch(key) is not None
