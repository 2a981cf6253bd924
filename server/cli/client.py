"""What the commands that talk to a running server share."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import click
import grpc
from google.rpc import error_details_pb2 as details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from weft.server.api.access.keys import can_be_sent

DEFAULT_ADDRESS = "127.0.0.1:50051"

_ADDRESS = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?\]):(\d{1,5})")
_FILE = click.Path(path_type=Path, dir_okay=False)

Options = Sequence[tuple[str, Any]]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Who signs the server's certificate, and the client's own and its key; None: the system's, and none."""

    ca: Path | None
    cert: Path | None
    key: Path | None

    def read(self) -> Tls:
        """What they hold now. Raises UsageError."""
        for option, path, other, other_path in (
            ("--tls-cert", self.cert, "--tls-key", self.key),
            ("--tls-key", self.key, "--tls-cert", self.cert),
        ):
            if path is not None and other_path is None:
                raise click.UsageError(f"{option} is given without {other}: a client shows a certificate with both")
        ca, key = _pem("--tls-ca", self.ca), _pem("--tls-key", self.key, "PRIVATE KEY")
        return Tls(self, ca, key, _pem("--tls-cert", self.cert))


@dataclass(frozen=True, slots=True)
class Tls:
    """What files hold, in PEM."""

    files: TlsFiles
    ca: bytes | None
    key: bytes | None
    cert: bytes | None

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.cert)

    def by_now(self) -> Tls:
        """The same unless the files have changed, and can be used."""
        with suppress(click.UsageError):  # they are being replaced
            return self.files.read()
        return self


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, and how to talk to it.

    api_key: or a token; empty for none. api_key_file: that it came from, and comes from again for each call of
    `channel`: a command that goes on must outlast its key. tls: None without TLS.
    """

    address: str
    api_key: str = field(default="", repr=False)
    api_key_file: Path | None = None
    tls: Tls | None = field(default=None, repr=False)

    @property
    def credentials(self) -> grpc.ChannelCredentials | None:
        """None without TLS."""
        return None if self.tls is None else self.tls.credentials

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with each call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def channel(self, options: Options) -> grpc.Channel:
        """Its calls bring the metadata with them."""
        if (credentials := self.credentials) is not None:
            channel = grpc.secure_channel(self.address, credentials, options)
        else:
            channel = grpc.insecure_channel(self.address, options)
        return grpc.intercept_channel(channel, _WithMetadata(self._metadata_by_now)) if self.api_key else channel

    def aio_channel(self, options: Options) -> grpc.aio.Channel:
        """Its calls have to be given the metadata."""
        if (credentials := self.credentials) is not None:
            return grpc.aio.secure_channel(self.address, credentials, options)
        return grpc.aio.insecure_channel(self.address, options)

    def _metadata_by_now(self) -> tuple[tuple[str, str], ...]:
        if self.api_key_file is None:
            return self.metadata
        with suppress(click.UsageError):  # it is being replaced
            return replace(self, api_key=_api_key(None, self.api_key_file)).metadata
        return self.metadata


class _CallDetails(NamedTuple):
    """As grpc's own, which can't be made."""

    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]]
    credentials: Any
    wait_for_ready: bool | None
    compression: Any


class _WithMetadata(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds metadata to every call. Unlike call credentials, also where there is no TLS."""

    def __init__(self, metadata: Callable[[], Sequence[tuple[str, str]]]) -> None:
        """metadata: is asked at each call."""
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._added(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._added(client_call_details), request)

    def _added(self, call: Any) -> _CallDetails:
        metadata = (*(call.metadata or ()), *self._metadata())
        return _CallDetails(
            call.method, call.timeout, metadata, call.credentials, call.wait_for_ready, call.compression
        )


_ADDRESS_OPTION = click.option(
    *("--address",),
    default=DEFAULT_ADDRESS,
    show_default=True,
    envvar="WEFT_ADDRESS",
    metavar="HOST:PORT",
    help="Of the server.",
)

_PUSH_OPTION = click.option(
    *("--push", "address"), metavar="HOST:PORT", help="Load it on the server there, or update it where it is loaded."
)

_OPTIONS: Sequence[Callable[[Any], Any]] = (
    click.option(
        *("--api-key",),
        envvar="WEFT_API_KEY",
        metavar="KEY",
        help="An API key or a token, better given as WEFT_API_KEY: others see a command line.",
    ),
    click.option("--api-key-file", type=_FILE, envvar="WEFT_API_KEY_FILE", help="A file that holds it."),
    click.option("--tls", is_flag=True, envvar="WEFT_TLS", help="Talk TLS; also by the options that follow."),
    click.option("--tls-ca", type=_FILE, envvar="WEFT_TLS_CA", help="Who signs the server's certificate, in PEM."),
    # WEFT_TLS_CERT and WEFT_TLS_KEY are the server's, and in its container's environment.
    click.option("--tls-cert", type=_FILE, envvar="WEFT_CLIENT_CERT", help="The client's own certificate, in PEM."),
    click.option("--tls-key", type=_FILE, envvar="WEFT_CLIENT_KEY", help="Its private key, in PEM."),
)


