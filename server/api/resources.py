"""What the store says of adapters -> messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from weft.adapters.classes import ProblemType
from weft.adapters.records import AdapterInfo, AdapterState, EventKind
from weft.adapters.report import AdapterReport
from weft.errors import Problem
from weft.v1 import adapter_pb2 as pb2
from weft.v1 import inference_pb2

STATES = {
    AdapterState.LOADING: pb2.ADAPTER_STATE_LOADING,
    AdapterState.DISK: pb2.ADAPTER_STATE_DISK,
    AdapterState.HOST: pb2.ADAPTER_STATE_HOST,
    AdapterState.DEVICE: pb2.ADAPTER_STATE_DEVICE,
    AdapterState.FAILED: pb2.ADAPTER_STATE_FAILED,
}

PROBLEM_TYPES = {
    ProblemType.SINGLE_LABEL: inference_pb2.PROBLEM_TYPE_SINGLE_LABEL,
    ProblemType.MULTI_LABEL: inference_pb2.PROBLEM_TYPE_MULTI_LABEL,
    ProblemType.REGRESSION: inference_pb2.PROBLEM_TYPE_REGRESSION,
}

EVENT_KINDS = {
    EventKind.ADDED: pb2.ADAPTER_EVENT_KIND_ADDED,
    EventKind.CHANGED: pb2.ADAPTER_EVENT_KIND_CHANGED,
    EventKind.DELETED: pb2.ADAPTER_EVENT_KIND_DELETED,
}


def to_message(info: AdapterInfo, *, in_list: bool = False) -> pb2.Adapter:
    """A snapshot as a resource. in_list: without what may be long, so that many fit in one message."""
    return pb2.Adapter(
        name=info.name,
        source=info.source,
        digest=info.digest,
        state=STATES[info.state],
        ranks=info.ranks,
        modules=_module_names(info.modules),
        device_bytes=info.device_bytes,
        host_bytes=info.host_bytes,
        disk_bytes=info.disk_bytes,
        pinned=info.pinned,
        labels=info.labels,
        error=info.error,
        create_time=_timestamp(info.created_s),
        last_used_time=_timestamp(info.last_used_s),
        requests_in_flight=info.num_in_flight,
        num_pages=info.num_pages,
        parity_error=info.probe_error,
        class_labels=info.classes.labels if info.classes and not in_list else (),
        problem_type=PROBLEM_TYPES[info.classes.problem_type] if info.classes else None,
    )


def to_report(report: AdapterReport) -> pb2.AdapterReport:
    """A dry run, as it is told."""
    modules = [
        pb2.ModuleReport(
            name=module.name,
            kind=module.kind,
            applied=module.applied,
            rank=module.rank,
            scale=module.scale,
            dtype=module.dtype,
            num_pages=module.num_pages,
            num_bytes=module.num_bytes,
        )
        for module in report.modules
    ]
    return pb2.AdapterReport(
        source=report.source,
        digest=report.digest,
        modules=modules,
        problems=to_problems(report.problems),
        num_pages=report.num_pages,
        device_bytes=report.device_bytes,
        parity_error=report.probe_error,
    )


def to_problems(problems: Iterable[Problem]) -> list[pb2.AdapterProblem]:
    """Why an adapter can't be served."""
    return [pb2.AdapterProblem(subject=problem.subject, description=problem.description) for problem in problems]


def _module_names(paths: Sequence[str]) -> list[str]:
    """`model.layers.0.self_attn.q_proj`, … as `q_proj`, each once."""
    return sorted({path.rpartition(".")[2] for path in paths})


def _timestamp(seconds: float | None) -> Timestamp | None:
    if seconds is None:
        return None
    timestamp = Timestamp()
    timestamp.FromNanoseconds(round(seconds * 1e9))
    return timestamp
