"""What a caller may not use does not exist for it: the same refusal, byte for byte, whether or not it is there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from guarded import Guarded, Stubs
from house import Refusal, generate, refusal, stream

from weft.server.api.callers import Caller
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import inference_pb2

CODE = grpc.StatusCode
DIGEST = "@sha256:" + "0" * 64
FEW = {"max_tokens": 1}
REWRITE = "x-gateway-model-name-rewrite"

THERE, NOT_THERE = "team-b/one", "team-b/two"
"""Of the same length, so that all but the name can be compared."""

Ask = Callable[[Stubs, str], object]


def score(name: str) -> inference_pb2.ScoreRequest:
    return inference_pb2.ScoreRequest(text="x", continuations=["y"], adapter_id=name)


def change(name: str, **fields: Any) -> pb2.UpdateAdapterRequest:
    return pb2.UpdateAdapterRequest(adapter={"name": name, **fields}, update_mask=FieldMask(paths=[*fields]))


ASKED: dict[str, Ask] = {
    "Generate": lambda stubs, name: stubs.inference.Generate(generate(text="x", adapter_id=name, stopping=FEW)),
    "StreamGenerate": lambda stubs, name: list(stubs.inference.StreamGenerate(stream(text="x", adapter_id=name))),
    "Score": lambda stubs, name: stubs.inference.Score(score(name)),
    "Classify": lambda stubs, name: stubs.inference.Classify(inference_pb2.ClassifyRequest(text="x", adapter_id=name)),
    "Embed": lambda stubs, name: stubs.inference.Embed(inference_pb2.EmbedRequest(text="x", adapter_id=name)),
    "a pinned version": lambda stubs, name: stubs.inference.Generate(generate(text="x", adapter_id=name + DIGEST)),
    "a pinned score": lambda stubs, name: stubs.inference.Score(score(name + DIGEST)),
    "a mix": lambda stubs, name: stubs.inference.Generate(
        generate(text="x", adapters=[{"adapter_id": name}, {"adapter_id": "team-a/one"}])
    ),
    "a rewrite": lambda stubs, name: stubs.inference.Generate(generate(text="x"), metadata=((REWRITE, name),)),
    "a rewrite to a version": lambda stubs, name: stubs.inference.Generate(
        generate(text="x", adapter_id=name), metadata=((REWRITE, name + DIGEST),)
    ),
    "GetAdapter": lambda stubs, name: stubs.adapters.GetAdapter(pb2.GetAdapterRequest(name=name)),
    "DeleteAdapter": lambda stubs, name: stubs.adapters.DeleteAdapter(pb2.DeleteAdapterRequest(name=name)),
    "UpdateAdapter, labels": lambda stubs, name: stubs.adapters.UpdateAdapter(change(name, labels={"x": "y"})),
    "UpdateAdapter, pinned": lambda stubs, name: stubs.adapters.UpdateAdapter(change(name, pinned=True)),
    "UpdateAdapter, source": lambda stubs, name: stubs.adapters.UpdateAdapter(change(name, source="file:/x")),
    "CreateAdapter": lambda stubs, name: stubs.adapters.CreateAdapter(
        pb2.CreateAdapterRequest(adapter={"name": name, "source": "file:/x"})
    ),
}


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("caller", ["team-a", "tenant-a"])
def test_forbidden_and_unknown_are_the_same_byte_for_byte(guard: Guarded, caller: str, ask: str) -> None:
    with guard.calling(caller) as stubs:
        there, not_there = (refusal(lambda name=name: ASKED[ask](stubs, name)) for name in (THERE, NOT_THERE))  # type: ignore[misc]
    assert there.code is not_there.code is CODE.PERMISSION_DENIED
    assert there.reason == "PERMISSION_DENIED"
    assert there.message.startswith(f"caller '{caller}' may not use adapter 'team-b/one")
    assert there.message.replace(THERE, NOT_THERE) == not_there.message
    assert there.status.SerializeToString().replace(THERE.encode(), NOT_THERE.encode()) == (
        not_there.status.SerializeToString()
    )


def test_it_is_there_after_all_that(guard: Guarded) -> None:
    with guard.calling("boss") as boss:
        adapter = boss.adapters.GetAdapter(pb2.GetAdapterRequest(name=THERE)).adapter
        assert adapter.labels == {"tenant": "b"}
        assert not adapter.pinned
        boss.inference.Generate(generate(text="x", adapter_id=THERE, stopping=FEW))


def test_what_a_pattern_allows_is_found_or_not_found(guard: Guarded) -> None:
    with guard.calling("team-a") as team_a:
        team_a.inference.Generate(generate(text="x", adapter_id="team-a/one", stopping=FEW))
        team_a.inference.Score(score("team-a/one"))
        inference = ("Generate", "StreamGenerate", "Score", "Classify", "Embed", "a pinned version")
        for ask in (*inference, "GetAdapter", "DeleteAdapter"):
            refused = refusal(lambda ask=ask: ASKED[ask](team_a, "team-a/two"))  # type: ignore[misc]
            assert refused.code is CODE.NOT_FOUND, ask


def test_what_a_label_allows_is_found(guard: Guarded) -> None:
    with guard.calling("tenant-a") as tenant:
        tenant.inference.Generate(generate(text="x", adapter_id="shared/one", stopping=FEW))
        assert tenant.adapters.GetAdapter(pb2.GetAdapterRequest(name="shared/one")).adapter.name == "shared/one"
        tenant.inference.Generate(generate(text="x", stopping=FEW))


def test_the_base_may_be_kept_from_a_caller(guard: Guarded) -> None:
    with guard.calling("team-a") as team_a:
        refused = refusal(lambda: team_a.inference.Generate(generate(text="x", stopping=FEW)))
        embedded = inference_pb2.EmbedRequest(text="x")
        assert refusal(lambda: team_a.inference.Score(score(""))).message == refused.message
        assert refusal(lambda: team_a.inference.Embed(embedded)).message == refused.message
    assert refused.code is CODE.PERMISSION_DENIED
    assert refused.message == "caller 'team-a' may not use the base without an adapter"


def test_no_hint_names_what_a_caller_may_not_know_of(guard: Guarded) -> None:
    guard.create("team-c/secret-plan")
    with guard.calling("boss") as boss, guard.calling("team-a") as team_a:

        def said(stubs: Stubs, name: str) -> str:
            return refusal(lambda: stubs.adapters.GetAdapter(pb2.GetAdapterRequest(name=name))).message

        asked = ("team-a/secret-plan", "team-a/c/secret-plan", "team-a/secret", "team-a/onf")
        assert "did you mean 'team-c/secret-plan'?" in said(boss, "team-a/secret-plan")
        there = [said(team_a, name) for name in asked]
        boss.adapters.DeleteAdapter(pb2.DeleteAdapterRequest(name="team-c/secret-plan"))
        assert there == [said(team_a, name) for name in asked], "nor do they tell by their absence"
        assert "did you mean 'team-a/one'?" in there[-1]


def test_a_list_and_a_watch_show_what_a_caller_may_use(guard: Guarded) -> None:
    for caller, names in (
        ("boss", ["shared/one", "team-a/one", "team-b/one"]),
        ("team-a", ["team-a/one"]),
        ("tenant-a", ["shared/one"]),
    ):
        with guard.calling(caller) as stubs:
            assert listed(stubs) == names
            assert listed(stubs, page_size=1) == names
            watch = stubs.adapters.WatchAdapters(pb2.WatchAdaptersRequest())
            told = [next(watch) for _ in range(len(names) + 1)]
            assert sorted(event.adapter.name for event in told[:-1]) == names
            assert told[-1].kind == pb2.ADAPTER_EVENT_KIND_LISTED
            watch.cancel()


def listed(stubs: Stubs, **fields: Any) -> list[str]:
    names, token = [], ""
    while True:
        page = stubs.adapters.ListAdapters(pb2.ListAdaptersRequest(page_token=token, **fields))
        names += [adapter.name for adapter in page.adapters]
        token = page.next_page_token
        if not token:
            return names


def test_a_watcher_is_told_of_what_comes_into_its_sight_and_leaves_it(guard: Guarded) -> None:
    with guard.calling("boss") as boss, guard.calling("tenant-a") as tenant:
        watch = tenant.adapters.WatchAdapters(pb2.WatchAdaptersRequest())
        assert [next(watch).adapter.name, next(watch).kind] == ["shared/one", pb2.ADAPTER_EVENT_KIND_LISTED]
        boss.adapters.UpdateAdapter(change(THERE, labels={"tenant": "a"}))
        added = next(watch)
        assert (added.kind, added.adapter.name) == (pb2.ADAPTER_EVENT_KIND_ADDED, THERE)
        boss.adapters.UpdateAdapter(change(THERE, labels={"tenant": "b"}))
        events = iter(watch)
        gone = next(event for event in events if event.kind == pb2.ADAPTER_EVENT_KIND_DELETED)
        assert gone.adapter.name == THERE
        assert gone.adapter.labels == {"tenant": "a"}, "what it has become is nothing to it"
        watch.cancel()


class TestAdmin:
    def test_one_with_patterns_rules_over_its_own_names(self, guard: Guarded) -> None:
        new = {"name": "team-a/new", "source": f"file:{guard.adapters / 'one'}"}
        with guard.calling("team-a") as team_a:
            team_a.adapters.CreateAdapter(pb2.CreateAdapterRequest(adapter=new, wait=True))
            team_a.adapters.UpdateAdapter(change("team-a/new", pinned=True))
            team_a.adapters.DeleteAdapter(pb2.DeleteAdapterRequest(name="team-a/new"))

    def test_one_with_labels_creates_nothing_and_keeps_its_labels(self, guard: Guarded) -> None:
        new = {"name": "mine", "source": f"file:{guard.adapters / 'one'}", "labels": {"tenant": "a"}}
        with guard.calling("tenant-a") as tenant:
            created = refusal(lambda: tenant.adapters.CreateAdapter(pb2.CreateAdapterRequest(adapter=new)))
            assert created.message == "caller 'tenant-a' may not use adapter 'mine'"
            lost = refusal(lambda: tenant.adapters.UpdateAdapter(change("shared/one", labels={"tenant": "b"})))
            assert lost.message == "caller 'tenant-a' may not take the labels away that it goes by"
            tenant.adapters.UpdateAdapter(change("shared/one", labels={"tenant": "a", "more": "x"}))
            tenant.adapters.UpdateAdapter(change("shared/one", labels={"tenant": "a"}))

    def test_one_with_labels_changes_nothing_that_is_no_longer_its_own_once_it_is_loaded(
        self, guard: Guarded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert guard.server._loaded is not None
        reader = guard.server._loaded.frontend._store._reader
        reads, may_end, read = threading.Event(), threading.Event(), reader.read

        def slow(source: str) -> object:
            reads.set()
            assert may_end.wait(60)
            return read(source)

        monkeypatch.setattr(reader, "read", slow)
        loading = change("shared/one", source=f"file:{guard.adapters / 'two'}")
        with guard.calling("boss") as boss, guard.calling("tenant-b") as tenant:
            boss.adapters.UpdateAdapter(change("shared/one", labels={"tenant": "b"}))
            before = boss.adapters.GetAdapter(pb2.GetAdapterRequest(name="shared/one")).adapter
            asked = tenant.adapters.UpdateAdapter.future(loading)
            assert reads.wait(60)
            boss.adapters.UpdateAdapter(change("shared/one", labels={"tenant": "a"}))
            may_end.set()
            assert refusal(asked.result).message == "caller 'tenant-b' may not use adapter 'shared/one'"
            after = boss.adapters.GetAdapter(pb2.GetAdapterRequest(name="shared/one")).adapter
            assert (after.digest, after.source) == (before.digest, before.source)

    def test_sources_of_others_are_not_looked_at(self, guard: Guarded) -> None:
        with guard.calling("team-a") as team_a, guard.calling("tenant-a") as tenant:
            for source in (f"file:{guard.adapters / 'two'}", "file:/nowhere", f"file:{guard.adapters}/one/../two"):
                new = pb2.CreateAdapterRequest(adapter={"name": "team-a/x", "source": source})
                for ask in (
                    lambda new=new: team_a.adapters.CreateAdapter(new),
                    lambda s=source: team_a.adapters.UpdateAdapter(change("team-a/one", source=s)),
                    lambda s=source: team_a.adapters.CheckAdapter(pb2.CheckAdapterRequest(source=s)),
                    lambda s=source: team_a.adapters.PlanCapacity(pb2.PlanCapacityRequest(sources=[s])),
                ):
                    refused = refusal(ask)
                    assert refused.code is CODE.PERMISSION_DENIED
                    assert refused.message == f"caller 'team-a' may not use the source {source!r}"
            own = f"file:{guard.adapters / 'one'}"
            assert not team_a.adapters.CheckAdapter(pb2.CheckAdapterRequest(source=own)).report.problems
            assert team_a.adapters.PlanCapacity(pb2.PlanCapacityRequest(sources=[own])).fits
            none = refusal(lambda: tenant.adapters.CheckAdapter(pb2.CheckAdapterRequest(source=own)))
            assert none.code is CODE.PERMISSION_DENIED, "who is limited and has no sources may use none"


class Written(logging.Handler):
    """Lines of the audit log; what the server does after its answer may still be to come."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._came = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._came:
            self.lines.append(record.getMessage())
            self._came.notify_all()

    def all(self, count: int) -> list[str]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.lines) >= count, 60)
        return self.lines


