"""Spoilt adapters, hundreds of them, asked of a server at work: each refused with the reason; nothing else moves."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details_pb2
from house import Refusal, generate, refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutated_configs import no_config, odd_files, wrong_fields, wrong_values
from mutated_weights import lying_header, of_all_tensors, of_every_tensor, truncated
from mutations import (
    CONFIG,
    GOOD,
    STRANGER_PARTS,
    STRANGERS,
    WEIGHTS,
    Mutation,
    Spoil,
    config,
    make_base,
    make_good,
    tensors,
)
from serving import served

from weft.adapters.store import AdapterStore, NewAdapter
from weft.errors import InvalidAdapter, InvalidRequest
from weft.server.config import EngineConfig, ModelConfig, ServerConfig
from weft.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2_grpc

NEW_TOKENS = 3
PARTS = (truncated, of_every_tensor, of_all_tensors, lying_header, no_config, wrong_fields, wrong_values, odd_files)
ALL = [mutation for part in PARTS for mutation in part()]


@dataclass
class Bench:
    """A server with a good adapter of every kind, and what each answers."""

    channel: grpc.Channel
    store: AdapterStore
    root: Path
    expected: dict[str, list[int]] = field(default_factory=dict)
    turn: Iterator[str] = field(
        default_factory=lambda: itertools.cycle([name for good in GOOD for name in (good, *[""] * 4)])
    )

    def ask(self, name: str) -> Any:
        """Begin to generate with an adapter; gives a future."""
        request = generate(
            adapter_id=name,
            token_ids={"ids": [1, 9, 5, 104, 105, 30]},
            stopping={"max_tokens": NEW_TOKENS, "ignore_eos": True},
        )
        return inference_pb2_grpc.InferenceServiceStub(self.channel).Generate.future(request, timeout=120)

    def check(self, name: str, asked: Any) -> None:
        assert [token.id for token in asked.result().tokens] == self.expected[name]

    def create(self, folder: Path) -> adapter_pb2.CreateAdapterResponse:
        adapter = {"name": "spoilt", "source": f"file:{folder}"}
        request = adapter_pb2.CreateAdapterRequest(adapter=adapter, wait=True)
        return adapter_pb2_grpc.AdapterServiceStub(self.channel).CreateAdapter(request, timeout=120)

    def audit(self) -> None:
        """Nothing is there but the good ones."""
        assert [info.name for info in self.store.list()] == sorted(GOOD)
        self.store.check()

    def audit_files(self) -> None:
        """Nothing is held of any file."""
        held = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
        assert [path for path in held if path.is_relative_to(self.root / "adapters")] == []
        assert f"{self.root}/adapters" not in Path("/proc/self/maps").read_text()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("mutations")
    model = make_base(root / "base")
    for kind in GOOD:
        make_good(model, root / "adapters" / kind, kind)
    config = ServerConfig(
        model=ModelConfig(str(root / "base"), dtype="float32", device="cpu"),
        engine=EngineConfig(max_batch_tokens=64, max_running_requests=8, kv_tokens=512, adapter_pages=64),
        port=0,
        metrics_port=0,
        source_roots=(root / "adapters",),
        drain_grace_s=0.0,
    )
    with served(config) as server, grpc.insecure_channel(server.address) as channel:
        assert server._loaded is not None
        bench = Bench(channel, server._loaded.frontend._store, root)
        for kind in GOOD:
            bench.store.create(NewAdapter(kind, f"file:{root / 'adapters' / kind}"))
            bench.expected[kind] = [token.id for token in bench.ask(kind).result().tokens]
        yield bench


@pytest.fixture
def folder(bench: Bench) -> Iterator[Path]:
    """Where to put a folder under the root."""
    path = bench.root / "adapters" / "spoilt"
    yield path
    for info in bench.store.list():
        if info.name not in GOOD:
            bench.store.delete(info.name)
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def refused(bench: Bench, folder: Path, words: str) -> Refusal:
    """The refusal, which must be of the right form, and be what a dry run says; while somebody else is served."""
    before = bench.store.capacity()
    name = next(bench.turn)
    asked = bench.ask(name) if name else None
    told = refusal(lambda: bench.create(folder))
    if asked is not None:
        bench.check(name, asked)
    assert told.code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT), told
    assert words in told.message, told.message
    assert told.message.isprintable()
    assert bench.store.capacity() == before
    assert all(subject for subject, _ in problems_of(told))
    check_dry_run(bench, folder, words, told)
    bench.audit()
    return told


def problems_of(told: Refusal) -> list[tuple[str, str]]:
    if told.code is grpc.StatusCode.INVALID_ARGUMENT:
        return list(told.violations.items())
    violations = told.detail(details_pb2.PreconditionFailure).violations
    return [(v.subject, v.description) for v in violations if "are not listed" not in v.description]


def check_dry_run(bench: Bench, folder: Path, words: str, told: Refusal) -> None:
    if told.code is grpc.StatusCode.INVALID_ARGUMENT:
        with pytest.raises(InvalidRequest, match=re.escape(words or "adapter.source")):
            bench.store.inspect(f"file:{folder}")
        return
    report = bench.store.inspect(f"file:{folder}")
    assert report.problems[0].subject.startswith(problems_of(told)[0][0].rstrip("…"))


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: f"{mutation.kind}: {mutation.id}")
def test_a_spoilt_folder_is_refused_and_nobody_notices(mutation: Mutation, bench: Bench, folder: Path) -> None:
    shutil.copytree(bench.root / "adapters" / mutation.kind, folder)
    mutation.spoil(folder)
    refused(bench, folder, mutation.words)


@pytest.mark.parametrize("stranger", STRANGERS)
def test_an_adapter_of_another_base_is_refused(stranger: str, bench: Bench, folder: Path, tmp_path: Path) -> None:
    make_good(make_base(tmp_path, **STRANGERS[stranger]), folder, "lora")
    assert {".q_proj" in subject for subject, _ in problems_of(refused(bench, folder, "layers."))} >= {True}


@pytest.mark.parametrize("stranger", STRANGER_PARTS)
def test_an_adapter_of_a_base_that_differs_in_part_is_refused(
    stranger: str, bench: Bench, folder: Path, tmp_path: Path
) -> None:
    differences, kind = STRANGER_PARTS[stranger]
    make_good(make_base(tmp_path, **differences), folder, kind)
    refused(bench, folder, "this base")


def flipped(data: bytes, flips: list[tuple[float, int]]) -> bytes:
    changed = bytearray(data)
    for at, mask in flips:
        changed[int(at * (len(data) - 1))] ^= mask
    return bytes(changed)


FLIPS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), min_size=1, max_size=3)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(flips=FLIPS, kind=st.sampled_from(sorted(GOOD)))
def test_flipped_bytes_are_refused_or_served_right(
    name: str, bench: Bench, folder: Path, flips: list[tuple[float, int]], kind: str
) -> None:
    """In the config, and in the header of the weights: those of their numbers make another adapter, not a wrong one."""
    shutil.copytree(bench.root / "adapters" / kind, folder, dirs_exist_ok=True)
    data = (folder / name).read_bytes()
    length = 8 + int.from_bytes(data[:8], "little") if name == WEIGHTS else len(data)
    (folder / name).write_bytes(flipped(data[:length], flips) + data[length:])
    info = None
    with suppress(InvalidAdapter):
        info = bench.store.create(NewAdapter("flipped", f"file:{folder}"))
    if info is not None:
        assert info.probe_error is not None
        assert info.probe_error < 1e-4
        assert name == CONFIG or info.digest == bench.store.get(kind).digest
        bench.store.delete("flipped")
    bench.audit()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), kind=st.sampled_from(sorted(GOOD)))
def test_any_json_in_a_config_is_refused_or_served_right(
    bench: Bench, folder: Path, data: st.DataObject, kind: str
) -> None:
    shutil.copytree(bench.root / "adapters" / kind, folder, dirs_exist_ok=True)
    held = json.loads((folder / CONFIG).read_text())
    changes = data.draw(
        st.dictionaries(st.sampled_from(sorted(held)) | st.text(max_size=8), JSON, min_size=1, max_size=3)
    )
    gone = data.draw(st.sets(st.sampled_from(sorted(held)), max_size=2))
    (folder / CONFIG).write_text(json.dumps({**{key: held[key] for key in held if key not in gone}, **changes}))
    with suppress(InvalidAdapter):
        info = bench.store.create(NewAdapter("changed", f"file:{folder}"))
        assert info.probe_error is not None
        assert info.probe_error < 1e-4
        bench.store.delete("changed")
    bench.audit()


def test_a_file_that_is_cut_short_later_takes_nobody_with_it(bench: Bench, folder: Path) -> None:
    """What is served lies in memory of its own, not in a view of a file that others can change."""
    for kind in GOOD:
        shutil.copytree(bench.root / "adapters" / kind, folder)
        bench.store.create(NewAdapter("later", f"file:{folder}"))
        os.truncate(folder / WEIGHTS, 0)
        asked = bench.ask("later")
        assert [token.id for token in asked.result().tokens] == bench.expected[kind]
        bench.store.delete("later")
        shutil.rmtree(folder)
    bench.audit_files()


def num_threads_and_files() -> tuple[int, int]:
    return threading.active_count(), sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_nothing_is_left_of_refusals(bench: Bench, folder: Path) -> None:
    """Neither threads, nor descriptors, nor mapped memory."""
    shutil.copytree(bench.root / "adapters" / "lora", folder)
    os.truncate(folder / WEIGHTS, 2000)
    refused(bench, folder, WEIGHTS)
    before = num_threads_and_files()
    for _ in range(10):
        refused(bench, folder, WEIGHTS)
    assert num_threads_and_files() == before
    bench.audit_files()


@pytest.mark.parametrize(
    "spoil",
    [
        config(lora_dropout=0.5),
        config(base_model_name_or_path="elsewhere/ünïcode", revision="main", peft_version="99.0"),
        config(inference_mode=False, fan_in_fan_out=True, runtime_config={"ephemeral_gpu_offload": True}),
        config(target_modules=["q_proj", "v_proj", "c_attn"]),
        config(target_modules=r".*\.[qv]_proj"),
        config(exclude_modules=["c_attn"], layers_to_transform=[0, 1]),
        config(a_field_of_tomorrow=None),
        tensors(lambda held: held.update({key: tensor.double() for key, tensor in held.items()})),
    ],
)
def test_what_does_not_matter_changes_nothing(spoil: Spoil, bench: Bench, folder: Path) -> None:
    shutil.copytree(bench.root / "adapters" / "lora", folder)
    spoil(folder)
    bench.create(folder)
    assert [token.id for token in bench.ask("spoilt").result().tokens] == bench.expected["lora"]
