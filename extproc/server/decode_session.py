"""The session of the second pass: request headers in, the decode worker out.

This pass sees no body. The first pass has put the decode order into the headers, and Envoy the
number of the attempt.
"""

from collections.abc import Sequence
from typing import Final

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import RouterError, internal_error
from extproc.headers import (
    ATTEMPT_COUNT_HEADER,
    DEBUG_HEADER,
    DECODE_ORDER_HEADER,
    DECODE_PASS_HEADERS,
    REQUEST_ID_HEADER,
    RETRY_HEADER,
)
from extproc.routing.decision import Decision
from extproc.routing.pd.decode_order import DecodeOrder, DecodeQuery
from extproc.server import replies
from extproc.server.messages import wanted_headers
from extproc.server.session import Session, SessionState
from extproc.server.steps import NOTHING, Step, log_event

__all__ = ["DecodeSession"]

_RETRY: Final = ((RETRY_HEADER, "1"),)


class DecodeSession(Session):
    """One attempt to find a decode worker. The request is counted in the first pass."""

    __slots__ = ()

    def _receive_first(self, raw: bytes) -> Step:
        message = pb.ProcessingRequest.FromString(raw)
        if message.WhichOneof("request") != "request_headers" or message.observability_mode:
            return NOTHING
        context = self._context
        wanted = frozenset((*DECODE_PASS_HEADERS, context.model_header))
        seen = wanted_headers(message, wanted)
        self._take_request_id(seen.get(REQUEST_ID_HEADER, ""))
        self.debug = context.debug_headers and seen.get(DEBUG_HEADER) == "true"
        digits = seen.get(ATTEMPT_COUNT_HEADER, "1")
        attempt = int(digits[:3]) if digits.isdecimal() else 1
        try:
            order = DecodeOrder.from_header(seen.get(DECODE_ORDER_HEADER, ""))
        except ValueError:
            # Only the first pass sends requests here.
            step = self.failed(internal_error())
            event = log_event("error", "decode_order_missing", request_id=self.request_id)
            return Step(replies=step.replies, events=(event, *step.events))
        self._state = SessionState.ROUTING
        self.question = DecodeQuery(seen.get(context.model_header, ""), order, attempt)
        return NOTHING

    def _decision_replies(self, decision: Decision) -> Sequence[bytes]:
        return (self._context.builder.routed(decision, in_body=False, request_id=None),)

    def failed(self, error: RouterError) -> Step:
        """As in Session; Envoy may make the next attempt, if there is one."""
        query = self.question
        may_retry = isinstance(query, DecodeQuery) and query.attempt < query.order.attempts
        return self._refuse(error, "request_refused", _RETRY if may_retry else ())

    def served_by(self, worker: str, decode_worker: str | None, overlap: tuple[int, int]) -> Step:
        return self._with_debug_headers(replies.debug_decode_worker(worker))