@pytest.fixture
def written() -> Iterator[Written]:
    handler, log = Written(), logging.getLogger("weft.audit")
    before = log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)
    log.setLevel(before)


def test_each_call_of_an_admin_leaves_one_line_whatever_came_of_it(guard: Guarded, written: Written) -> None:
    source = f"file:{guard.adapters / 'one'}"
    with guard.calling("boss") as boss, guard.calling("asker") as asker, guard.calling() as nobody:
        digest = boss.adapters.GetAdapter(pb2.GetAdapterRequest(name="team-a/one")).adapter.digest
        new = pb2.CreateAdapterRequest(adapter={"name": "new", "source": source}, wait=True)
        boss.adapters.CreateAdapter(new)
        refusal(lambda: boss.adapters.CreateAdapter(new))
        boss.adapters.UpdateAdapter(change("new", labels={"tenant": "a"}, pinned=False))
        boss.adapters.UpdateAdapter(change("new", source=source))
        secret = {"name": "x", "source": "https://me:hunter2@host/a?token=hunter2", "labels": {"a b": "c"}}
        refusal(lambda: boss.adapters.CreateAdapter(pb2.CreateAdapterRequest(adapter=secret)))
        refusal(lambda: asker.adapters.DeleteAdapter(pb2.DeleteAdapterRequest(name="new")))
        refusal(lambda: nobody.adapters.DeleteAdapter(pb2.DeleteAdapterRequest(name="new")))
        boss.adapters.DeleteAdapter(pb2.DeleteAdapterRequest(name="new"))
        refusal(lambda: boss.adapters.DeleteAdapter(pb2.DeleteAdapterRequest(name="no\nsuch caller=x")))
        boss.adapters.ListAdapters(pb2.ListAdaptersRequest())
    lines = written.all(9)
    assert all(" peer=ipv4:127.0.0.1:" in line for line in lines)
    told = [" ".join(word for word in line.split(" ") if not word.startswith("peer=")) for line in lines]
    relabelled = """labels='{"tenant": "a"}' pinned=false"""
    without_secret = """source=https://***@host/a?*** labels='{"a b": "c"}'"""
    assert told == [
        f"caller=boss method=CreateAdapter adapter=new source={source} digest={digest} outcome=ok",
        f"caller=boss method=CreateAdapter adapter=new source={source} digest=- outcome=already_exists",
        f"caller=boss method=UpdateAdapter adapter=new {relabelled} digest={digest} outcome=ok",
        f"caller=boss method=UpdateAdapter adapter=new source={source} digest={digest} outcome=ok",
        f"caller=boss method=CreateAdapter adapter=x {without_secret} digest=- outcome=invalid_argument",
        "caller=asker method=DeleteAdapter adapter=new digest=- outcome=permission_denied",
        "caller=- method=DeleteAdapter adapter=- digest=- outcome=unauthenticated",
        f"caller=boss method=DeleteAdapter adapter=new digest={digest} outcome=ok",
        "caller=boss method=DeleteAdapter adapter='no\\nsuch caller=x' digest=- outcome=not_found",
    ]


