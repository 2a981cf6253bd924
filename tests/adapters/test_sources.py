"""What may be an adapter's source: nothing leads out of a root or a prefix, however it is written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from web import serving

from weft.adapters.downloads import Limits
from weft.adapters.sources import RemoteSettings, Sources
from weft.errors import InvalidAdapter, InvalidConfig, InvalidRequest

PREFIXES = ("hf:my-org/", "https://good.example.com/loras/", "http://127.0.0.1:9/", "https://[::1]:9/x")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """`root/good` is an adapter's folder; `outside` is one too, and nobody allowed it."""
    for folder in (tmp_path / "root" / "good", tmp_path / "outside", tmp_path / "root-evil"):
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path / "root"


@pytest.fixture
def sources(root: Path, tmp_path: Path) -> Sources:
    return Sources([root], RemoteSettings(PREFIXES, tmp_path / "cache"))


HOSTILE = [
    # forms
    "",
    " ",
    "file",
    "file:",
    "/etc",
    "ROOT/good",
    "FILE:ROOT/good",
    "ftp://good.example.com/loras/x",
    "javascript:alert(1)",
    "data:text/plain,x",
    "local://ROOT/good",
    "memory://x",
    "simplecache::https://good.example.com/loras/x",
    "filecache::file:ROOT/good",
    "zip://x::https://good.example.com/loras/x",
    "github://org:repo@/x",
    # files
    "file:/etc/passwd",
    "file:/",
    "file:.",
    "file:..",
    "file:ROOT/../outside",
    "file:ROOT/good/../../outside",
    "file:ROOT/./good/./../../outside",
    "file:ROOT-evil",
    "file:ROOT/%2e%2e/outside\n",
    "file:ROOT/good\0",
    "file:ROOT/good\nx",
    "file:ROOT/good\x1b[31m",
    "file:ROOT/good\u202e",
    "file:ROOT/\ud800",
    "file://evil.example.com/ROOT/good",
    "file:~root",
    "file:/proc/self/cwd/../../etc",
    "file:" + "/x" * 600,
    # the hub
    "hf:",
    "hf:my-org",
    "hf:my-org/",
    "hf:my-org-evil/repo",
    "hf:my-org/../evil/repo",
    "hf:my-org/repo/../../evil/repo",
    "hf:my-org/./repo",
    "hf:my-org//repo",
    "hf:/my-org/repo",
    "hf://my-org/repo",
    "hf:my-org%2frepo/x",
    "hf:my-org\\..\\evil/repo",
    "hf:my-org/repo@",
    "hf:my-org/repo@../../evil",
    "hf:my-org/repo@a..b",
    "hf:my-org/repo@main@evil",
    "hf:my-org/repo@main?x",
    "hf:my-org/repo\n",
    "hf:my-org/rep\u043e",
    "hf:evil@my-org/repo",
    # the web
    "https:",
    "https://",
    "https:///loras/x",
    "https:good.example.com/loras/x",
    "https:/good.example.com/loras/x",
    "http://good.example.com/loras/x",
    "HTTPS://good.example.com/loras/x",
    "https://GOOD.example.com/loras/x",
    "https://good.example.com./loras/x",
    "https://good.example.com.evil.net/loras/x",
    "https://good.example.com@evil.net/loras/x",
    "https://user@good.example.com/loras/x",
    "https://user:secret@good.example.com/loras/x",
    "https://evil.net#@good.example.com/loras/x",
    "https://evil.net\\@good.example.com/loras/x",
    "https://good.example.com:443@evil.net/loras/x",
    "https://good.example.com:444/loras/x",
    "https://good.example.com:0443/loras/x",
    "https://good.example.com:99999/loras/x",
    "https://good.example.com:/loras/x",
    "https://good.example.com/loras/../x",
    "https://good.example.com/loras/%2e%2e/x",
    "https://good.example.com/loras/..%2fx",
    "https://good.example.com/loras%2fx",
    "https://good.example.com/loras;/x",
    "https://good.example.com/loras/x?next=https://evil.net",
    "https://good.example.com/loras/x#y",
    "https://good.example.com/loras//x",
    "https://good.example.com/loras-evil/x",
    "https://good.example.com/",
    "https://good.example.com/LORAS/x",
    "https://good.example.com/loras/x\r\nHost: evil.net",
    "https://good.example.com/loras/x\0",
    "https://good.example.com/loras/x ",
    " https://good.example.com/loras/x",
    "https://g\u043e\u043ed.example.com/loras/x",
    "https://good\u3002example.com/loras/x",
    "https://good.example.com/loras/" + "x" * 2000,
    f"https://good.example.com/loras/x#sha256={'g' * 64}",
    f"https://good.example.com/loras/x#sha256={'A' * 64}",
    f"https://good.example.com/loras/x#sha256={'a' * 64}\n",
    "http://2130706433:9/x",
    "http://0x7f.1:9/x",
    "http://127.1:9/x",
    "http://0177.0.0.1:9/x",
    "http://127.0.0.1.:9/x",
    "http://[::ffff:127.0.0.1]:9/x",
    "http://[::ffff:7f00:1]:9/x",
    "https://[0:0:0:0:0:0:0:1]:9/x",
    "https://[::1%lo]:9/x",
    "https://[127.0.0.1]:9/x",
    "http://169.254.169.254/latest/meta-data",
    # object stores
    "s3:",
    "s3://bucket/x",
    "gs://bucket/x",
]


