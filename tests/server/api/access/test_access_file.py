"""The access file: what it may hold, and how each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import InvalidConfig
from weft.server.api.access.access_file import AccessFile, TokenRules, read_access
from weft.server.api.access.quotas import Limits
from weft.server.api.callers import Role

KEY, OTHER = "a" * 64, "b" * 64
GOOD = f'[callers.team-a]\nkey_sha256 = ["{KEY}"]\n'
JWT = '[jwt]\njwks = "keys.json"\nissuer = "https://i"\naudience = "weft"\n'


def read(tmp_path: Path, text: str, *, has_client_ca: bool = True) -> AccessFile:
    path = tmp_path / "access.toml"
    path.write_text(text)
    return read_access(path, has_client_ca=has_client_ca)


def test_a_key_is_enough_and_lets_its_caller_ask(tmp_path: Path) -> None:
    rules = read(tmp_path, GOOD).callers["team-a"]
    assert rules.roles == {Role.INFER}
    assert rules.adapters is None
    assert rules.base
    assert not rules.on_behalf
    assert rules.limits == Limits()
    assert rules.key_sha256 == (KEY,)


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    file = read(
        tmp_path,
        f"""
        share_prefixes = true
        [callers.team-a]
        roles = ["infer", "admin"]
        adapters = ["team-a/*", "shared/*"]
        labels = {{ tenant = "a" }}
        base = false
        sources = ["file:/srv/team-a/*"]
        key_sha256 = ["{KEY}", "{OTHER.upper()}"]
        certificates = ["client-a"]
        requests_per_minute = 600
        tokens_per_minute = 100000
        max_in_flight = 32
        on_behalf = true
        [callers."*"]
        [jwt]
        jwks = "https://issuer.example/jwks.json"
        issuer = "https://issuer.example"
        audience = "weft"
        algorithms = ["ES256"]
        caller_claim = "client_id"
        roles_claim = "weft_roles"
        """,
    )
    rules = file.callers["team-a"]
    assert file.share_prefixes
    assert rules.roles == {Role.INFER, Role.ADMIN}
    assert rules.adapters == ("team-a/*", "shared/*")
    assert rules.labels == {"tenant": "a"}
    assert not rules.base
    assert rules.sources == ("file:/srv/team-a/*",)
    assert rules.key_sha256 == (KEY, OTHER)
    assert rules.certificates == ("client-a",)
    assert rules.limits == Limits(600, 100000, 32)
    assert rules.on_behalf
    url, issuer = "https://issuer.example/jwks.json", "https://issuer.example"
    assert file.tokens == TokenRules(url, issuer, "weft", ("ES256",), "client_id", "weft_roles")


def test_a_file_of_keys_lies_beside_it(tmp_path: Path) -> None:
    tokens = read(tmp_path, f"{JWT}[callers.x]\n").tokens
    assert tokens is not None
    assert tokens.jwks == tmp_path / "keys.json"
    assert tokens.algorithms == ("RS256", "ES256")
    assert tokens.caller_claim == "sub"


WRONG = {
    "= 1": "can't be read: is no TOML",
    "a = " + "1" * 5000: "can't be read: is no TOML that can be taken in",
    "a = " + "[" * 5000: "can't be read: is no TOML that can be taken in",
    "": "callers is empty: nobody could call",
    "[callers]\n": "callers is empty",
    "callers = 1": "callers must be a table",
    f"share_prefix = true\n{GOOD}": "share_prefix is no key; did you mean 'share_prefixes'?",
    f"{GOOD}role = ['read']": "callers.team-a.role is no key; did you mean 'roles'?",
    f"{GOOD}key-sha256 = []": "callers.team-a.key-sha256 is no key; did you mean 'key_sha256'?",
    f"{GOOD}zzz = 1": "callers.team-a.zzz is no key; the keys are roles, adapters,",
    f"{GOOD}{JWT}audiences = 'x'": "jwt.audiences is no key; did you mean 'audience'?",
    f"{GOOD}roles = ['reed']": "callers.team-a.roles holds what is none of infer, read, admin; did you mean 'read'?",
    f"{GOOD}roles = []": "callers.team-a.roles is empty; must name some of infer, read, admin",
    f"{GOOD}roles = 'read'": "callers.team-a.roles must be a list of texts",
    f"{GOOD}base = 'no'": "callers.team-a.base must be true or false",
    f"{GOOD}max_in_flight = 0": "callers.team-a.max_in_flight must be a whole number from 1 to",
    f"{GOOD}requests_per_minute = true": "callers.team-a.requests_per_minute must be a whole number",
    f"{GOOD}tokens_per_minute = 1.5": "callers.team-a.tokens_per_minute must be a whole number",
    f"{GOOD}labels = {{ tenant = 1 }}": "callers.team-a.labels must hold labels, each a text",
    f"{GOOD}labels = {{}}": "callers.team-a.labels must hold labels",
    f"{GOOD}adapters = []\nbase = false": "callers.team-a.adapters is empty, and base is false",
    f"{GOOD}sources = ['file:*']": "callers.team-a.sources is of no use without the role admin or read",
    f"{GOOD}certificates = ['']": "callers.team-a.certificates holds an empty name",
    "[callers.x]\n": "callers.x can't prove who it is: give it key_sha256 or certificates, or add [jwt]",
    '[callers."*"]\n': 'callers."*" stands for all other callers of tokens, which needs [jwt]',
    f'{JWT}[callers."*"]\nkey_sha256 = ["{KEY}"]': "stands for all other callers of tokens, and can't have keys",
    f'{GOOD}[callers.b]\nkey_sha256 = ["{KEY}"]': "callers.b.key_sha256 holds one that 'team-a' has too",
    "[callers.a]\ncertificates = ['c']\n[callers.b]\ncertificates = ['c']": "certificates holds one that 'a' has too",
    f"{GOOD}[jwt]\n": "jwt.jwks is missing",
    f"{GOOD}{JWT}algorithms = ['none']": "jwt.algorithms holds what is none of RS256,",
    f"{GOOD}{JWT}algorithms = ['HS256']": "jwt.algorithms holds what is none of RS256,",
    f"{GOOD}{JWT.replace('weft', '')}": "jwt.audience must be a text that is not empty",
    f"{GOOD}{JWT.replace('keys.json', 'http://issuer.example/keys')}": "jwt.jwks must be a file or an https URL",
    f"{GOOD}{JWT.replace('keys.json', 'https://[issuer/keys')}": "jwt.jwks is no URL",
    f"{GOOD}{JWT.replace('keys.json', 'ftp://issuer.example/keys')}": "jwt.jwks must be a file or an https URL",
    f'[callers."a\\nb"]\nkey_sha256 = ["{KEY}"]': "is no caller's name",
}


@pytest.mark.parametrize("text", WRONG)
def test_each_mistake_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidConfig) as raised:
        read(tmp_path, text)
    assert WRONG[text] in str(raised.value)
    assert str(raised.value).startswith("--access ")
    assert str(tmp_path / "access.toml") in str(raised.value)


def test_certificates_need_who_signs_them(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"callers\.a\.certificates needs --tls-client-ca, which is not given"):
        read(tmp_path, "[callers.a]\ncertificates = ['c']", has_client_ca=False)


def test_a_key_in_the_place_of_its_hash_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="make one with `weft keys hash`") as raised:
        read(tmp_path, '[callers.a]\nkey_sha256 = ["weft_secret"]')
    assert "weft_secret" not in str(raised.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="can't be read: No such file"):
        read_access(tmp_path / "none.toml", has_client_ca=False)


def test_a_file_of_other_bytes_is_named(tmp_path: Path) -> None:
    (tmp_path / "access.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidConfig, match="is not UTF-8"):
        read_access(tmp_path / "access.toml", has_client_ca=False)