def server_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that say which server; the command gets them as `server`, an Endpoint."""
    return _with_server(command, _ADDRESS_OPTION)


def push_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with --push in the place of --address; without it `server` is None."""
    return _with_server(command, _PUSH_OPTION)


def _with_server(command: Callable[..., Any], address_option: Callable[[Any], Any]) -> Callable[..., Any]:
    @wraps(command)
    def with_server(
        address: str | None,
        api_key: str | None,
        api_key_file: Path | None,
        tls: bool,
        tls_ca: Path | None,
        tls_cert: Path | None,
        tls_key: Path | None,
        **rest: Any,
    ) -> Any:
        if address is None:
            return command(server=None, **rest)
        host = _host_of(address)
        files = TlsFiles(tls_ca, tls_cert, tls_key)
        with_tls = files.read() if tls or any((tls_ca, tls_cert, tls_key)) else None
        key = _api_key(api_key, api_key_file)
        if key and with_tls is None and not _is_loopback(host):
            click.echo(f"weft: the API key goes to {address} unencrypted: add --tls", err=True)
        return command(server=Endpoint(address, key, api_key_file, with_tls), **rest)

    decorated: Callable[..., Any] = with_server
    for option in reversed((address_option, *_OPTIONS)):
        decorated = option(decorated)
    return decorated


_ANY_SIZE: Options = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@contextmanager
def connected(server: Endpoint) -> Iterator[grpc.Channel]:
    """A channel; an RPC that fails inside the block ends the command with one line."""
    with server.channel(_ANY_SIZE) as channel, failures_in_words(server):
        yield channel


class Line:
    """A channel for a command that goes on, made anew by `renew` where the files of TLS have changed."""

    def __init__(self, server: Endpoint) -> None:
        self.server = server
        self.channel = server.channel(_ANY_SIZE)
        self.is_closed = False

    @property
    def is_stale(self) -> bool:
        return self.server.tls is not None and self.server.tls.by_now() != self.server.tls

    def renew(self) -> None:
        """Calls on the channel of before are cancelled."""
        if self.is_stale and self.server.tls is not None:
            before = self.channel
            self.server = replace(self.server, tls=self.server.tls.by_now())
            self.channel = self.server.channel(_ANY_SIZE)
            before.close()

    def close(self) -> None:
        self.is_closed = True
        self.channel.close()


@contextmanager
def failures_in_words(server: Endpoint | None = None) -> Iterator[None]:
    """An RPC that fails inside the block ends the command with one line."""
    try:
        yield
    except grpc.RpcError as error:
        raise click.ClickException(describe(error, server or Endpoint("its address"))) from None


def describe(error: grpc.RpcError, server: Endpoint) -> str:
    """An RPC's failure in words: the server's own, or why there is none."""
    call: Any = error  # the errors that stubs raise are calls too
    status: Status | None = rpc_status.from_call(call)
    if status is None:
        code = error.code()
        if code is grpc.StatusCode.UNAVAILABLE:
            return _no_server(server, error.details() or "")
        return f"{code.name}: {error.details()}"
    return ": ".join([*_code_name(status), _violations(status) or status.message])


def _no_server(server: Endpoint, details: str) -> str:
    where, is_closed = server.address, "Socket closed" in details or "Connection reset" in details
    if server.tls is None:
        hint = ", or, if it takes TLS alone, add --tls" if is_closed else ""
        return f"no server answers at {where}: start one with `weft serve`{hint}"
    if "WRONG_VERSION_NUMBER" in details:
        return f"the server at {where} does not talk TLS: leave --tls and its files out"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return f"the certificate of {where} is not trusted: give who signed it with --tls-ca, and look when it expires"
    if "ostname" in details or "eer name" in details:
        return f"the certificate of {where} is for another name: use one that it names in --address"
    if is_closed or "handshake" in details:
        return f"{where} ends the TLS handshake: if it asks for certificates, give one that it trusts with --tls-cert"
    return f"no server answers at {where}: start one with `weft serve`"


def _host_of(address: str) -> str:
    match = _ADDRESS.fullmatch(address)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise click.UsageError(f"--address is {address!r}; must be HOST:PORT, such as {DEFAULT_ADDRESS} or [::1]:50051")
    return match[1].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _api_key(given: str | None, file: Path | None) -> str:
    """The key, which no message repeats."""
    key, where = (given or "").strip(), "--api-key (WEFT_API_KEY)"
    if file is not None:
        if key:
            raise click.UsageError("--api-key (WEFT_API_KEY) and --api-key-file are both given: choose one")
        key, where = _read("--api-key-file", file).decode(errors="replace").strip(), f"--api-key-file {file}"
        if not key:
            raise click.UsageError(f"{where} is empty")
    if key and not can_be_sent(key):
        raise click.UsageError(f"{where} holds no key: one is a single word of letters, digits and signs")
    return key


def _pem(option: str, path: Path | None, kind: str = "CERTIFICATE") -> bytes | None:
    if path is None:
        return None
    pem = _read(option, path)
    if not re.search(rb"-----BEGIN [A-Z ]*" + kind.encode(), pem):
        raise click.UsageError(f"{option} {path} holds no {kind.lower()} in PEM (-----BEGIN {kind}-----)")
    return pem


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise click.UsageError(f"{option} {path} can't be read: {error.strerror}") from None


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
