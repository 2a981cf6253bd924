"""What an RPC leaves in the access log and in a trace, whichever way it ends."""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import grpc
import pytest
from house import ENDLESS, House, generate, refusal, stream
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, rpc_attributes
from opentelemetry.trace import SpanKind, StatusCode

from weft.server.logs import add_scope
from weft.v1 import inference_pb2 as pb2

SECRET = "the-prompt-that-nobody-may-read"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
KNOWN = {
    value
    for module in (gen_ai_attributes, rpc_attributes)
    for name, value in vars(module).items()
    if name.startswith(("GEN_AI_", "RPC_")) and isinstance(value, str)
}
"""The attributes that OpenTelemetry's own package has."""


class Access(logging.Handler):
    """The lines of the access log, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.addFilter(add_scope)
        self._lines: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.put(record)

    def one(self, method: str) -> Any:
        """The next line of an RPC of this name; it may be written after its client has the answer."""
        while not (line := self._lines.get(timeout=60)).method.endswith(f"/{method}"):
            pass
        return line


@pytest.fixture
def access() -> Iterator[Access]:
    access, logger = Access(), logging.getLogger("weft.access")
    logger.addHandler(access)
    logger.setLevel(logging.INFO)
    yield access
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(access)


class TestAccess:
    def test_a_finished_request_is_one_line(self, house: House, access: Access) -> None:
        request = generate(text="hello", adapter_id="one", request_id="r-1", stopping={"max_tokens": 3})
        request.stopping.ignore_eos = True
        answer = house.inference.Generate(request)
        line = access.one("Generate")
        assert (line.request_id, line.code, line.outcome) == ("r-1", "OK", "max_tokens")
        assert line.adapters == (f"one@{house.digest('one')}",)
        assert (line.prompt_tokens, line.completion_tokens) == (answer.usage.prompt_tokens, 3)
        assert line.decode_s == pytest.approx(answer.timing.decode.ToNanoseconds() / 1e9, abs=1e-6)
        assert line.duration_s >= line.queue_s + line.prefill_s + line.decode_s
        assert "max_tokens prompt_tokens=" in line.getMessage()

    def test_a_score_is_one_line(self, house: House, access: Access) -> None:
        house.inference.Score(pb2.ScoreRequest(text="2+2=", continuations=["4", "5"], request_id="s-1"))
        line = access.one("Score")
        assert (line.request_id, line.code, line.completion_tokens) == ("s-1", "OK", 0)

    def test_a_vector_is_one_line(self, house: House, access: Access) -> None:
        house.inference.Embed(pb2.EmbedRequest(text="hello", adapter_id="one", request_id="e-1"))
        line = access.one("Embed")
        assert (line.request_id, line.code, line.prompt_tokens, line.completion_tokens) == ("e-1", "OK", 6, 0)
        assert line.adapters == (f"one@{house.digest('one')}",)

    def test_a_refused_request_is_told_by_its_fields_and_never_quoted(self, house: House, access: Access) -> None:
        request = generate(
            chat={"messages": [{"role": "villain", "content": SECRET}]},
            request_id="r-2",
            sampling={"temperature": -1},
            stopping={"stop_sequences": [SECRET] * 100},
        )
        refusal(lambda: house.inference.Generate(request))
        line = access.one("Generate")
        assert (line.request_id, line.code, line.outcome) == ("r-2", "INVALID_ARGUMENT", "invalid_argument")
        assert line.problem == "sampling.temperature, stopping.stop_sequences"
        assert SECRET not in line.getMessage()

    def test_a_template_that_refuses_a_prompt_does_not_quote_it_either(self, house: House, access: Access) -> None:
        request = generate(chat={"messages": [{"role": "villain", "content": SECRET}]})
        refusal(lambda: house.inference.Generate(request))
        line = access.one("Generate")
        assert line.code == "INVALID_ARGUMENT"
        assert "villains" not in line.getMessage()

    def test_an_adapter_that_is_not_there_is_named(self, house: House, access: Access) -> None:
        refusal(lambda: house.inference.Generate(generate(text="x", adapter_id="nobody")))
        line = access.one("Generate")
        assert line.code == "NOT_FOUND"
        assert line.problem.startswith("adapter 'nobody' is not loaded")
        assert f' problem="{line.problem}"' in line.getMessage(), "in one word, so that no name passes for a field"

    def test_a_client_that_goes_is_cancelled(self, house: House, access: Access) -> None:
        endless = {"max_tokens": ENDLESS - 8, "ignore_eos": True}
        call = house.inference.StreamGenerate(stream(text="x", request_id="r-3", stopping=endless))
        next(call)
        call.cancel()
        line = access.one("StreamGenerate")
        assert (line.request_id, line.code, line.outcome) == ("r-3", "CANCELLED", "cancelled")
        assert line.decode_s >= 0

    def test_a_deadline_is_told_as_one(self, house: House, access: Access) -> None:
        endless = {"max_tokens": ENDLESS - 8, "ignore_eos": True}
        with pytest.raises(grpc.RpcError):
            house.inference.Generate(generate(text="x", stopping=endless), timeout=0.2)
        assert access.one("Generate").code == "DEADLINE_EXCEEDED"

    def test_what_changes_adapters_is_there_too(self, house: House, access: Access) -> None:
        refusal(lambda: house.get("nobody"))
        line = access.one("GetAdapter")
        assert (line.code, line.method) == ("NOT_FOUND", "weft.v1.AdapterService/GetAdapter")


class Traced(SpanExporter):
    """A stub whose requests are traced, and the spans of the one that was sent."""

    def __init__(self) -> None:
        self.stub: Any = None
        self._ended: queue.SimpleQueue[ReadableSpan] = queue.SimpleQueue()
        self._spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            self._ended.put(span)
        return SpanExportResult.SUCCESS

    @property
    def spans(self) -> list[ReadableSpan]:
        """All, the request's own at the end, as it may end after its client has the answer."""
        while not self._spans or self._spans[-1].kind is not SpanKind.SERVER:
            self._spans.append(self._ended.get(timeout=60))
        return self._spans

    @property
    def server(self) -> ReadableSpan:
        return self.spans[-1]

    @property
    def phases(self) -> list[ReadableSpan]:
        assert self.server.context is not None
        own = self.server.context.span_id
        return [span for span in self.spans if span.parent is not None and span.parent.span_id == own]