@pytest.mark.parametrize("source", HOSTILE, ids=lambda source: ascii(source)[:60])
def test_what_leads_elsewhere_is_refused_in_one_line(sources: Sources, root: Path, source: str) -> None:
    given = source.replace("ROOT", str(root))
    for ask in (sources.check, sources.fetch):
        with pytest.raises(InvalidRequest) as raised:
            ask(given)
        (problem,) = raised.value.problems
        assert problem.subject == "adapter.source"
        assert problem.description.isprintable()
        assert len(problem.description) < 1600


def test_what_is_allowed_comes_through(sources: Sources, root: Path) -> None:
    for source in (f"file:{root}/good", f"file:{root}/outside/../good", "hf:my-org/repo", PREFIXES[1] + "x"):
        sources.check(source)
    assert sources.fetch(f"file:{root}/good/") == root.resolve() / "good"


def test_a_path_is_not_looked_for_where_the_server_runs(
    sources: Sources, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    for source in ("file:good", "file:./good", "file:../root/good"):
        with pytest.raises(InvalidRequest, match="must be file:/path/to/a/PEFT/folder"):
            sources.check(source)


def test_a_refusal_names_the_option_and_what_is_allowed(sources: Sources, root: Path) -> None:
    with pytest.raises(
        InvalidRequest, match=r"hf:evil/repo.*\(hf:my-org, https:.*; start the server with --source-root"
    ):
        sources.check("hf:evil/repo")
    with pytest.raises(InvalidRequest, match=rf"/etc lies under no allowed root \({root}\); .* with --source-root"):
        sources.check("file:/etc")
    with pytest.raises(InvalidRequest, match=r"\(none is set\); start the server with --source-root"):
        Sources([]).check("hf:org/repo")


@pytest.mark.parametrize("prefix", ["https:", "s3://", "https://user@host/", "https://HOST/", "hf:../x", "ftp://host/"])
def test_a_prefix_that_is_none_stops_the_start(prefix: str) -> None:
    with pytest.raises(InvalidConfig, match=f"--source-root is '{prefix}', which "):
        Sources([], RemoteSettings([prefix]))


class TestLinks:
    def test_one_that_stays_inside_is_followed(self, sources: Sources, root: Path) -> None:
        (root / "link").symlink_to("good")
        assert sources.fetch(f"file:{root}/link") == root.resolve() / "good"

    @pytest.mark.parametrize("target", ["../outside", "/etc", "../root-evil", "../root/../outside"])
    def test_one_that_leads_out_is_refused(self, sources: Sources, root: Path, target: str) -> None:
        (root / "link").symlink_to(target)
        (root / "chain").symlink_to("link")
        for name in ("link", "chain"):
            with pytest.raises(InvalidRequest, match="lies under no allowed root"):
                sources.check(f"file:{root}/{name}")

    def test_a_loop_is_refused(self, sources: Sources, root: Path) -> None:
        (root / "a").symlink_to("b")
        (root / "b").symlink_to("a")
        with pytest.raises((InvalidRequest, InvalidAdapter)):
            sources.fetch(f"file:{root}/a")
        (root / "good" / "adapter_model.safetensors").unlink()
        (root / "good" / "adapter_model.safetensors").symlink_to("adapter_model.safetensors")
        with pytest.raises(InvalidAdapter, match="can't be followed"):
            sources.fetch(f"file:{root}/good")

    def test_a_folder_that_holds_itself_is_no_way_out(self, sources: Sources, root: Path) -> None:
        (root / "good" / "self").symlink_to(".")
        assert sources.fetch(f"file:{root}/good{'/self' * 20}") == root.resolve() / "good"

    @pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
    def test_a_file_that_leads_out_is_refused_by_name(self, sources: Sources, root: Path, name: str) -> None:
        (root / "good" / name).unlink()
        (root / "good" / name).symlink_to(f"../../outside/{name}")
        with pytest.raises(InvalidAdapter, match=f"{name}: is a link to a file outside the allowed roots"):
            sources.fetch(f"file:{root}/good")

    def test_one_that_is_swapped_after_the_check_is_refused_at_the_fetch(self, sources: Sources, root: Path) -> None:
        link = root / "link"
        link.symlink_to("good")
        sources.check(f"file:{link}")
        link.unlink()
        link.symlink_to("../outside")
        with pytest.raises(InvalidRequest, match="lies under no allowed root"):
            sources.fetch(f"file:{link}")

    def test_what_is_fetched_is_not_a_link_that_could_be_swapped(self, sources: Sources, root: Path) -> None:
        (root / "link").symlink_to("good")
        folder = sources.fetch(f"file:{root}/link")
        (root / "link").unlink()
        (root / "link").symlink_to("../outside")
        assert folder == root.resolve() / "good"


def test_a_classifiers_labels_are_looked_at_as_its_other_files_are(sources: Sources, root: Path) -> None:
    folder = root / "classifier"
    folder.mkdir()
    (root.parent / "secret.json").write_text("{}")
    (folder / "config.json").symlink_to(root.parent / "secret.json")
    assert sources.fetch(f"file:{folder}") == folder
    (folder / "adapter_config.json").write_text('{"task_type": "SEQ_CLS"}')
    with pytest.raises(InvalidAdapter, match=r"config\.json: is a link to a file outside the allowed roots"):
        sources.fetch(f"file:{folder}")


def test_what_would_block_or_never_end_is_refused(sources: Sources, root: Path) -> None:
    path = root / "good" / "adapter_config.json"
    path.unlink()
    os.mkfifo(path)
    assert stat.S_ISFIFO(path.stat().st_mode)
    with pytest.raises(InvalidAdapter, match=r"adapter_config.json: is not a regular file"):
        sources.fetch(f"file:{root}/good")


def test_files_have_a_largest_size(root: Path) -> None:
    small = Sources([root], RemoteSettings(limits=Limits(max_bytes=6)))
    with pytest.raises(
        InvalidAdapter, match=r"safetensors: has 7 bytes or more; 6 are allowed \(--max-adapter-bytes\)"
    ):
        small.fetch(f"file:{root}/good")
    (root / "good" / "adapter_config.json").write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(
        InvalidAdapter, match=r"adapter_config.json: has 1,048,577 bytes or more; 1,048,576 are allowed"
    ):
        Sources([root]).fetch(f"file:{root}/good")


def test_every_scheme_has_its_way(root: Path, tmp_path: Path) -> None:
    with serving() as web:
        commit = "c" * 40
        web.hold(root / "good", "/loras/x")
        web.publish(root / "good", "org/repo", commit, "main")
        settings = RemoteSettings([f"{web.url}/loras/", "hf:org/"], tmp_path / "cache", hub_endpoint=web.url)
        sources = Sources([], settings)
        for source in (f"{web.url}/loras/x", "hf:org/repo"):
            folder = sources.fetch(source)
            assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
            assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"


def test_what_was_fetched_can_be_had_again_without_asking(root: Path, tmp_path: Path) -> None:
    with serving() as web:
        web.hold(root / "good", "/x")
        sources = Sources([root], RemoteSettings([web.url], tmp_path / "cache"))
        folder = sources.fetch_again(f"{web.url}/x")
        web.seen.clear()
        assert sources.fetch_again(f"{web.url}/x") == folder
        assert web.seen == []
        (folder / "adapter_model.safetensors").unlink()
        assert (sources.fetch_again(f"{web.url}/x") / "adapter_model.safetensors").read_bytes() == b"weights"
    assert sources.fetch_again(f"file:{root}/good") == root.resolve() / "good"


def test_copies_go_to_the_users_cache_where_nothing_else_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with serving() as web:
        web.hold(root / "good", "/x")
        folder = Sources([], RemoteSettings([web.url])).fetch(f"{web.url}/x")
    assert folder.is_relative_to(tmp_path / "xdg" / "weft")
