"""Anything that can be done to adapters, in any order, while requests run on few pages: no wrong token, no leak.

All prompts begin alike, so that the prefix cache is at work in all of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
from harness import Answer, Harness
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tiny import VOCAB, make_adapter, make_model, save_tokenizer

from weft.adapters.records import AdapterChange, AdapterState, NewAdapter
from weft.errors import AdapterExists, AdapterNotFound, InvalidRequest, OutOfCapacity
from weft.server.engine.request import Request, Stopping

CONTENTS = {"c0": 8, "c1": 8, "c2": 4, "c3": 12, "c4": 16, "c5": 24}
ACTIVATED = "c1"
INVOCATION = (9, 8)
SALTS = ["", "salt"]
BLOCK = 4
NAMES = ["x", "y", "z", "u", "v"]
PAGES = 4
PAGE_ROWS = 8
NUM_TOKENS = 10

Expect = Callable[[tuple[str, ...], int], list[int]]
"""What a mix of contents answers to the prompt of a seed, alone and with room for everything."""

Prefix = tuple[str, tuple[tuple[object, ...], ...]]
"""A salt, and for each token what its keys and values depend on."""

names = st.sampled_from(NAMES)
contents = st.sampled_from(list(CONTENTS))


@dataclass
class Asked:
    """A request in flight, and the contents that its names stood for when it came."""

    request: Request
    answer: Answer
    contents: tuple[str, ...]
    seed: int
    was_pinned_against: bool = False

    def prefix(self, num_tokens: int) -> Prefix:
        """Its first tokens, prompt and answer, each with the contents at work in it and their weights."""
        prompt = self.request.prompt
        invoked = prompt.index(INVOCATION[0]) if INVOCATION[0] in prompt else None
        mix = [(name, weight) for name, (_, weight) in zip(self.contents, self.request.adapters, strict=True)]
        return self.request.cache_salt, tuple(
            (token, *(part for part in mix if part[0] != ACTIVATED or (invoked is not None and at >= invoked)))
            for at, token in enumerate([*prompt, *self.answer.ids][:num_tokens])
        )

    def prefixes(self) -> set[Prefix]:
        """In full blocks, of what was computed."""
        num_tokens = len(self.request.prompt) + len(self.answer.ids) - 1 if self.answer.ids else 0
        return {self.prefix(end) for end in range(BLOCK, num_tokens + 1, BLOCK)}


def pages(mix: set[str]) -> int:
    return sum(-(-CONTENTS[content] // PAGE_ROWS) for content in mix)


def ask(mix: tuple[str, ...], seed: int, salt: str = "", priority: int = 0) -> Request:
    """The prompts of all seeds begin alike; every other ends with an invocation and some tokens more."""
    rng = random.Random(0)
    prompt = tuple(rng.randrange(20, VOCAB) for _ in range(1 + 5 * seed)) + (*INVOCATION, 30, 31, 32) * (seed % 2)
    weights = tuple((name, 1.0 - 0.5 * i) for i, name in enumerate(mix))
    stopping = Stopping(max_tokens=NUM_TOKENS, ignore_eos=True)
    return Request("+".join(mix), prompt, weights, stopping=stopping, cache_salt=salt, priority=priority)


class Adapters(RuleBasedStateMachine):
    """held: what each name stands for; pinned: which are. The harness is shared: each run leaves it empty.

    computed: the prefixes in full blocks that were computed so far, in earlier runs too.
    """

    def __init__(self, harness: Harness, folder: Path, expect: Expect, computed: set[Prefix]) -> None:
        super().__init__()
        self.harness, self.store, self.folder, self.expect = harness, harness.store, folder, expect
        self.computed = computed
        self.held: dict[str, str] = {}
        self.pinned: set[str] = set()
        self.asked: list[Asked] = []

    def source(self, content: str) -> str:
        return f"file:{self.folder / content}"

    @rule(name=names, content=contents, pinned=st.booleans())
    def create(self, name: str, content: str, pinned: bool) -> None:
        new = NewAdapter(name, self.source(content), pinned=pinned)
        if name in self.held:
            with pytest.raises(AdapterExists):
                self.store.create(new)
            return
        try:
            info = self.store.create(new)
        except OutOfCapacity:
            assert pinned
            return
        assert not pinned or info.state is AdapterState.DEVICE
        self.held[name] = content
        self.set_pinned(name, pinned)

    @rule(name=names, content=st.none() | contents, pinned=st.none() | st.booleans())
    def update(self, name: str, content: str | None, pinned: bool | None) -> None:
        change = AdapterChange(source=self.source(content) if content else None, pinned=pinned)
        if name not in self.held:
            with pytest.raises(AdapterNotFound):
                self.store.update(name, change)
            return
        before = self.store.get(name)
        try:
            info = self.store.update(name, change)
        except OutOfCapacity:
            after = self.store.get(name)
            assert (after.digest, after.pinned, after.source) == (before.digest, before.pinned, before.source)
            return
        self.held[name] = content or self.held[name]
        self.set_pinned(name, info.pinned)
        assert info.pinned is (before.pinned if pinned is None else pinned)
        assert not info.pinned or info.state is AdapterState.DEVICE

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.held:
            self.store.delete(name)
            del self.held[name]
            self.pinned.discard(name)
        else:
            with pytest.raises(AdapterNotFound):
                self.store.delete(name)

    @rule(index=st.integers(0, 10))
    def evict(self, index: int) -> None:
        """As if another adapter had taken the pages of one that is idle."""
        tiers = self.store._tiers
        with tiers.lock:
            idle = [version for version in tiers.on_device() if version.may_leave_device]
            if idle:
                version = idle[index % len(idle)]
                assert tiers.make_room(tiers.num_free_pages + version.num_pages, [version])

    @precondition(lambda self: self.held)
    @rule(
        picks=st.lists(st.integers(0, 10), max_size=3),
        seed=st.integers(0, 3),
        salt=st.sampled_from(SALTS),
        priority=st.integers(0, 1),
    )
    def ask(self, picks: list[int], seed: int, salt: str, priority: int) -> None:
        known = sorted(self.held)
        mix = tuple(known[pick % len(known)] for pick in picks)
        wanted = {self.held[name] for name in mix}
        others = {self.held[name] for name in self.pinned} - wanted
        request = ask(mix, seed, salt, priority)
        if pages(wanted) > PAGES - pages(others):
            with pytest.raises((InvalidRequest, OutOfCapacity), match="pages"):
                self.harness.submit(request)
            return
        answer = self.harness.submit(request)
        self.asked.append(Asked(request, answer, tuple(self.held[name] for name in mix), seed))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.harness.engine.has_work:
                self.harness.step()

    @precondition(lambda self: self.asked)
    @rule(index=st.integers(0, 10))
    def cancel(self, index: int) -> None:
        self.harness.engine.cancel(self.asked.pop(index % len(self.asked)).request)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.store.check()
        self.harness.engine.check_pools()
        assert [info.name for info in self.store.list()] == sorted(self.held)

    @invariant()
    def every_token_is_right(self) -> None:
        for asked in self.asked:
            if asked.answer.error is not None:
                assert isinstance(asked.answer.error, OutOfCapacity)
                assert asked.was_pinned_against, "it fitted, and nobody has pinned anything since"
            else:
                expected = self.expect(asked.contents, asked.seed)
                assert asked.answer.ids == expected[: len(asked.answer.ids)]
        self.every_prefix_was_computed_by_an_equal()
        self.asked = [asked for asked in self.asked if not asked.answer.ended]

    def every_prefix_was_computed_by_an_equal(self) -> None:
        for asked in self.asked:
            finish = asked.answer.finish
            if finish is not None and finish.cached_prompt_tokens:
                others = {prefix for other in self.asked if other is not asked for prefix in other.prefixes()}
                assert asked.prefix(finish.cached_prompt_tokens) in self.computed | others
        for asked in self.asked:
            self.computed |= asked.prefixes()

    def set_pinned(self, name: str, pinned: bool) -> None:
        if pinned:
            self.pinned.add(name)
            for asked in self.asked:
                asked.was_pinned_against = True
        else:
            self.pinned.discard(name)

    def teardown(self) -> None:
        self.harness.finish()
        self.every_token_is_right()
        for name in self.held:
            self.store.delete(name)
        while self.store.is_moving:
            self.harness.wait()
        self.store.check()
        assert self.store.num_pages[0] == 0
        assert self.store.capacity().host_bytes_used == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stateful")
    model = make_model("llama", root / "base", num_hidden_layers=1)
    save_tokenizer(root / "base")
    for seed, (name, rank) in enumerate(CONTENTS.items()):
        invocation = {"alora_invocation_tokens": list(INVOCATION)} if name == ACTIVATED else {}
        modules = ["q_proj", "v_proj", "down_proj"]
        make_adapter(model, root / "adapters" / name, seed, r=rank, target_modules=modules, **invocation)
    return root


@pytest.mark.parametrize(("host_bytes", "run_ahead"), [(0, False), (30_000, False), (1 << 30, False), (30_000, True)])
def test_whatever_happens_to_adapters_no_request_gets_a_wrong_token(
    folder: Path, host_bytes: int, run_ahead: bool
) -> None:
    adapters = {name: folder / "adapters" / name for name in CONTENTS}
    roomy = Harness(folder / "base", adapters, prefix_cache=False)

    @cache
    def expect(mix: tuple[str, ...], seed: int) -> list[int]:
        return roomy.run([ask(mix, seed)])[0].ids

    # A stand-in, so that the harness may read the folder: no name is held when the first run begins.
    harness = Harness(
        folder / "base",
        {"c0": folder / "adapters" / "c0"},
        adapter_pages=PAGES,
        kv_tokens=128,
        block_tokens=BLOCK,
        max_running_requests=6,
        adapter_host_bytes=host_bytes,
        run_ahead=run_ahead,
    )
    harness.store.delete("c0")
    run_state_machine_as_test(
        partial(Adapters, harness, folder / "adapters", expect, set()),
        settings=settings(
            max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
