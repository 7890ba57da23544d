"""The stream of the second pass: request headers in, the decode worker out.

The pass sees no body; what it has to know was put into the headers by the first one, and the
number of the attempt by Envoy. From the decision on it is a stream like any other.
"""

from collections.abc import Sequence
from typing import Final

import structlog

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
from extproc.routing.lease import Lease
from extproc.routing.pd.decode_order import DecodeOrder
from extproc.routing.pd.pair import Pair
from extproc.routing.pd.passes import DecodeQuery
from extproc.server import replies
from extproc.server.messages import wanted_headers
from extproc.server.session import Session, SessionState

__all__ = ["DecodeSession"]

_log = structlog.get_logger()

_NO_REPLIES: Final[Sequence[bytes]] = ()


class DecodeSession(Session):
    """One attempt at a decode worker."""

    __slots__ = ()

    def receive(self, raw: bytes) -> Sequence[bytes]:
        if self._state is not SessionState.HEADERS:
            return super().receive(raw)
        message = pb.ProcessingRequest.FromString(raw)
        if message.WhichOneof("request") != "request_headers" or message.observability_mode:
            return _NO_REPLIES
        return self._pick(message.request_headers)

    def _pick(self, head: pb.HttpHeaders) -> Sequence[bytes]:
        context = self._context
        wanted = frozenset((*DECODE_PASS_HEADERS, context.model_header))
        seen = wanted_headers(head.headers, wanted)
        self._take_request_id(seen.get(REQUEST_ID_HEADER, ""))
        digits = seen.get(ATTEMPT_COUNT_HEADER, "1")
        attempt = int(digits[:3]) if digits.isdecimal() else 1
        try:
            order = DecodeOrder.from_header(seen.get(DECODE_ORDER_HEADER, ""))
        except ValueError:
            # Nobody but the first pass sends requests here.
            _log.error("decode_order_missing", request_id=self.request_id)
            return self.failed(internal_error())
        query = DecodeQuery(seen.get(context.model_header, ""), order, attempt)
        try:
            lease = context.pick_decode(query)
        except RouterError as error:
            if attempt < order.attempts:
                error.headers = (*error.headers, (RETRY_HEADER, "1"))
            return self.failed(error)
        self._lease = lease
        self._debug = context.debug_headers and seen.get(DEBUG_HEADER) == "true"
        _log.debug(
            "routed",
            request_id=self.request_id,
            model=query.model,
            policy=lease.decision.policy,
            reason=lease.decision.reason,
            worker=lease.decision.worker_url,
            attempt=attempt,
        )
        self._state = SessionState.ROUTED
        return (context.builder.routed(lease.decision, in_body=False, request_id=None),)

    def _debug_reply(self, lease: Lease | Pair) -> bytes:
        return replies.debug_decode_worker(lease)

    def failed(self, error: RouterError, event: str = "request_refused") -> Sequence[bytes]:
        """As in Session; the request was counted by the first pass."""
        if self._state is SessionState.ANSWERED:
            return _NO_REPLIES
        self._state = SessionState.ANSWERED
        _log.warning(event, request_id=self.request_id, status=error.status, code=error.code)
        return (replies.error_response(error, self.request_id),)
