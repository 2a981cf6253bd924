"""Adapters from a web server: resumed, checked, bounded, and never led to where a source may not lead."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from web import Web, serving

from weft.adapters.downloads import Limits, ProgressLog
from weft.adapters.sources import RemoteSettings, Sources
from weft.errors import InvalidAdapter, Unavailable

CONFIG = b'{"r": 8}'
WEIGHTS = bytes(range(256)) * 4096
AT = "/loras/x/adapter_model.safetensors"
CONFIG_AT = "/loras/x/adapter_config.json"


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as web:
        web.files |= {AT: WEIGHTS, CONFIG_AT: CONFIG, "/loras/x/adapter_model.bin": b"a pickle"}
        yield web


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def sources(web: Web, cache: Path, *more: str, limits: Limits | None = None) -> Sources:
    return Sources([], RemoteSettings((f"{web.url}/loras/", *more), cache, limits or Limits()))


def fetch(web: Web, cache: Path, *more: str, limits: Limits | None = None) -> Path:
    return sources(web, cache, *more, limits=limits).fetch(f"{web.url}/loras/x")


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def leftovers(cache: Path) -> list[str]:
    """What lies in the cache besides whole copies."""
    kept = ("lock", "latest.json", "adapter_config.json", "adapter_model.safetensors")
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.name not in kept)


def test_the_two_files_come_and_nothing_else(web: Web, cache: Path) -> None:
    folder = fetch(web, cache)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "adapter_config.json": CONFIG,
        "adapter_model.safetensors": WEIGHTS,
    }
    assert {seen.path for seen in web.seen} == {AT, CONFIG_AT}
    assert leftovers(cache) == []


def test_what_has_not_changed_is_not_sent_again(web: Web, cache: Path) -> None:
    folder = fetch(web, cache)
    web.seen.clear()
    assert fetch(web, cache) == folder
    assert [seen.headers["If-None-Match"] for seen in web.gets(AT)] == [f'"{hashlib.sha256(WEIGHTS).hexdigest()}"']


def test_a_new_version_lies_in_a_folder_of_its_own(web: Web, cache: Path) -> None:
    old = fetch(web, cache)
    web.files[AT] = WEIGHTS[::-1]
    new = fetch(web, cache)
    assert (weights(old), weights(new)) == (WEIGHTS, WEIGHTS[::-1])
    assert fetch(web, cache) == new


def test_a_new_config_alone_is_a_new_version(web: Web, cache: Path) -> None:
    old = fetch(web, cache)
    web.files[CONFIG_AT] = b'{"r": 4}'
    web.seen.clear()
    new = fetch(web, cache)
    assert new != old
    assert (new / "adapter_config.json").read_bytes() == b'{"r": 4}'
    assert weights(new) == WEIGHTS


class TestResuming:
    def test_it_goes_on_where_it_broke_off(self, web: Web, cache: Path) -> None:
        web.cuts[AT] = [1000, 5000]
        assert weights(fetch(web, cache)) == WEIGHTS
        first, second, third = web.gets(AT)
        assert "Range" not in first.headers
        assert [seen.headers["Range"] for seen in (second, third)] == ["bytes=1000-", "bytes=6000-"]
        assert second.headers["If-Range"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'

    def test_it_goes_on_in_another_process(self, web: Web, cache: Path) -> None:
        web.cuts[AT] = [1000, 0]
        with pytest.raises(
            Unavailable, match=r"adapter_model.safetensors of http://.* can't be fetched now .*: try again"
        ):
            fetch(web, cache)
        assert leftovers(cache) == ["adapter_model.safetensors.part", "adapter_model.safetensors.part.version"]
        web.seen.clear()
        assert weights(fetch(web, cache)) == WEIGHTS
        (seen,) = web.gets(AT)
        assert seen.headers["Range"] == "bytes=1000-"
        assert leftovers(cache) == []

    def test_a_version_that_changed_meanwhile_starts_again(self, web: Web, cache: Path) -> None:
        web.cuts[AT] = [1000, 0]
        with pytest.raises(Unavailable):
            fetch(web, cache)
        web.files[AT] = WEIGHTS[::-1]
        assert weights(fetch(web, cache)) == WEIGHTS[::-1]

    def test_a_part_that_is_longer_than_the_file_starts_again(self, web: Web, cache: Path) -> None:
        web.headers[AT] = {"ETag": '"same"'}
        web.cuts[AT] = [1000, 0]
        with pytest.raises(Unavailable):
            fetch(web, cache)
        web.files[AT] = b"short"
        assert weights(fetch(web, cache)) == b"short"

    def test_a_server_without_ranges_sends_it_whole(self, web: Web, cache: Path) -> None:
        web.has_ranges = False
        web.cuts[AT] = [1000]
        assert weights(fetch(web, cache)) == WEIGHTS

    def test_without_an_etag_nothing_is_pieced_together(self, web: Web, cache: Path) -> None:
        web.has_etags = False
        web.cuts[AT] = [1000]
        with pytest.raises(Unavailable):
            fetch(web, cache)
        assert weights(fetch(web, cache)) == WEIGHTS
        assert all("Range" not in seen.headers for seen in web.seen)

    def test_a_weak_etag_is_none(self, web: Web, cache: Path) -> None:
        web.headers[AT] = {"ETag": 'W/"1"'}
        fetch(web, cache)
        web.files[AT] = b"other bytes, called the same"
        assert weights(fetch(web, cache)) == b"other bytes, called the same"

    def test_a_server_that_always_breaks_off_is_given_up(self, web: Web, cache: Path) -> None:
        web.cuts[AT] = [1] * 100
        with pytest.raises(Unavailable):
            fetch(web, cache)
        assert len(web.gets(AT)) == 10

    def test_one_that_drips_is_given_up_and_goes_on_later(self, web: Web, cache: Path) -> None:
        web.files[AT] = WEIGHTS * 8
        with pytest.raises(Unavailable, match=r"adapter_model\.safetensors .* too slowly \([0-9,]+ bytes in 60 s\)"):
            fetch(web, cache, limits=Limits(clock=count(0, 20).__next__))
        web.seen.clear()
        assert weights(fetch(web, cache, limits=Limits(clock=count(0, 1).__next__))) == WEIGHTS * 8
        (rest,) = web.gets(AT)
        assert rest.headers["Range"] != "bytes=0-"


class TestSize:
    def test_what_says_that_it_is_too_large_is_not_read(self, web: Web, cache: Path) -> None:
        web.headers[AT] = {"Content-Length": str(1 << 60)}
        with pytest.raises(
            InvalidAdapter, match=r"safetensors: has 1,152,921,504,606,846,976 bytes or more; .* allowed"
        ):
            fetch(web, cache)
        assert leftovers(cache) == []

    def test_what_does_not_say_is_stopped_when_it_is(self, web: Web, cache: Path) -> None:
        web.endless.add(AT)
        with pytest.raises(InvalidAdapter, match=r"5,000,000 are allowed \(--max-adapter-bytes\)"):
            fetch(web, cache, limits=Limits(max_bytes=5_000_000))
        assert leftovers(cache) == []

    def test_a_config_is_small(self, web: Web, cache: Path) -> None:
        web.endless.add(CONFIG_AT)
        with pytest.raises(InvalidAdapter, match=r"adapter_config.json: has .* bytes or more; 1,048,576 are allowed"):
            fetch(web, cache)
        assert web.gets(AT) == []

    @pytest.mark.parametrize("said", ["9" * 5000, "-1", "x"])
    def test_a_length_that_is_none_does_no_harm(self, web: Web, cache: Path, said: str) -> None:
        web.headers[AT] = {"Content-Length": said}
        with pytest.raises((InvalidAdapter, Unavailable)):
            fetch(web, cache)


class TestContent:
    def test_the_right_checksum_needs_no_second_look(self, web: Web, cache: Path) -> None:
        source = f"{web.url}/loras/x#sha256={hashlib.sha256(WEIGHTS).hexdigest()}"
        folder = sources(web, cache).fetch(source)
        web.seen.clear()
        assert sources(web, cache).fetch(source) == folder
        assert web.seen == []

    def test_another_checksum_is_refused_with_both(self, web: Web, cache: Path) -> None:
        found = hashlib.sha256(WEIGHTS).hexdigest()
        with pytest.raises(InvalidAdapter, match=f"has SHA-256 {found}, and the source asks for {'0' * 64}"):
            sources(web, cache).fetch(f"{web.url}/loras/x#sha256={'0' * 64}")
        assert leftovers(cache) == []

    def test_a_config_that_changes_under_way_is_not_paired_with_old_weights(self, web: Web, cache: Path) -> None:
        def change(source: str, done: int, total: int | None) -> None:
            web.files[CONFIG_AT] = b'{"r": 4}'

        with pytest.raises(Unavailable, match="changed while it was fetched: try again"):
            fetch(web, cache, limits=Limits(on_progress=change))
        assert leftovers(cache) == []
        assert (fetch(web, cache) / "adapter_config.json").read_bytes() == b'{"r": 4}'

    def test_what_comes_compressed_is_refused(self, web: Web, cache: Path) -> None:
        web.headers[AT] = {"Content-Encoding": "gzip"}
        with pytest.raises(InvalidAdapter, match="comes compressed"):
            fetch(web, cache)

    def test_a_copy_that_was_spoilt_is_fetched_again(self, web: Web, cache: Path) -> None:
        (fetch(web, cache) / "adapter_model.safetensors").unlink()
        assert weights(fetch(web, cache)) == WEIGHTS
        for path in cache.rglob("latest.json"):
            path.write_text("{")
        assert weights(fetch(web, cache)) == WEIGHTS


class TestAnswers:
    @pytest.mark.parametrize(
        ("status", "words"),
        [
            (404, "is missing"),
            (410, "is missing"),
            (401, "may not be read"),
            (403, "may not be read"),
            (418, "answers 418"),
        ],
    )
    def test_a_file_that_can_not_be_had_is_named(self, web: Web, cache: Path, status: int, words: str) -> None:
        web.statuses[AT] = status
        with pytest.raises(InvalidAdapter, match=rf"adapter_model.safetensors: .*{words}.* at http://"):
            fetch(web, cache)

    @pytest.mark.parametrize("status", [408, 429, 500, 503])
    def test_a_server_in_trouble_may_be_asked_again(self, web: Web, cache: Path, status: int) -> None:
        web.statuses[AT] = status
        with pytest.raises(Unavailable, match=f"the server answers {status}"):
            fetch(web, cache)

    def test_a_server_that_is_not_there_may_be_asked_again(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(Unavailable, match="ConnectError"):
            Sources([], RemoteSettings([url], tmp_path)).fetch(f"{url}/x")

    def test_a_cache_that_can_not_be_written_is_named(self, web: Web, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(Unavailable, match=r"can't be kept in --cache .*/file"):
            fetch(web, tmp_path / "file")


class TestRedirects:
    def test_one_that_is_allowed_is_followed(self, web: Web, cache: Path) -> None:
        del web.files[AT]
        web.redirects[AT] = "/loras/elsewhere/adapter_model.safetensors?signed=1"
        web.files["/loras/elsewhere/adapter_model.safetensors"] = WEIGHTS
        assert weights(fetch(web, cache)) == WEIGHTS
        assert web.seen[-2].path.endswith("?signed=1")

    @pytest.mark.parametrize(
        "target",
        [
            "/secret/adapter_model.safetensors",
            "/loras/../secret/adapter_model.safetensors",
            "/loras/%2e%2e/secret",
            "https://127.0.0.1/loras/x",
            "http://localhost:PORT/loras/x",
            "http://user@127.0.0.1:PORT/loras/x",
            "http://127.0.0.1:PORT@evil.example.com/loras/x",
            "http://169.254.169.254/latest/meta-data",
            "file:///etc/passwd",
            "ftp://127.0.0.1:PORT/loras/x",
            "hf:org/repo",
            "//evil.example.com/loras/x",
            "http://",
            "http://[::1",
            "\\\\evil\\loras",
        ],
    )
    def test_any_other_is_refused_by_name(self, web: Web, cache: Path, target: str) -> None:
        web.redirects[AT] = target.replace("PORT", web.address.partition(":")[2])
        del web.files[AT]
        web.files |= {"/secret": b"secret", "/secret/adapter_model.safetensors": b"secret"}
        with pytest.raises(
            InvalidAdapter, match=r"safetensors: redirects (to '.*', which no --source-root allows|more than)"
        ):
            fetch(web, cache, "hf:org")
        assert {seen.path for seen in web.gets()} == {AT, CONFIG_AT}

    def test_a_circle_ends(self, web: Web, cache: Path) -> None:
        web.redirects[AT] = AT
        with pytest.raises(InvalidAdapter, match="redirects more than 5 times"):
            fetch(web, cache)


def test_fetches_of_one_source_at_once_are_one_download(web: Web, cache: Path) -> None:
    all_here = threading.Barrier(4)
    together = sources(web, cache)

    def work(_: int) -> Path:
        all_here.wait()
        return together.fetch(f"{web.url}/loras/x")

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(work, range(4)))
    assert len(folders) == 1
    assert sum("If-None-Match" not in seen.headers for seen in web.gets(AT)) == 1


class TestProgress:
    def test_it_is_told_as_bytes_come(self, web: Web, cache: Path) -> None:
        heard: list[tuple[str, int, int | None]] = []
        web.cuts[AT] = [1000]
        fetch(web, cache, limits=Limits(on_progress=lambda *told: heard.append(told)))
        assert heard[0] == (f"{web.url}/loras/x", 1000, len(WEIGHTS))
        assert heard[-1] == (f"{web.url}/loras/x", len(WEIGHTS), len(WEIGHTS))
        assert sorted(done for _, done, _ in heard) == [done for _, done, _ in heard]

    def test_the_log_hears_of_it_every_few_seconds(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", "weft.adapters.downloads")
        now = iter([0.0, 1.0, 6.0, 7.0, 12.0])
        log = ProgressLog(lambda: next(now))
        mib = 1 << 20
        for done in (1, 2, 3, 4):
            log("s3://bucket/x", done * mib, 8 * mib)
        log("s3://bucket/x", 6 * mib, None)
        assert caplog.messages == [
            "fetching s3://bucket/x: 3.0 MiB of 8.0 MiB (38%)",
            "fetching s3://bucket/x: 6.0 MiB",
        ]


def test_a_classifiers_labels_come_with_it_where_there_are_any(web: Web, cache: Path) -> None:
    web.files |= {"/loras/x/config.json": b'{"num_labels": 2}'}
    assert not (fetch(web, cache) / "config.json").exists()
    web.files[CONFIG_AT] = b'{"task_type": "SEQ_CLS"}'
    assert (fetch(web, cache) / "config.json").read_bytes() == b'{"num_labels": 2}'
    web.files["/loras/x/config.json"] = b'{"num_labels": 3}'
    assert (fetch(web, cache) / "config.json").read_bytes() == b'{"num_labels": 3}'
    del web.files["/loras/x/config.json"]
    assert not (fetch(web, cache) / "config.json").exists()
    web.statuses["/loras/x/config.json"] = 403
    with pytest.raises(InvalidAdapter, match=r"config\.json: may not be read"):
        fetch(web, cache)
