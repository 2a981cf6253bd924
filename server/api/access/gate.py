"""The gate: from what a client shows to the caller that it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import grpc

from weft.errors import PermissionDenied, Unauthenticated
from weft.server.api.access.access_file import EVERYBODY_ELSE, AccessFile, CallerRules
from weft.server.api.access.jwks import Keys
from weft.server.api.access.keys import MAX_CHARACTERS
from weft.server.api.access.quotas import Quotas
from weft.server.api.access.tokens import Tokens
from weft.server.api.callers import ANYBODY, Caller, Role

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

AUTHORIZATION = "authorization"
API_KEY = "x-api-key"

_HOW = f"send `{AUTHORIZATION}: Bearer KEY` as metadata"
_INFERENCE = "/weft.v1.InferenceService/"
_ADAPTERS = "/weft.v1.AdapterService/"

ROLE_OF: Mapping[str, Role] = {
    **{
        f"{_INFERENCE}{method}": Role.INFER
        for method in ("Generate", "StreamGenerate", "Score", "Classify", "Embed", "Tokenize", "Detokenize")
    },
    **{
        f"{_ADAPTERS}{method}": Role.READ
        for method in ("GetAdapter", "ListAdapters", "WatchAdapters", "CheckAdapter", "PlanCapacity")
    },
    **{f"{_ADAPTERS}{method}": Role.ADMIN for method in ("CreateAdapter", "UpdateAdapter", "DeleteAdapter")},
}
"""What each method takes. GetServerInfo takes none; what is not listed takes ADMIN."""

ANY_ROLE = frozenset({"/weft.v1.ServerService/GetServerInfo"})


def check_role(caller: Caller, method: str) -> None:
    """Raises PermissionDenied."""
    role = ROLE_OF.get(method, Role.ADMIN)
    if method in ANY_ROLE or role in caller.roles or (role is Role.READ and Role.ADMIN in caller.roles):
        return
    raise PermissionDenied(
        f"caller {caller.name!r} does not have the role {role.value!r}, which {method.rpartition('/')[2]} takes"
    )


@dataclass(frozen=True, slots=True)
class Rules:
    """An access file, ready to be asked. by_key: callers by the SHA-256 of their keys; by_certificate: by its names."""

    by_key: Mapping[bytes, Caller]
    by_certificate: Mapping[str, Caller]
    tokens: Tokens | None = None

    @classmethod
    def of(cls, file: AccessFile, keys: Keys | None, quotas: Quotas) -> Rules:
        """keys: that tokens are signed with, where the file takes tokens."""

        def caller_of(name: str, roles: frozenset[Role] | None = None) -> Caller | None:
            rules = file.callers.get(name) or file.callers.get(EVERYBODY_ELSE)
            if rules is None:
                return None
            caller = _caller(name, rules, quotas, own_prefixes=not file.share_prefixes)
            return caller if roles is None else replace(caller, roles=caller.roles & roles)

        callers = {name: caller for name in file.callers if (caller := caller_of(name)) is not None}
        return cls(
            {bytes.fromhex(key): callers[name] for name, rules in file.callers.items() for key in rules.key_sha256},
            {shown: callers[name] for name, rules in file.callers.items() for shown in rules.certificates},
            Tokens(file.tokens, keys, caller_of) if file.tokens is not None and keys is not None else None,
        )


def _caller(name: str, rules: CallerRules, quotas: Quotas, *, own_prefixes: bool) -> Caller:
    is_limited = rules.adapters is not None or bool(rules.labels)
    return Caller(
        name=name,
        roles=rules.roles,
        patterns=(rules.adapters or ()) if is_limited else None,
        labels=rules.labels,
        base=rules.base,
        sources=(rules.sources or ()) if is_limited else rules.sources,
        on_behalf=rules.on_behalf,
        own_prefixes=own_prefixes,
        quota=quotas.of(name, rules.limits),
    )


@dataclass(slots=True)
class Gate:
    """Open where there are no rules and no client certificates; else everybody is somebody.

    has_client_ca: clients show certificates; without rules, whoever does may do everything. rules: may be replaced.
    """

    has_client_ca: bool = False
    rules: Rules | None = field(default=None)

    async def authenticate(self, context: Context) -> Caller:
        """Who calls. Raises Unauthenticated, and Unavailable where tokens can't be checked just now."""
        if self.rules is None:
            return self._of_any_certificate(context) if self.has_client_ca else ANYBODY
        secret = _secret(context)
        if secret:
            return await _of_secret(self.rules, secret)
        return self._of_certificate(self.rules, context)

    def _of_certificate(self, rules: Rules, context: Context) -> Caller:
        if not self.has_client_ca:
            raise Unauthenticated(f"no credentials: {_HOW}")
        shown = {rules.by_certificate[name].name: name for name in _names(context) if name in rules.by_certificate}
        if len(shown) > 1:
            raise Unauthenticated("the client certificate names several callers")
        if not shown:
            raise Unauthenticated(f"the client certificate names nobody who may call, and there is no key: {_HOW}")
        return rules.by_certificate[next(iter(shown.values()))]

    def _of_any_certificate(self, context: Context) -> Caller:
        names = _names(context)
        if not names:
            raise Unauthenticated("the client certificate names nobody: it needs a common or alternative name")
        return Caller(names[0], on_behalf=True, own_prefixes=True)


def _secret(context: Context) -> str:
    """The key or token in the metadata; empty where there is none."""
    given = [(key, str(value)) for key, value in context.invocation_metadata() or () if key in (AUTHORIZATION, API_KEY)]
    if not given:
        return ""
    if len(given) > 1:
        raise Unauthenticated(f"there are several credentials in the metadata; {_HOW}, once")
    ((key, value),) = given
    if key == AUTHORIZATION:
        scheme, _, value = value.partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated(f"{AUTHORIZATION} is not of the form that is taken: {_HOW}")
    value = value.strip()
    if not value or len(value) > MAX_CHARACTERS:
        raise Unauthenticated(f"{key} holds no key and no token: {_HOW}")
    return value


async def _of_secret(rules: Rules, secret: str) -> Caller:
    caller = rules.by_key.get(hashlib.sha256(secret.encode()).digest())
    if caller is not None:
        return caller
    if rules.tokens is not None and secret.count(".") == 2:
        return await rules.tokens.caller(secret)
    raise Unauthenticated("the key is not known here")


def _names(context: Context) -> list[str]:
    """Of the client's certificate: the common name, then the alternative ones."""
    shown: Mapping[str, Any] = context.auth_context()
    names = (*shown.get("x509_common_name", ()), *shown.get("x509_subject_alternative_name", ()))
    return [name.decode(errors="replace") for name in names if name]