class TestCaller:
    def test_a_pattern_or_all_labels_give_the_right(self) -> None:
        caller = Caller(patterns=("a/*", "b"), labels={"x": "1", "y": "2"})
        assert caller.may_use("a/deep/name", {})
        assert caller.may_use("b", {})
        assert caller.may_use("c", {"x": "1", "y": "2", "z": "3"})
        assert not caller.may_use("c", {"x": "1"})
        assert not caller.may_use("B", {})
        assert not Caller(patterns=()).may_use("c", {}), "no labels are not labels that all have"
        assert Caller().may_use("c", {})

    def test_a_source_that_leads_back_up_is_none_of_the_patterns(self) -> None:
        caller = Caller(sources=("file:/a/*", "https://h/a/*"))
        assert caller.may_load("file:/a/b")
        for source in ("file:/a/../b", "https://h/a/%2E%2e/b", "file:/ab", "hf:a/b"):
            assert not caller.may_load(source)

    def test_no_two_callers_share_a_turn(self) -> None:
        names = [
            Caller(name).asking_for(other)
            for name in ("a", "a/b", "a%2Fb", "a%", "c")
            for other in ("", "b", "b/c", "c", "%2Fb")
        ]
        assert len(set(names)) == len(names)
        assert Caller("team-a").asking_for("user 1") == "team-a/user 1"

    def test_no_two_callers_have_the_same_salt(self) -> None:
        salts = [
            Caller(name).salted(salt, other)
            for name in ("a", "a' 'b", "a/b", "b")
            for other in ("", "b", "b' 'c")
            for salt in ("", "c", "' c")
        ]
        assert len(set(salts)) == len(salts)
        assert Caller("a", own_prefixes=False).salted("x", "other") == "x"


def test_a_refusal_holds_nothing_but_what_was_asked(guard: Guarded) -> None:
    with guard.calling("team-a") as team_a:
        refused: Refusal = refusal(lambda: ASKED["GetAdapter"](team_a, THERE))
    assert [packed.type_url.rpartition(".")[2] for packed in refused.status.details] == ["ErrorInfo"]
