"""Remote folders and the prefixes that allow them: one spelling each, compared segment by segment."""

from __future__ import annotations

import pytest

from weft.adapters.locations import Location, parse_location, parse_prefix, without_secrets


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("hf:org/repo", Location("hf", "", ("org", "repo"), "main")),
        ("hf:org/repo@v1.0", Location("hf", "", ("org", "repo"), "v1.0")),
        ("hf:org/repo@refs/pr/3", Location("hf", "", ("org", "repo"), "refs/pr/3")),
        ("hf:org/repo/sub/folder@main", Location("hf", "", ("org", "repo", "sub", "folder"), "main")),
        ("https://host/a/b", Location("https", "host", ("a", "b"))),
        ("https://host/a/b/", Location("https", "host", ("a", "b"))),
        ("https://host:443/a", Location("https", "host", ("a",))),
        ("https://host:8443/a", Location("https", "host:8443", ("a",))),
        ("https://host", Location("https", "host", ())),
        ("http://127.0.0.1:80/a", Location("http", "127.0.0.1", ("a",))),
        ("http://[::1]:8000/a", Location("http", "[::1]:8000", ("a",))),
        ("s3://my.bucket/loras/x", Location("s3", "my.bucket", ("loras", "x"))),
        ("gs://my_bucket/x", Location("gs", "my_bucket", ("x",))),
    ],
)
def test_what_a_source_says(text: str, location: Location) -> None:
    assert parse_location(text) == location


def test_a_source_may_say_which_weights_it_means() -> None:
    assert parse_location(f"s3://bucket/x#sha256={'0f' * 32}") == Location("s3", "bucket", ("x",), sha256="0f" * 32)


@pytest.mark.parametrize("text", ["hf:org/repo@main", "https://host:8443/a/b", f"gs://bucket/x#sha256={'a' * 64}"])
def test_it_is_written_as_it_is_read(text: str) -> None:
    assert str(parse_location(text)) == text


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("hf:org/repo@v1#sha256=00", "hf:org/repo@v1#sha256=00"),
        ("file:/a@b/c", "file:/a@b/c"),
        ("https://host/a", "https://host/a"),
        ("https://me:hunter2@host/a", "https://***@host/a"),
        ("https://me:hunt/er@2@host/a", "https://***@host/a"),
        ("https://me:hun\nter2@host/a", "https://***@host/a"),
        ("https://host/a?X-Amz-Signature=0a\n1b", "https://host/a?***"),
        ("s3://key:secret@bucket/a?versionId=1", "s3://***@bucket/a?***"),
    ],
)
def test_what_may_be_a_secret_is_not_shown(asked: str, shown: str) -> None:
    assert without_secrets(asked) == shown


@pytest.mark.parametrize(
    ("prefix", "source"),
    [
        ("hf:", "hf:org/repo"),
        ("hf:my-org", "hf:my-org/repo"),
        ("hf:my-org/", "hf:my-org/repo@dev"),
        ("hf:my-org/repo", "hf:my-org/repo/sub"),
        ("https://models.example.com", "https://models.example.com/x"),
        ("https://models.example.com/loras", "https://models.example.com/loras/x"),
        ("https://models.example.com/loras/", "https://models.example.com:443/loras/x/y"),
        ("s3://bucket/prefix/", "s3://bucket/prefix/x"),
        ("s3://bucket", "s3://bucket/x"),
    ],
)
def test_what_a_prefix_allows(prefix: str, source: str) -> None:
    assert parse_location(source).is_under(parse_prefix(prefix))


@pytest.mark.parametrize(
    ("prefix", "source"),
    [
        ("hf:my-org", "hf:my-org-evil/repo"),
        ("hf:my-org", "hf:My-Org/repo"),
        ("hf:my-org/repo", "hf:my-org/repo2"),
        ("https://good.example.com", "https://good.example.com.evil.net/x"),
        ("https://good.example.com", "https://evil.good.example.com/x"),
        ("https://good.example.com", "http://good.example.com/x"),
        ("https://good.example.com", "https://good.example.com:8443/x"),
        ("https://good.example.com/loras", "https://good.example.com/loras-evil/x"),
        ("https://good.example.com/loras", "https://good.example.com/x/loras"),
        ("https://good.example.com/Loras", "https://good.example.com/loras/x"),
        ("s3://bucket", "gs://bucket/x"),
        ("s3://bucket", "s3://bucket2/x"),
        ("s3://bucket/prefix", "s3://bucket/prefix2/x"),
        ("s3://bucket/prefix", "s3://bucket"),
        ("hf:", "https://huggingface.co/org/repo"),
    ],
)
def test_what_a_prefix_does_not_allow(prefix: str, source: str) -> None:
    assert not parse_location(source).is_under(parse_prefix(prefix))


@pytest.mark.parametrize(
    "prefix",
    ["https:", "https://", "http:", "s3:", "gs://", "ftp://host/", "hf:org@main", "hf:../x", "https://h/..", ""],
)
def test_a_prefix_names_a_place(prefix: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_prefix(prefix)


@pytest.mark.parametrize(
    ("source", "is_loopback"),
    [
        ("http://127.0.0.1/x", True),
        ("http://127.9.9.9:80/x", True),
        ("http://[::1]/x", True),
        ("http://0.0.0.0/x", True),
        ("https://localhost:8443/x", True),
        ("https://a.localhost/x", True),
        ("https://localhost.example.com/x", False),
        ("https://10.0.0.1/x", False),
        ("hf:org/repo", False),
    ],
)
def test_this_machine_is_known_by_all_its_names(source: str, is_loopback: bool) -> None:
    assert parse_location(source).is_loopback is is_loopback
