"""Request bodies in every mode Envoy can send them, behind one face.

What differs is when a body is complete and which reply carries the decision:

======================  ==============================  ====================================
mode                    complete                        the decision travels in
======================  ==============================  ====================================
BUFFERED                with its only message           the reply to the body
BUFFERED_PARTIAL        with its only message           the reply to the body
STREAMED, not waiting   at the end of the stream        the reply to the headers, held back
FULL_DUPLEX_STREAMED    at the end of the stream        the reply to the headers, held back
STREAMED, NONE          never seen before the decision  the reply to the headers, at once
======================  ==============================  ====================================

"Not waiting" is `send_body_without_waiting_for_header_response`: without it Envoy sends the
headers on to a worker before it shows the first piece of a streamed body.
"""

from extproc._protos import llm_extproc_pb2 as pb

__all__ = ["BodyTooLargeError", "RequestBody", "request_body_mode"]

_Mode = pb.ProcessingMode


class BodyTooLargeError(Exception):
    """More bytes than the configured limit."""


def request_body_mode(config: pb.ProtocolConfiguration | None) -> "RequestBody":
    """The body as the first message of a stream announces it.

    Envoy before 1.34 announces nothing; BUFFERED is what this service asks for.
    """
    if config is None:
        return RequestBody(_Mode.BUFFERED, not_waiting=False)
    return RequestBody(
        config.request_body_mode,
        not_waiting=config.send_body_without_waiting_for_header_response,
    )


class RequestBody:
    """Collects one request body."""

    __slots__ = (
        "_data",
        "chunks",
        "complete",
        "full_duplex",
        "headers_carry_decision",
        "may_be_cut",
        "visible_before_decision",
        "whole_in_one_message",
    )

    def __init__(self, mode: int, *, not_waiting: bool) -> None:
        self.full_duplex = mode == _Mode.FULL_DUPLEX_STREAMED
        self.whole_in_one_message = mode in (_Mode.BUFFERED, _Mode.BUFFERED_PARTIAL)
        # Whether a decision can look at the body at all.
        self.visible_before_decision = (
            self.whole_in_one_message
            or self.full_duplex
            or (mode == _Mode.STREAMED and not_waiting)
        )
        self.headers_carry_decision = not self.whole_in_one_message
        self.may_be_cut = mode == _Mode.BUFFERED_PARTIAL
        # Messages received so far: outside full duplex each needs a reply of its own.
        self.chunks = 0
        self.complete = False
        self._data: bytes | bytearray = b""

    def append(self, chunk: pb.HttpBody, limit_bytes: int) -> None:
        """Take one message; raises BodyTooLargeError. Sets `complete` at the end."""
        data = chunk.body
        if len(self._data) + len(data) > limit_bytes:
            self._data = b""
            raise BodyTooLargeError
        self.chunks += 1
        if not self._data:
            self._data = data
        else:
            if isinstance(self._data, bytes):
                self._data = bytearray(self._data)
            self._data += data
        if chunk.end_of_stream or self.whole_in_one_message:
            self.complete = True

    def take(self) -> bytes | bytearray:
        """The collected bytes; they are not kept, a stream may stay open for minutes."""
        data, self._data = self._data, b""
        return data

    def peek(self) -> bytes | bytearray:
        """The collected bytes, kept for the echo."""
        return self._data
