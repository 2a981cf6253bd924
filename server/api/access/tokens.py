"""JWTs: who signed them, for whom, until when, and who they say is calling."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jwt
from jwt import exceptions as errors

from weft.errors import Unauthenticated
from weft.server.api.access.access_file import MAX_NAME_CHARACTERS, TokenRules
from weft.server.api.access.jwks import Keys
from weft.server.api.callers import Caller, Role

MAX_CACHED = 4096
"""Tokens that were checked before and are known until they expire, or there are other keys."""

FAR_OFF_S = 1 << 40
"""Seconds since the epoch, after which it is all the same when a token expires."""

LEEWAY_S = 10.0
"""By which two machines' clocks may differ."""

_REASONS: tuple[tuple[type[errors.PyJWTError], str], ...] = (
    (errors.ExpiredSignatureError, "has expired"),
    (errors.ImmatureSignatureError, "is not valid yet"),
    (errors.InvalidAudienceError, "is for another audience"),
    (errors.InvalidIssuerError, "is from another issuer"),
    (errors.InvalidSignatureError, "has a signature that does not hold"),
    (errors.InvalidAlgorithmError, "is signed by an algorithm that is not accepted"),
)
"""The first that fits is told; any other error means a malformed token."""

CallerOf = Callable[[str, frozenset[Role] | None], Caller | None]
"""The caller of a name, and with no more than these roles, where they are given; None, nobody of this name."""


class Tokens:
    """Checks tokens by one set of rules; all on the event loop."""

    def __init__(
        self, rules: TokenRules, keys: Keys, caller_of: CallerOf, now: Callable[[], float] = time.time
    ) -> None:
        """now: seconds since the epoch, for tokens that were checked before, and for how long they hold."""
        self._rules = rules
        self._keys = keys
        self._caller_of = caller_of
        self._now = now
        self._cached: OrderedDict[bytes, tuple[int, int, Caller]] = OrderedDict()

    async def caller(self, token: str) -> Caller:
        """Raises Unauthenticated, and Unavailable where the keys can't be had."""
        digest = hashlib.sha256(token.encode()).digest()
        known = self._cached.get(digest)
        if known is not None and self._now() < known[0] and known[1] == self._keys.num_taken:
            return known[2]
        claims = await self._claims(token)
        exp = min(int(claims["exp"]), FAR_OFF_S)
        caller = replace(self._named(claims), left_s=lambda: exp + LEEWAY_S - self._now())
        self._cached[digest] = exp, self._keys.num_taken, caller
        if len(self._cached) > MAX_CACHED:
            self._cached.popitem(last=False)
        return caller

    async def _claims(self, token: str) -> Mapping[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
        except (errors.PyJWTError, RecursionError):
            raise Unauthenticated("the token is malformed") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in self._rules.algorithms:
            raise Unauthenticated("the token is signed by an algorithm that is not accepted")
        key = await self._keys.find(kid, algorithm)
        if key is None:
            raise Unauthenticated("the token is signed with a key that is not known here")
        try:
            return jwt.decode(
                token,
                key,
                algorithms=[algorithm],
                audience=self._rules.audience,
                issuer=self._rules.issuer,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", self._rules.caller_claim]},
            )
        except errors.MissingRequiredClaimError as error:
            raise Unauthenticated(f"the token has no {error.claim}") from None
        except errors.PyJWTError as error:
            reason = next((words for kind, words in _REASONS if isinstance(error, kind)), "is malformed")
            raise Unauthenticated(f"the token {reason}") from None

    def _named(self, claims: Mapping[str, Any]) -> Caller:
        claim = self._rules.caller_claim
        name = claims[claim]
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
            raise Unauthenticated(f"the token's {claim} is no name: 1 to {MAX_NAME_CHARACTERS} printable characters")
        caller = self._caller_of(name, self._roles(claims))
        if caller is None:
            raise Unauthenticated(f"the token's {claim} names nobody who may call")
        return caller

    def _roles(self, claims: Mapping[str, Any]) -> frozenset[Role] | None:
        """Those that the token claims, as a list or parted by spaces; others are somebody else's."""
        if not self._rules.roles_claim:
            return None
        claimed = claims.get(self._rules.roles_claim, ())
        words = claimed.split() if isinstance(claimed, str) else claimed if isinstance(claimed, list | tuple) else ()
        return frozenset(role for role in Role if role in words)
