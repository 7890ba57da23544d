"""What Envoy says of a response, read once for each different message.

With only the headers forwarded that are read here, the messages about responses differ in
little but status and worker: a handful of byte strings that come again and again. Looking one
up costs a tenth of parsing it.
"""

from typing import Final

from msgspec import Struct

from extproc._protos import llm_extproc_pb2 as pb
from extproc.headers import (
    CONTENT_TYPE_HEADER,
    DESTINATION_NAMESPACE,
    DESTINATION_SERVED_HEADER,
    EXTPROC_FILTER,
    STATUS_HEADER,
)

__all__ = ["KNOWN_MAX_BYTES", "Response", "ResponseTable"]

# Longer messages are not looked up: bodies, or gateways that forward all headers, which never
# repeat.
KNOWN_MAX_BYTES: Final = 512
_TABLE_MAX_ENTRIES: Final = 1024


class Response(Struct, frozen=True):
    """The response headers message.

    `status` is 0 when missing; `address` is the `ip:port` that was tried last and
    `code_details` Envoy's `response.code_details`, each "" where the gateway does not send it.
    """

    status: int
    streamed: bool
    address: str
    code_details: str
    end_of_stream: bool


class ResponseTable:
    """Responses by the bytes of their message; bounded."""

    def __init__(self) -> None:
        self._table: dict[bytes, Response] = {}
        self.get = self._table.get

    def learn(self, raw: bytes, message: pb.ProcessingRequest) -> Response:
        """Read a message that is not in the table, and keep it if it may come again."""
        status, streamed = _status_and_kind(message.response_headers.headers)
        address, code_details = _served_by(message)
        response = Response(
            status, streamed, address, code_details, message.response_headers.end_of_stream
        )
        if len(raw) <= KNOWN_MAX_BYTES:
            if len(self._table) >= _TABLE_MAX_ENTRIES:
                self._table.clear()
            self._table[raw] = response
        return response


def _status_and_kind(headers: pb.HeaderMap) -> tuple[int, bool]:
    status, streamed = 0, False
    for header in headers.headers:
        if header.key == STATUS_HEADER:
            raw = header.raw_value or header.value.encode()
            status = int(raw) if len(raw) == 3 and raw.isdigit() else 0
        elif header.key == CONTENT_TYPE_HEADER:
            streamed = (header.raw_value or header.value.encode()).startswith(b"text/event-stream")
    return status, streamed


def _served_by(message: pb.ProcessingRequest) -> tuple[str, str]:
    """The tried address and the code details.

    Gateways of the endpoint picker protocol name the endpoint in metadata instead.
    """
    address = details = ""
    if EXTPROC_FILTER in message.attributes:
        fields = message.attributes[EXTPROC_FILTER].fields
        if "upstream.address" in fields:
            address = fields["upstream.address"].string_value
        if "response.code_details" in fields:
            details = fields["response.code_details"].string_value
    if not address and DESTINATION_NAMESPACE in message.metadata_context.filter_metadata:
        fields = message.metadata_context.filter_metadata[DESTINATION_NAMESPACE].fields
        if DESTINATION_SERVED_HEADER in fields:
            address = fields[DESTINATION_SERVED_HEADER].string_value
    return address, details
