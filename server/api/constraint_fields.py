"""What an answer must match, on the wire -> what the compiler takes."""

from __future__ import annotations

from collections.abc import Callable

from weft.server.engine.constraints import Kind, Spec
from weft.v1 import inference_pb2 as pb2

MAX_CHOICES = 1024
MAX_CONSTRAINT_BYTES = 1 << 16

Note = Callable[[str, str], None]
"""Takes the path of a field and what is wrong with it."""


def to_spec(request: pb2.GenerateRequest | pb2.StreamGenerateRequest) -> Spec | None:
    """The constraint of a request, if it has one."""
    match request.WhichOneof("constraint"):
        case None:
            return None
        case "choice":
            return Spec(Kind.CHOICE, tuple(request.choice.options))
        case field:
            return Spec(Kind(field), (getattr(request, field),))


def check_constraint(request: pb2.GenerateRequest | pb2.StreamGenerateRequest, note: Note) -> None:
    """Note what is wrong with a constraint, before it is compiled."""
    field = request.WhichOneof("constraint")
    if field is None:
        return
    if request.stopping.ignore_eos:
        note("stopping.ignore_eos", f"is true, but {field} says where the answer ends; choose one")
    if request.stopping.stop_token_ids:
        note(
            "stopping.stop_token_ids",
            f"is set, but {field} says where the answer ends: leave it out, or use stop_sequences",
        )
    if field == "choice":
        _check_choice(request.choice, note)
    elif not getattr(request, field):
        note(field, "is empty; leave it out for an answer of any kind")
    else:
        _check_size(len(getattr(request, field).encode()), field, note)


def _check_choice(choice: pb2.Choice, note: Note) -> None:
    path, count = "choice.options", len(choice.options)
    if not 1 <= count <= MAX_CHOICES:
        note(path, f"has {count} entries; must have from 1 to {MAX_CHOICES}")
    else:
        _check_size(sum(len(option.encode()) for option in choice.options), path, note)


def _check_size(num_bytes: int, path: str, note: Note) -> None:
    if num_bytes > MAX_CONSTRAINT_BYTES:
        note(path, f"has {num_bytes} bytes; at most {MAX_CONSTRAINT_BYTES} are taken")
