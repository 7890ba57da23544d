"""Reads the headers messages of Envoy, once for each different message.

The filter forwards only the headers that are read here, so these messages repeat. Of a request
only two values differ: the request id, which never repeats, and the length of the body. Both are
cut out of the bytes, and the rest is looked up in a table. Of a response little but the status
and the worker differs, so the whole message is looked up. A look-up costs about a tenth of
parsing.
"""

import secrets
from typing import Final, NamedTuple

from msgspec import Struct

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import retry_after_seconds
from extproc.headers import (
    ATTEMPTS_NAMESPACE,
    CONTENT_ENCODING_HEADER,
    CONTENT_LENGTH_HEADER,
    CONTENT_TYPE_HEADER,
    DEBUG_HEADER,
    DESTINATION_NAMESPACE,
    DESTINATION_SERVED_HEADER,
    DESTINATION_SUBSET_HEADER,
    DESTINATION_SUBSET_NAMESPACE,
    EXTPROC_FILTER,
    METHOD_HEADER,
    PATH_HEADER,
    PREFILL_HEADER_PREFIXES,
    PREFILL_HEADERS,
    REQUEST_ID_HEADER,
    RETRY_AFTER_HEADER,
    ROUTE_PASS_HEADERS,
    STATUS_HEADER,
)
from extproc.routing.request import ClientHeaders
from extproc.routing.subset import Subset
from extproc.server.bodies import BodyMode, body_mode
from extproc.steering import is_steering_header

__all__ = [
    "KNOWN_MAX_BYTES",
    "AttemptReport",
    "RequestHead",
    "RequestHeadTable",
    "Response",
    "ResponseTable",
    "client_headers_of",
    "read_attempt",
    "wanted_headers",
]

_WANTED: Final = frozenset((*ROUTE_PASS_HEADERS, CONTENT_LENGTH_HEADER))
_PREFILL_HEADERS: Final = frozenset(PREFILL_HEADERS)

_TABLE_MAX_ENTRIES: Final = 1024
# Longer messages are not looked up: gateways that forward all headers never repeat one.
_REQUEST_MAX_BYTES: Final = 1024
# The same for responses; their messages are short.
KNOWN_MAX_BYTES: Final = 512
# The bytes of the two headers in a message: key and raw_value with tags and lengths. No value of
# another header contains them, since data planes refuse control characters.
_ID_CHARS: Final = 36
_ID_MARK: Final = b"\x0a\x0cx-request-id\x1a" + bytes((_ID_CHARS,))
_LENGTH_MARK: Final = b"\x0a\x0econtent-length\x1a"
_LENGTH_MAX_DIGITS: Final = 20
_ATTEMPTS_MAX: Final = 100

_FULL_DUPLEX: Final = pb.ProcessingMode.FULL_DUPLEX_STREAMED


class RequestHead(Struct, frozen=True, kw_only=True):
    """A request headers message without the values that belong to one request alone.

    `encoding` is the content coding in which the body comes, "" if there is no coding.
    `subset` are the endpoints to which the gateway can send, None where it names no subset.
    `steering` are the names, as the client has spelled them, of headers that would steer an engine.
    Our own Envoy removes them before its filter asks.
    """

    method: str
    path: str
    debug: bool
    end_of_stream: bool
    body_mode: BodyMode
    response_full_duplex: bool
    steering: tuple[str, ...] = ()
    encoding: str = ""
    subset: Subset | None = None