@contextmanager
def tracing(house: House) -> Iterator[Traced]:
    traced, provider = Traced(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(traced))
    with house.variant(tracer=provider.get_tracer("weft")) as stub:
        traced.stub = stub
        yield traced


@pytest.fixture
def traced(house: House) -> Iterator[Traced]:
    with tracing(house) as traced:
        yield traced


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    return span.attributes or {}


class TestSpans:
    def test_a_request_is_a_span_by_the_conventions(self, house: House, traced: Traced) -> None:
        request = generate(
            text="hello",
            adapter_id="one",
            request_id="r-1",
            sampling={"temperature": 0.5, "top_p": 0.9, "top_k": 40, "seed": 7},
            stopping={"max_tokens": 3, "ignore_eos": True},
        )
        answer = traced.stub.Generate(request)
        span = traced.server
        digest = house.digest("one")
        assert span.name == "text_completion one"
        told = dict(attributes(span))
        assert told.pop("gen_ai.response.time_to_first_chunk") > 0
        assert told.pop("gen_ai.request.top_p") == pytest.approx(0.9)
        assert told == {
            "rpc.system.name": "grpc",
            "rpc.method": "weft.v1.InferenceService/Generate",
            "rpc.response.status_code": "OK",
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "weft",
            "gen_ai.output.type": "text",
            "gen_ai.request.model": "one",
            "gen_ai.request.stream": False,
            "gen_ai.request.max_tokens": 3,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_k": 40,
            "gen_ai.request.seed": 7,
            "gen_ai.response.id": "r-1",
            "gen_ai.response.model": f"one@{digest}",
            "gen_ai.response.finish_reasons": ("length",),
            "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
            "gen_ai.usage.output_tokens": 3,
            "gen_ai.usage.cache_read.input_tokens": answer.usage.cached_prompt_tokens,
            "weft.finish_reasons": ("max_tokens",),
            "weft.adapter.names": ("one",),
            "weft.adapter.digests": (digest,),
            "weft.request.id": "r-1",
        }
        assert span.status.status_code is StatusCode.UNSET

    def test_every_name_is_one_that_the_conventions_have_or_our_own(self, traced: Traced) -> None:
        traced.stub.Generate(generate(text="hello", stopping={"max_tokens": 1}, sampling={"frequency_penalty": 1}))
        names = {name for name in attributes(traced.server) if not name.startswith("weft.")}
        assert names <= KNOWN

    def test_phases_are_children_with_the_times_of_the_answer(self, traced: Traced) -> None:
        answer = traced.stub.Generate(generate(text="hello", stopping={"max_tokens": 4, "ignore_eos": True}))
        span, phases = traced.server, traced.phases
        assert [phase.name for phase in phases] == ["queue", "prefill", "decode"]
        for phase, told in zip(phases, (answer.timing.queue, answer.timing.prefill, answer.timing.decode), strict=True):
            assert phase.start_time is not None
            assert phase.end_time is not None
            assert phase.end_time - phase.start_time == pytest.approx(told.ToNanoseconds(), abs=1000)
        for before, after in pairwise(phases):
            assert before.end_time == after.start_time
        assert span.start_time is not None
        assert span.end_time is not None
        assert phases[-1].end_time is not None
        assert phases[-1].end_time <= span.end_time

    def test_a_chat_for_the_base_is_named_so(self, traced: Traced) -> None:
        message = {"role": "user", "content": SECRET}
        request = stream(chat={"messages": [message]}, stopping={"max_tokens": 1}, json_schema="{}")
        assert list(traced.stub.StreamGenerate(request))
        told = attributes(traced.server)
        assert traced.server.name == "chat base"
        assert told["gen_ai.request.stream"] is True
        assert told["gen_ai.output.type"] == "json"
        assert told["gen_ai.response.model"] == "base"

    def test_nothing_holds_what_was_asked(self, traced: Traced) -> None:
        stopping = {"max_tokens": 2, "stop_sequences": [SECRET]}
        traced.stub.Generate(generate(text=SECRET, stopping=stopping, cache_salt=SECRET))
        for span in (traced.server, *traced.phases):
            assert SECRET not in span.to_json()

    def test_it_belongs_to_the_trace_of_its_client(self, traced: Traced) -> None:
        traced.stub.Generate(generate(text="hello", stopping={"max_tokens": 1}), metadata=TRACEPARENT)
        span = traced.server
        assert span.parent is not None
        assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
        assert {phase.context.trace_id for phase in traced.phases if phase.context} == {int(TRACE, 16)}

    def test_a_refusal_says_why_and_is_no_failure_of_the_server(self, traced: Traced) -> None:
        refusal(lambda: traced.stub.Generate(generate(text="hello", adapter_id="nobody")))
        told = attributes(traced.server)
        assert told["error.type"] == told["rpc.response.status_code"] == "NOT_FOUND"
        assert traced.server.status.status_code is StatusCode.UNSET

    def test_a_request_that_its_client_leaves_shows_how_far_it_was(self, traced: Traced) -> None:
        endless = {"max_tokens": ENDLESS - 8, "ignore_eos": True}
        call = traced.stub.StreamGenerate(stream(text="hello", stopping=endless))
        next(call)
        call.cancel()
        assert attributes(traced.server)["error.type"] == "CANCELLED"
        assert [phase.name for phase in traced.phases][-1] == "decode"

    def test_a_deadline_is_a_failure_of_the_server(self, traced: Traced) -> None:
        endless = {"max_tokens": ENDLESS - 8, "ignore_eos": True}
        with pytest.raises(grpc.RpcError):
            traced.stub.Generate(generate(text="hello", stopping=endless), timeout=0.2)
        assert traced.server.status.status_code is StatusCode.ERROR
        assert attributes(traced.server)["error.type"] == "DEADLINE_EXCEEDED"

    def test_a_line_of_the_log_names_its_trace(self, traced: Traced, access: Access) -> None:
        traced.stub.Generate(generate(text="hello", stopping={"max_tokens": 1}), metadata=TRACEPARENT)
        line = access.one("Generate")
        assert line.trace_id == TRACE
        assert traced.server.context is not None
        assert line.span_id == f"{traced.server.context.span_id:016x}"
