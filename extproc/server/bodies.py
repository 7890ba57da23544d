"""Collects request bodies in every mode in which Envoy can send them.

The modes differ in when a body is complete and in which reply carries the decision:

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

from functools import lru_cache

from msgspec import Struct

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import ServiceError

__all__ = ["BodyMode", "BodyTooLargeError", "RequestBody", "body_mode"]

_Mode = pb.ProcessingMode


class BodyTooLargeError(ServiceError):
    """More bytes than the configured limit."""


class BodyMode(Struct, frozen=True):
    """The consequences of the mode in which a gateway sends request bodies."""

    full_duplex: bool
    whole_in_one_message: bool
    # True if the body is there before the decision.
    visible_before_decision: bool
    headers_carry_decision: bool
    may_be_cut: bool
    # True if the body is there, but only after the decision.
    visible_after_decision: bool


def body_mode(config: pb.ProtocolConfiguration | None) -> BodyMode:
    """The mode that the first message of a stream announces.

    Envoy before 1.34 announces nothing; BUFFERED is what this service asks for.
    """
    if config is None:
        return _mode(_Mode.BUFFERED, False)
    return _mode(config.request_body_mode, config.send_body_without_waiting_for_header_response)


@lru_cache(maxsize=64)
def _mode(mode: int, not_waiting: bool) -> BodyMode:
    full_duplex = mode == _Mode.FULL_DUPLEX_STREAMED
    whole = mode in (_Mode.BUFFERED, _Mode.BUFFERED_PARTIAL)
    return BodyMode(
        full_duplex=full_duplex,
        whole_in_one_message=whole,
        visible_before_decision=whole or full_duplex or (mode == _Mode.STREAMED and not_waiting),
        headers_carry_decision=not whole,
        may_be_cut=mode == _Mode.BUFFERED_PARTIAL,
        visible_after_decision=mode == _Mode.STREAMED and not not_waiting,
    )


class RequestBody:
    """Collects one request body."""

    __slots__ = ("_data", "changed", "chunks", "complete", "mode")

    def __init__(self, mode: BodyMode) -> None:
        self.mode = mode
        # Messages received so far. Outside full duplex each needs a reply of its own.
        self.chunks = 0
        self.complete = False
        # True if the engine must not get the bytes that the client has sent.
        self.changed = False
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
        if chunk.end_of_stream or self.mode.whole_in_one_message:
            self.complete = True

    def take(self) -> bytes | bytearray:
        """Return the collected bytes and drop them: a stream may stay open for minutes."""
        data, self._data = self._data, b""
        return data

    def replace(self, data: bytes | bytearray) -> None:
        """Set the bytes that the engine gets in place of the collected ones."""
        self._data = data
        self.changed = True

    def peek(self) -> bytes | bytearray:
        """Return the collected bytes and keep them for the echo."""
        return self._data
