"""What the commands that talk to a running server share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import grpc
from google.rpc import error_details_pb2 as details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

DEFAULT_ADDRESS = "127.0.0.1:50051"

_ADDRESS = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]):(\d{1,5})")


def _check_address(_context: click.Context, _option: click.Parameter, address: str) -> str:
    match = _ADDRESS.fullmatch(address)
    if match is None or not 1 <= int(match[1]) <= 65535:
        raise click.UsageError(f"--address is {address!r}; must be HOST:PORT, such as {DEFAULT_ADDRESS} or [::1]:50051")
    return address


address_option: Callable[[Any], Callable[..., Any]] = click.option(
    "--address",
    default=DEFAULT_ADDRESS,
    show_default=True,
    envvar="WEFT_ADDRESS",
    metavar="HOST:PORT",
    callback=_check_address,
    help="Of the server.",
)


@contextmanager
def connected(address: str) -> Iterator[grpc.Channel]:
    """A channel; an RPC that fails inside the block ends the command with one line."""
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options) as channel, failures_in_words(address):
        yield channel


@contextmanager
def failures_in_words(address: str = "its address") -> Iterator[None]:
    """An RPC that fails inside the block ends the command with one line."""
    try:
        yield
    except grpc.RpcError as error:
        raise click.ClickException(describe(error, address)) from None


def describe(error: grpc.RpcError, address: str) -> str:
    """An RPC's failure in words: the server's own, or that there is no server."""
    call: Any = error  # the errors that stubs raise are calls too
    status: Status | None = rpc_status.from_call(call)
    if status is None:
        code = error.code()
        if code is grpc.StatusCode.UNAVAILABLE:
            return f"no server answers at {address}: start one with `weft serve`"
        return f"{code.name}: {error.details()}"
    return ": ".join([*_code_name(status), _violations(status) or status.message])


def _code_name(status: Status) -> list[str]:
    return [code.name for code in grpc.StatusCode if code.value[0] == status.code]


def _violations(status: Status) -> str:
    """Every violation that the details list; the message may have been cut before its end."""
    bad_request, precondition = details_pb2.BadRequest(), details_pb2.PreconditionFailure()
    found: list[str] = []
    for detail in status.details:
        if detail.Unpack(bad_request):
            found += [f"{item.field} {item.description}".strip() for item in bad_request.field_violations]
        elif detail.Unpack(precondition):
            found += [f"{item.subject}: {item.description}" for item in precondition.violations]
    return "; ".join(found)
