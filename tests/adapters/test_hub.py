"""Adapters from a hub: huggingface_hub itself against a server on loopback that speaks as a hub does."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from huggingface_hub.constants import DOWNLOAD_CHUNK_SIZE
from web import Web, serving

from weft.adapters.downloads import Limits
from weft.adapters.hub import Hub
from weft.adapters.locations import parse_location
from weft.errors import InvalidAdapter, Unavailable

FIRST, SECOND = "a" * 40, "b" * 40
WEIGHTS = bytes(range(256)) * 4096
AT = f"/org/repo/resolve/{FIRST}/adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "adapter_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture
def web(folder: Path) -> Iterator[Web]:
    with serving() as web:
        web.publish(folder, "org/repo", FIRST, "main", "v1")
        yield web


def fetch(web: Web, cache: Path, source: str = "hf:org/repo", limits: Limits | None = None) -> Path:
    return Hub(cache, limits or Limits(), web.url).fetch(parse_location(source))


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_the_two_files_of_one_commit_come_and_nothing_else(web: Web, tmp_path: Path) -> None:
    folder = fetch(web, tmp_path / "cache")
    assert folder.name == FIRST
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert weights(folder) == WEIGHTS
    assert not [seen.path for seen in web.seen if seen.path.endswith(".bin")]
    assert all(FIRST in seen.path for seen in web.gets()), (
        "the files are of one commit, whatever main becomes meanwhile"
    )


@pytest.mark.parametrize("source", ["hf:org/repo@v1", f"hf:org/repo@{FIRST}", "hf:org/repo@main"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(web: Web, tmp_path: Path, source: str) -> None:
    assert fetch(web, tmp_path / "cache", source).name == FIRST


def test_an_adapter_may_lie_in_a_folder_of_the_repository(web: Web, folder: Path, tmp_path: Path) -> None:
    for revision in (FIRST, "main"):
        at = f"/org/repo/resolve/{revision}/loras/x"
        web.hold(folder, at)
        web.headers |= {f"{at}/{path.name}": {"X-Repo-Commit": FIRST} for path in folder.iterdir()}
    assert fetch(web, tmp_path / "cache", "hf:org/repo/loras/x").parts[-3:] == (FIRST, "loras", "x")


def test_a_commit_that_is_here_needs_no_network(web: Web, tmp_path: Path) -> None:
    source = f"hf:org/repo@{FIRST}"
    folder = fetch(web, tmp_path / "cache", source)
    web.seen.clear()
    assert fetch(web, tmp_path / "cache", source) == folder
    assert web.seen == []


def test_a_branch_that_moved_gives_its_new_commit(web: Web, folder: Path, tmp_path: Path) -> None:
    old = fetch(web, tmp_path / "cache")
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS[::-1])
    web.publish(folder, "org/repo", SECOND, "main")
    new = fetch(web, tmp_path / "cache")
    assert (new.name, weights(new), weights(old)) == (SECOND, WEIGHTS[::-1], WEIGHTS)


def test_a_download_that_broke_off_goes_on(web: Web, tmp_path: Path) -> None:
    whole = WEIGHTS * 12
    web.files[AT] = whole
    web.cuts[AT] = [len(whole) - 1]
    assert weights(fetch(web, tmp_path / "cache")) == whole
    assert [seen.headers.get("Range") for seen in web.gets(AT)] == [None, f"bytes={DOWNLOAD_CHUNK_SIZE}-"]


def test_a_download_that_drips_is_given_up(web: Web, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"hf:org/repo@main comes too slowly \(2 bytes in 90 s\): try again"):
        fetch(web, tmp_path / "cache", limits=Limits(clock=count(0, 90).__next__))


def test_the_token_goes_along(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(web, tmp_path / "cache")
    assert {seen.headers["authorization"] for seen in web.seen} == {"Bearer hf_secret"}


class TestRefusals:
    def test_what_is_too_large_is_not_fetched(self, web: Web, tmp_path: Path) -> None:
        with pytest.raises(InvalidAdapter, match=rf"has {len(WEIGHTS):,} bytes or more; 1,000 are allowed"):
            fetch(web, tmp_path / "cache", limits=Limits(max_bytes=1000))
        assert web.gets() == []

    def test_what_turns_out_too_large_is_stopped(self, web: Web, tmp_path: Path) -> None:
        web.endless.add(AT)
        with pytest.raises((InvalidAdapter, Unavailable)):
            fetch(web, tmp_path / "cache", limits=Limits(max_bytes=2_000_000))

    def test_content_that_is_not_what_the_hub_promised(self, web: Web, tmp_path: Path) -> None:
        promised = "0" * 64
        web.headers[AT] |= {"ETag": f'"{promised}"'}
        for _ in range(2):
            with pytest.raises(
                InvalidAdapter, match=f"has SHA-256 {hashlib.sha256(WEIGHTS).hexdigest()}; it must be 0000"
            ):
                fetch(web, tmp_path / "cache")

    @pytest.mark.parametrize("source", ["hf:org/repo", f"hf:org/repo@{FIRST}"])
    def test_content_that_is_not_what_the_source_asks_for(self, web: Web, tmp_path: Path, source: str) -> None:
        right = hashlib.sha256(WEIGHTS).hexdigest()
        folder = fetch(web, tmp_path / "cache", f"{source}#sha256={right}")
        with pytest.raises(InvalidAdapter, match="it must be 1111"):
            fetch(web, tmp_path / "cache", f"{source}#sha256={'1' * 64}")
        assert fetch(web, tmp_path / "cache", f"{source}#sha256={right}") == folder

    @pytest.mark.parametrize(
        ("status", "code", "words"),
        [
            (404, "EntryNotFound", "lacks adapter_config.json or adapter_model.safetensors"),
            (404, "RevisionNotFound", "has no such revision"),
            (404, "RepoNotFound", "no repository that the server may read"),
            (401, "RepoNotFound", "no repository that the server may read"),
            (403, "GatedRepo", "is gated: give the server an HF_TOKEN"),
            (403, "", "403"),
        ],
    )
    def test_what_the_hub_does_not_give(self, web: Web, tmp_path: Path, status: int, code: str, words: str) -> None:
        path = "/org/repo/resolve/main/adapter_config.json"
        web.statuses[path] = status
        web.headers[path] = {"X-Error-Code": code}
        with pytest.raises(InvalidAdapter, match=words) as raised:
            fetch(web, tmp_path / "cache")
        assert "\n" not in str(raised.value)

    def test_a_name_that_no_repository_has(self, web: Web, tmp_path: Path) -> None:
        with pytest.raises(InvalidAdapter, match="HFValidationError"):
            fetch(web, tmp_path / "cache", "hf:org/re--po")

    @pytest.mark.parametrize(
        "headers", [{}, {"X-Repo-Commit": "../../evil"}, {"X-Repo-Commit": FIRST, "ETag": '"../../../evil"'}]
    )
    def test_a_server_that_is_no_hub(self, web: Web, tmp_path: Path, headers: dict[str, str]) -> None:
        web.headers["/org/repo/resolve/main/adapter_config.json"] = headers
        with pytest.raises(InvalidAdapter, match="does not answer as a hub does: look at HF_ENDPOINT"):
            fetch(web, tmp_path / "cache")
        assert not list(tmp_path.rglob("*evil*"))

    def test_a_hub_in_trouble_may_be_asked_again(self, web: Web, tmp_path: Path) -> None:
        web.statuses["/org/repo/resolve/main/adapter_config.json"] = 503
        with pytest.raises(Unavailable, match=r"hf:org/repo@main can't be fetched now \(.*503.*: try again"):
            fetch(web, tmp_path / "cache")

    def test_a_hub_that_is_not_there_may_be_asked_again(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(Unavailable, match=r"hf:org/repo@main can't be fetched now .*ConnectError"):
            Hub(tmp_path, Limits(), url).fetch(parse_location("hf:org/repo"))


def test_progress_is_told(web: Web, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int | None]] = []
    fetch(web, tmp_path / "cache", limits=Limits(on_progress=lambda *told: heard.append(told)))
    assert heard[-1] == ("hf:org/repo@main", len(WEIGHTS), len(WEIGHTS))


def test_fetches_of_one_source_at_once_are_one_download(web: Web, tmp_path: Path) -> None:
    all_here = threading.Barrier(3)

    def work(_: int) -> Path:
        all_here.wait()
        return fetch(web, tmp_path / "cache")

    with ThreadPoolExecutor(3) as pool:
        assert len(set(pool.map(work, range(3)))) == 1
    assert len(web.gets(AT)) == 1


def test_a_classifiers_labels_come_with_it_and_nobody_elses_config(folder: Path, web: Web, tmp_path: Path) -> None:
    (folder / "config.json").write_text('{"num_labels": 3}')
    web.publish(folder, "org/repo", FIRST)
    assert not (fetch(web, tmp_path / "plain") / "config.json").exists()
    (folder / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    web.publish(folder, "org/repo", FIRST, "main")
    for _ in range(2):
        fetched = fetch(web, tmp_path / "cache", f"hf:org/repo@{FIRST}")
        assert (fetched / "config.json").read_text() == '{"num_labels": 3}'
        web.files.clear()


def test_that_a_classifier_has_no_labels_is_known_without_the_network(folder: Path, web: Web, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    web.publish(folder, "org/repo", FIRST)
    absent = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": FIRST}
    web.headers[f"/org/repo/resolve/{FIRST}/config.json"] = absent
    source = f"hf:org/repo@{FIRST}"
    fetched = fetch(web, tmp_path / "cache", source)
    assert {path.name for path in fetched.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    web.seen.clear()
    assert fetch(web, tmp_path / "cache", source) == fetched
    assert not web.seen