class RequestHeadTable:
    """Request heads by the bytes of their message; bounded.

    Both ways to read return the head, the request id ("" without one) and the announced length of
    the body in bytes (-1 without one).
    """

    def __init__(self) -> None:
        self._table: dict[bytes, RequestHead] = {}

    def find(self, raw: bytes) -> tuple[RequestHead, str, int] | None:
        """Look a message up; None if no similar message was read before."""
        parts = _cut(raw)
        if parts is None:
            return None
        rest, request_id, length = parts
        head = self._table.get(rest)
        return (head, request_id, length) if head is not None else None

    def read(self, raw: bytes, message: pb.ProcessingRequest) -> tuple[RequestHead, str, int]:
        """Read a parsed message, and keep it if similar ones may come."""
        config = message.protocol_config if message.HasField("protocol_config") else None
        seen = wanted_headers(message)
        request_id = seen.get(REQUEST_ID_HEADER, "")
        digits = seen.get(CONTENT_LENGTH_HEADER, "")
        length = int(digits[:_LENGTH_MAX_DIGITS]) if digits.isdecimal() else -1
        head = RequestHead(
            method=seen.get(METHOD_HEADER, ""),
            path=seen.get(PATH_HEADER, ""),
            debug=seen.get(DEBUG_HEADER) == "true",
            end_of_stream=message.request_headers.end_of_stream,
            body_mode=body_mode(config),
            response_full_duplex=config is not None and config.response_body_mode == _FULL_DUPLEX,
            steering=_steering_headers(message),
            encoding=_encoding(seen.get(CONTENT_ENCODING_HEADER, "")),
            subset=_subset(message),
        )
        parts = _cut(raw)
        if (
            parts is not None
            and parts[1:] == (request_id, length)
            and not message.observability_mode
        ):
            if len(self._table) >= _TABLE_MAX_ENTRIES:
                self._table.clear()
            self._table[parts[0]] = head
        return head, request_id, length


def _cut(raw: bytes) -> tuple[bytes, str, int] | None:
    """Return the message without the values of request id and length, and these two values."""
    if len(raw) > _REQUEST_MAX_BYTES:
        return None
    at = raw.find(_ID_MARK)
    if at < 0:
        return None
    start = at + len(_ID_MARK)
    end = start + _ID_CHARS
    request_id = raw[start:end].decode("latin-1")
    at = raw.find(_LENGTH_MARK)
    if at < 0:
        return raw[:start] + raw[end:], request_id, -1
    first = at + len(_LENGTH_MARK) + 1
    if first > len(raw):
        return None
    last = first + raw[first - 1]
    digits = raw[first:last]
    if not digits.isdigit() or len(digits) > _LENGTH_MAX_DIGITS:
        return None
    if start < first:
        rest = raw[:start] + raw[end:first] + raw[last:]
    else:
        rest = raw[:first] + raw[last:start] + raw[end:]
    return rest, request_id, int(digits)


def client_headers_of(raw: bytes, request_id: str) -> ClientHeaders:
    """Return the headers of the client that a request to a prefill worker takes over."""
    path = ""
    taken = [(REQUEST_ID_HEADER, request_id)]
    for header in pb.ProcessingRequest.FromString(raw).request_headers.headers.headers:
        name = header.key.lower()
        wanted = name in _PREFILL_HEADERS or name.startswith(PREFILL_HEADER_PREFIXES)
        if not wanted and name != PATH_HEADER:
            continue
        try:
            value = header.raw_value.decode() if header.raw_value else header.value
        except UnicodeDecodeError:
            continue  # aiohttp could not send it unchanged
        if name == PATH_HEADER:
            path = value
        else:
            taken.append((name, value))
    return ClientHeaders(path, tuple(taken), request_id)


def wanted_headers(
    message: pb.ProcessingRequest, wanted: frozenset[str] = _WANTED
) -> dict[str, str]:
    """Return the wanted headers of a request headers message; the first of repeated ones.

    Envoy fills `raw_value`, other data planes may fill `value`.
    """
    found: dict[str, str] = {}
    for header in message.request_headers.headers.headers:
        name = header.key
        if name not in wanted:
            name = name.lower()
            if name not in wanted:
                continue
        if name not in found:
            raw = header.raw_value
            found[name] = raw.decode("latin-1") if raw else header.value
    return found


def _encoding(value: str) -> str:
    encoding = value.strip().lower()
    return "" if encoding == "identity" else encoding


def _subset(message: pb.ProcessingRequest) -> Subset | None:
    """The endpoints that the gateway names in metadata: a list, or a text with commas.

    Something else, or nothing in it, allows no endpoint.
    """
    metadata = message.metadata_context.filter_metadata
    if DESTINATION_SUBSET_NAMESPACE not in metadata:
        return None
    fields = metadata[DESTINATION_SUBSET_NAMESPACE].fields
    if DESTINATION_SUBSET_HEADER not in fields:
        return None
    value = fields[DESTINATION_SUBSET_HEADER]
    if value.WhichOneof("kind") == "list_value":
        return Subset.of(one.string_value for one in value.list_value.values)
    return Subset.of(value.string_value.split(","))


def _steering_headers(message: pb.ProcessingRequest) -> tuple[str, ...]:
    headers = message.request_headers.headers.headers
    return tuple([header.key for header in headers if is_steering_header(header.key)])


