from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from weft.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    ADAPTER_STATE_LOADING: _ClassVar[AdapterState]
    ADAPTER_STATE_DISK: _ClassVar[AdapterState]
    ADAPTER_STATE_HOST: _ClassVar[AdapterState]
    ADAPTER_STATE_DEVICE: _ClassVar[AdapterState]
    ADAPTER_STATE_FAILED: _ClassVar[AdapterState]

class AdapterEventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_EVENT_KIND_UNSPECIFIED: _ClassVar[AdapterEventKind]
    ADAPTER_EVENT_KIND_ADDED: _ClassVar[AdapterEventKind]
    ADAPTER_EVENT_KIND_CHANGED: _ClassVar[AdapterEventKind]
    ADAPTER_EVENT_KIND_DELETED: _ClassVar[AdapterEventKind]
    ADAPTER_EVENT_KIND_LISTED: _ClassVar[AdapterEventKind]
ADAPTER_STATE_UNSPECIFIED: AdapterState
ADAPTER_STATE_LOADING: AdapterState
ADAPTER_STATE_DISK: AdapterState
ADAPTER_STATE_HOST: AdapterState
ADAPTER_STATE_DEVICE: AdapterState
ADAPTER_STATE_FAILED: AdapterState
ADAPTER_EVENT_KIND_UNSPECIFIED: AdapterEventKind
ADAPTER_EVENT_KIND_ADDED: AdapterEventKind
ADAPTER_EVENT_KIND_CHANGED: AdapterEventKind
ADAPTER_EVENT_KIND_DELETED: AdapterEventKind
ADAPTER_EVENT_KIND_LISTED: AdapterEventKind

class Adapter(_message.Message):
    __slots__ = ("name", "source", "digest", "state", "ranks", "modules", "device_bytes", "host_bytes", "disk_bytes", "pinned", "labels", "error", "create_time", "last_used_time", "requests_in_flight", "num_pages", "parity_error", "class_labels", "problem_type")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_TIME_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    PARITY_ERROR_FIELD_NUMBER: _ClassVar[int]
    CLASS_LABELS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_TYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    digest: str
    state: AdapterState
    ranks: _containers.RepeatedScalarFieldContainer[int]
    modules: _containers.RepeatedScalarFieldContainer[str]
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    pinned: bool
    labels: _containers.ScalarMap[str, str]
    error: str
    create_time: _timestamp_pb2.Timestamp
    last_used_time: _timestamp_pb2.Timestamp
    requests_in_flight: int
    num_pages: int
    parity_error: float
    class_labels: _containers.RepeatedScalarFieldContainer[str]
    problem_type: _inference_pb2.ProblemType
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., digest: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., ranks: _Optional[_Iterable[int]] = ..., modules: _Optional[_Iterable[str]] = ..., device_bytes: _Optional[int] = ..., host_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., pinned: bool = ..., labels: _Optional[_Mapping[str, str]] = ..., error: _Optional[str] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., last_used_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., requests_in_flight: _Optional[int] = ..., num_pages: _Optional[int] = ..., parity_error: _Optional[float] = ..., class_labels: _Optional[_Iterable[str]] = ..., problem_type: _Optional[_Union[_inference_pb2.ProblemType, str]] = ...) -> None: ...

class CreateAdapterRequest(_message.Message):
    __slots__ = ("adapter", "wait")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    wait: bool
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., wait: bool = ...) -> None: ...

class CreateAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "state", "labels", "name_prefix")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NAME_PREFIX_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    state: AdapterState
    labels: _containers.ScalarMap[str, str]
    name_prefix: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., name_prefix: _Optional[str] = ...) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters", "next_page_token")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    next_page_token: str
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateAdapterRequest(_message.Message):
    __slots__ = ("adapter", "update_mask")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    UPDATE_MASK_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    update_mask: _field_mask_pb2.FieldMask
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ..., update_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class UpdateAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class DeleteAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DeleteAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class WatchAdaptersRequest(_message.Message):
    __slots__ = ("state", "labels", "name_prefix")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NAME_PREFIX_FIELD_NUMBER: _ClassVar[int]
    state: AdapterState
    labels: _containers.ScalarMap[str, str]
    name_prefix: str
    def __init__(self, state: _Optional[_Union[AdapterState, str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., name_prefix: _Optional[str] = ...) -> None: ...

class WatchAdaptersResponse(_message.Message):
    __slots__ = ("kind", "adapter")
    KIND_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    kind: AdapterEventKind
    adapter: Adapter
    def __init__(self, kind: _Optional[_Union[AdapterEventKind, str]] = ..., adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class CheckAdapterRequest(_message.Message):
    __slots__ = ("source",)
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    source: str
    def __init__(self, source: _Optional[str] = ...) -> None: ...

class CheckAdapterResponse(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: AdapterReport
    def __init__(self, report: _Optional[_Union[AdapterReport, _Mapping]] = ...) -> None: ...

class AdapterReport(_message.Message):
    __slots__ = ("source", "digest", "modules", "problems", "num_pages", "device_bytes", "parity_error")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PARITY_ERROR_FIELD_NUMBER: _ClassVar[int]
    source: str
    digest: str
    modules: _containers.RepeatedCompositeFieldContainer[ModuleReport]
    problems: _containers.RepeatedCompositeFieldContainer[AdapterProblem]
    num_pages: int
    device_bytes: int
    parity_error: float
    def __init__(self, source: _Optional[str] = ..., digest: _Optional[str] = ..., modules: _Optional[_Iterable[_Union[ModuleReport, _Mapping]]] = ..., problems: _Optional[_Iterable[_Union[AdapterProblem, _Mapping]]] = ..., num_pages: _Optional[int] = ..., device_bytes: _Optional[int] = ..., parity_error: _Optional[float] = ...) -> None: ...

class ModuleReport(_message.Message):
    __slots__ = ("name", "kind", "applied", "rank", "scale", "dtype", "num_pages", "num_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    kind: str
    applied: bool
    rank: int
    scale: float
    dtype: str
    num_pages: int
    num_bytes: int
    def __init__(self, name: _Optional[str] = ..., kind: _Optional[str] = ..., applied: bool = ..., rank: _Optional[int] = ..., scale: _Optional[float] = ..., dtype: _Optional[str] = ..., num_pages: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class AdapterProblem(_message.Message):
    __slots__ = ("subject", "description")
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    subject: str
    description: str
    def __init__(self, subject: _Optional[str] = ..., description: _Optional[str] = ...) -> None: ...

class PlanCapacityRequest(_message.Message):
    __slots__ = ("sources", "shapes", "ranks")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    SHAPES_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedScalarFieldContainer[str]
    shapes: _containers.RepeatedCompositeFieldContainer[AdapterShape]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sources: _Optional[_Iterable[str]] = ..., shapes: _Optional[_Iterable[_Union[AdapterShape, _Mapping]]] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class AdapterShape(_message.Message):
    __slots__ = ("rank", "count")
    RANK_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    count: int
    def __init__(self, rank: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class PlanCapacityResponse(_message.Message):
    __slots__ = ("fits", "pages_needed", "pages_total", "pages_free", "pages_pinned", "host_bytes_needed", "host_bytes_total", "host_bytes_used", "kv_tokens_total", "kv_tokens_free", "sources", "rooms")
    FITS_FIELD_NUMBER: _ClassVar[int]
    PAGES_NEEDED_FIELD_NUMBER: _ClassVar[int]
    PAGES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PAGES_FREE_FIELD_NUMBER: _ClassVar[int]
    PAGES_PINNED_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_NEEDED_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_FREE_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    ROOMS_FIELD_NUMBER: _ClassVar[int]
    fits: bool
    pages_needed: int
    pages_total: int
    pages_free: int
    pages_pinned: int
    host_bytes_needed: int
    host_bytes_total: int
    host_bytes_used: int
    kv_tokens_total: int
    kv_tokens_free: int
    sources: _containers.RepeatedCompositeFieldContainer[PlannedSource]
    rooms: _containers.RepeatedCompositeFieldContainer[RankRoom]
    def __init__(self, fits: bool = ..., pages_needed: _Optional[int] = ..., pages_total: _Optional[int] = ..., pages_free: _Optional[int] = ..., pages_pinned: _Optional[int] = ..., host_bytes_needed: _Optional[int] = ..., host_bytes_total: _Optional[int] = ..., host_bytes_used: _Optional[int] = ..., kv_tokens_total: _Optional[int] = ..., kv_tokens_free: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[PlannedSource, _Mapping]]] = ..., rooms: _Optional[_Iterable[_Union[RankRoom, _Mapping]]] = ...) -> None: ...

class PlannedSource(_message.Message):
    __slots__ = ("source", "digest", "num_pages", "host_bytes", "problems")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_PAGES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    source: str
    digest: str
    num_pages: int
    host_bytes: int
    problems: _containers.RepeatedCompositeFieldContainer[AdapterProblem]
    def __init__(self, source: _Optional[str] = ..., digest: _Optional[str] = ..., num_pages: _Optional[int] = ..., host_bytes: _Optional[int] = ..., problems: _Optional[_Iterable[_Union[AdapterProblem, _Mapping]]] = ...) -> None: ...

class RankRoom(_message.Message):
    __slots__ = ("rank", "count")
    RANK_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    count: int
    def __init__(self, rank: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...
