from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "model", "dtype", "device", "limits", "capabilities")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    version: str
    model: str
    dtype: str
    device: str
    limits: Limits
    capabilities: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[str] = ..., model: _Optional[str] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., capabilities: _Optional[_Iterable[str]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_context_tokens", "max_prompt_tokens", "max_batch_tokens", "max_running_requests", "max_queued_requests", "kv_capacity_tokens", "adapter_pages", "adapter_page_rank_rows", "max_adapters_per_request", "max_stop_sequences", "max_top_logprobs", "max_logit_bias", "max_answers", "max_continuations", "max_constraint_bytes", "max_queued_tokens", "max_queued_requests_per_adapter", "max_request_time")
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_PAGES_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_PAGE_RANK_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_ADAPTERS_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    MAX_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTINUATIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONSTRAINT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_PER_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_TIME_FIELD_NUMBER: _ClassVar[int]
    max_context_tokens: int
    max_prompt_tokens: int
    max_batch_tokens: int
    max_running_requests: int
    max_queued_requests: int
    kv_capacity_tokens: int
    adapter_pages: int
    adapter_page_rank_rows: int
    max_adapters_per_request: int
    max_stop_sequences: int
    max_top_logprobs: int
    max_logit_bias: int
    max_answers: int
    max_continuations: int
    max_constraint_bytes: int
    max_queued_tokens: int
    max_queued_requests_per_adapter: int
    max_request_time: _duration_pb2.Duration
    def __init__(self, max_context_tokens: _Optional[int] = ..., max_prompt_tokens: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_running_requests: _Optional[int] = ..., max_queued_requests: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., adapter_pages: _Optional[int] = ..., adapter_page_rank_rows: _Optional[int] = ..., max_adapters_per_request: _Optional[int] = ..., max_stop_sequences: _Optional[int] = ..., max_top_logprobs: _Optional[int] = ..., max_logit_bias: _Optional[int] = ..., max_answers: _Optional[int] = ..., max_continuations: _Optional[int] = ..., max_constraint_bytes: _Optional[int] = ..., max_queued_tokens: _Optional[int] = ..., max_queued_requests_per_adapter: _Optional[int] = ..., max_request_time: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...