class Response(Struct, frozen=True):
    """A response headers message.

    `status` is 0 when it is missing. `address` is the `ip:port` that was tried last, and
    `code_details` Envoy's `response.code_details`; each is "" where the gateway does not send it.
    `attempts` is the number of attempts, 0 where the gateway does not send it. `busy` are the
    addresses that answered 503 or 429 in one of them; True if this replica has recorded it.
    `retry_after` is the header's value, "" without it.
    """

    status: int
    streamed: bool
    address: str
    code_details: str
    attempts: int
    busy: tuple[tuple[str, bool], ...]
    end_of_stream: bool
    retry_after: str = ""


class ResponseTable:
    """Responses by the bytes of their message; bounded.

    `replica` is the name of this process in reports of attempts, which another one may take.
    """

    def __init__(self) -> None:
        self.replica = secrets.token_hex(4)
        self._table: dict[bytes, Response] = {}
        self.get = self._table.get

    def learn(self, raw: bytes, message: pb.ProcessingRequest) -> Response:
        """Read a message that is not in the table, and keep it if it may come again."""
        status, streamed, retry_after = _read_response(message.response_headers.headers)
        address, code_details, attempts = _served_by(message)
        end_of_stream = message.response_headers.end_of_stream
        busy = self._busy(message)
        response = Response(
            status, streamed, address, code_details, attempts, busy, end_of_stream, retry_after
        )
        if len(raw) <= KNOWN_MAX_BYTES:
            if len(self._table) >= _TABLE_MAX_ENTRIES:
                self._table.clear()
            self._table[raw] = response
        return response

    def _busy(self, message: pb.ProcessingRequest) -> tuple[tuple[str, bool], ...]:
        """The reports of attempts, which Envoy has kept in the request's metadata."""
        metadata = message.metadata_context.filter_metadata
        if ATTEMPTS_NAMESPACE not in metadata:
            return ()
        found = []
        for value in metadata[ATTEMPTS_NAMESPACE].fields.values():
            address, _, replica = value.string_value.partition(" ")
            found.append((address, replica == self.replica))
        return tuple(found)


class AttemptReport(NamedTuple):
    """A worker's 503 or 429 in attempt `number` of a request, reported before the next attempt.

    `retry_after_seconds` is None where the worker names no time.
    """

    number: int
    address: str
    status: int
    retry_after_seconds: float | None


def read_attempt(message: pb.ProcessingRequest) -> AttemptReport:
    """Read the response headers message of one attempt."""
    status, _, digits = _read_response(message.response_headers.headers)
    address, _, number = _served_by(message)
    return AttemptReport(number, address, status, retry_after_seconds(digits))


def _read_response(headers: pb.HeaderMap) -> tuple[int, bool, str]:
    """Return the status, whether the response is streamed, and the value of retry-after."""
    status, streamed, retry_after = 0, False, ""
    for header in headers.headers:
        raw = header.raw_value or header.value.encode()
        if header.key == STATUS_HEADER:
            status = int(raw) if len(raw) == 3 and raw.isdigit() else 0
        elif header.key == CONTENT_TYPE_HEADER:
            streamed = raw.startswith(b"text/event-stream")
        elif header.key == RETRY_AFTER_HEADER:
            retry_after = raw.decode("latin-1")
    return status, streamed, retry_after


def _served_by(message: pb.ProcessingRequest) -> tuple[str, str, int]:
    """Return the address that was tried last, the code details and the number of attempts.

    Gateways of the endpoint picker protocol name the endpoint in metadata instead.
    """
    address = details = ""
    attempts = 0
    if EXTPROC_FILTER in message.attributes:
        fields = message.attributes[EXTPROC_FILTER].fields
        if "upstream.address" in fields:
            address = fields["upstream.address"].string_value
        if "response.code_details" in fields:
            details = fields["response.code_details"].string_value
        if "upstream.request_attempt_count" in fields:
            count = fields["upstream.request_attempt_count"].number_value
            attempts = int(count) if 0 < count < _ATTEMPTS_MAX else 0
    if not address and DESTINATION_NAMESPACE in message.metadata_context.filter_metadata:
        fields = message.metadata_context.filter_metadata[DESTINATION_NAMESPACE].fields
        if DESTINATION_SERVED_HEADER in fields:
            address = fields[DESTINATION_SERVED_HEADER].string_value
    return address, details, attempts
