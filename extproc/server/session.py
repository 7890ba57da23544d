"""The state machine of one ext_proc stream: a message in, serialised replies out.

It does no I/O and knows no sockets and no clock. When a message completes a request it
leaves it in `to_route`; the adapter asks the router and comes back with `routed` or `failed`.
Replies are exact: one per message outside full duplex, none to messages that Envoy repeats
or that came after an answer of our own.

In full duplex the reply to the headers waits for the decision and the body is echoed behind
it; the stream is never ended early there, since that loses pieces of the response.
"""

import enum
import uuid
from collections.abc import Callable, Sequence
from typing import Final

import structlog
from msgspec import Struct

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import (
    RouterError,
    body_over_gateway_buffer,
    body_required,
    no_decode_workers,
    payload_too_large,
    request_timeout,
    stale_request_expired,
    unsupported_body_mode,
)
from extproc.headers import CONTENT_TYPE_HEADER, DEFAULT_MODEL_HEADER
from extproc.metrics.service import Metrics
from extproc.routing.json_members import with_members
from extproc.routing.lease import Lease
from extproc.routing.local_endpoints import Answer
from extproc.routing.pd.pair import Pair
from extproc.routing.pd.passes import DecodeQuery
from extproc.routing.request import (
    MODELS_PATH,
    ClientHeaders,
    Endpoint,
    Request,
    find_endpoint,
    parse_body,
)
from extproc.server import replies
from extproc.server.bodies import BodyTooLargeError, RequestBody
from extproc.server.messages import (
    KNOWN_MAX_BYTES,
    RequestHead,
    RequestHeadTable,
    Response,
    ResponseTable,
    client_headers_of,
)

__all__ = ["Session", "SessionContext", "SessionState"]

_log = structlog.get_logger()

_REQUEST_ID_MAX_CHARS: Final = 128
_NO_REPLIES: Final[Sequence[bytes]] = ()
_RESPONSE_HEADERS_CONTINUE: Final = (replies.RESPONSE_HEADERS_CONTINUE,)
_UNMATCHED: Final = "unmatched"


class SessionState(enum.IntEnum):
    HEADERS = 0  # nothing seen yet
    BODY = 1  # waiting for the rest of the body
    ROUTING = 2  # the adapter is asking the router
    ROUTED = 3  # the decision is out, waiting for the response
    RESPONDING = 4  # response headers seen
    ANSWERED = 5  # we answered the client ourselves


def _pick_nothing(_: DecodeQuery) -> Lease:
    raise no_decode_workers()


class SessionContext(Struct, frozen=True):
    """What all sessions of one service share."""

    builder: replies.ReplyBuilder
    metrics: Metrics
    heads: RequestHeadTable
    responses: ResponseTable
    max_body_bytes: int
    models_body: bytes
    only_model: str | None
    debug_headers: bool
    # Larger bodies are not decoded for their prompts; 0 where no model's policy needs tokens.
    prompt_max_bytes: int
    model_header: str = DEFAULT_MODEL_HEADER
    pick_decode: Callable[[DecodeQuery], Lease] = _pick_nothing


class Session:
    """One stream, one HTTP request. `close` must be called however the stream ends."""

    __slots__ = (
        "_body",
        "_context",
        "_debug",
        "_endpoint",
        "_first_message",
        "_lease",
        "_made_request_id",
        "_response_full_duplex",
        "_state",
        "_trailers_waiting",
        "request_id",
        "to_route",
    )

    def __init__(self, context: SessionContext) -> None:
        self._context = context
        self._state = SessionState.HEADERS
        self._body: RequestBody | None = None
        self._endpoint: Endpoint | None = None
        self._first_message = b""
        self._lease: Lease | Pair | None = None
        self._response_full_duplex = False
        self._trailers_waiting = False
        self._debug = False
        self._made_request_id = False
        self.request_id = ""
        # Set when the adapter must call the router, until `routed` or `failed`.
        self.to_route: Request | None = None

    @property
    def lease(self) -> Lease | Pair | None:
        """What the router has booked for the request."""
        return self._lease

    @property
    def waits_for_body(self) -> bool:
        return self._state is SessionState.BODY

    @property
    def may_end_early(self) -> bool:
        """True when the stream can be ended from our side without harm to the response."""
        return (
            self._state in (SessionState.ROUTED, SessionState.RESPONDING)
            and not self._response_full_duplex
            and not (self._body is not None and self._body.mode.full_duplex)
            and not (self._lease is not None and self._lease.holds_stream)
        )

    def receive(self, raw: bytes) -> Sequence[bytes]:
        """The replies to one serialised message, in order; raises protobuf's DecodeError."""
        if self._state is SessionState.HEADERS:
            self._first_message = raw
            seen = self._context.heads.find(raw)
            if seen is not None:
                return self._request_headers(*seen)
        elif len(raw) <= KNOWN_MAX_BYTES:
            known = self._context.responses.get(raw)
            if known is not None:
                return self._response_headers(known)
        message = pb.ProcessingRequest.FromString(raw)
        if message.observability_mode:
            return _NO_REPLIES
        match message.WhichOneof("request"):
            case "request_headers":
                if self._state is not SessionState.HEADERS:
                    return _NO_REPLIES
                return self._request_headers(*self._context.heads.read(raw, message))
            case "request_body":
                return self._request_body(message.request_body)
            case "response_headers":
                return self._response_headers(self._context.responses.learn(raw, message))
            case "response_body":
                return self._response_body(message.response_body)
            case "request_trailers":
                return self._request_trailers()
            case "response_trailers":
                return self._response_trailers()
            case _:
                # A kind of message this version does not know: nothing it could reply.
                return _NO_REPLIES

    # -- request path

    def _request_headers(self, head: RequestHead, given_id: str, length: int) -> Sequence[bytes]:
        self._response_full_duplex = head.response_full_duplex
        self._take_request_id(given_id)
        context = self._context
        self._debug = head.debug and context.debug_headers
        try:
            endpoint = self._endpoint = find_endpoint(head.method, head.path)
            if endpoint.path == MODELS_PATH:
                return self._answer_models()
            if head.end_of_stream:
                raise body_required()
            if length > context.max_body_bytes:
                raise payload_too_large(context.max_body_bytes)
            body = RequestBody(head.body_mode)
            if not head.body_mode.visible_before_decision:
                return self._route_blindly(body, endpoint)
        except RouterError as error:
            if error.status == 405 and head.method == "OPTIONS":
                return self._answer_options(dict(error.headers)["allow"])
            return self.failed(error)
        self._body = body
        self._state = SessionState.BODY
        if body.mode.headers_carry_decision:
            return _NO_REPLIES
        return (replies.REQUEST_HEADERS_CONTINUE,)

    def _route_blindly(self, body: RequestBody, endpoint: Endpoint) -> Sequence[bytes]:
        """The gateway shows no body before it wants a decision: only one model can be meant."""
        if endpoint.answered_locally or self._context.only_model is None:
            _log.error(
                "body_not_visible",
                request_id=self.request_id,
                fix="set the filter's request_body_mode to BUFFERED or FULL_DUPLEX_STREAMED",
            )
            raise unsupported_body_mode()
        self._body = body
        self._state = SessionState.ROUTING
        # Whether it streams is unknown; a stream must not be cut by the plain time-out.
        self.to_route = Request(endpoint, self._context.only_model, stream=True)
        return _NO_REPLIES

    def _request_body(self, chunk: pb.HttpBody) -> Sequence[bytes]:
        body = self._body
        if self._state is not SessionState.BODY or body is None:
            if body is not None and not body.mode.visible_before_decision:
                # Decided without the body: its pieces pass by, each with a reply.
                return (replies.REQUEST_BODY_CONTINUE,)
            return _NO_REPLIES
        try:
            body.append(chunk, self._context.max_body_bytes)
            if body.complete:
                self._parse(body, cut=body.mode.may_be_cut and not chunk.end_of_stream)
        except BodyTooLargeError:
            return self.failed(payload_too_large(self._context.max_body_bytes))
        except RouterError as error:
            return self.failed(error)
        return _NO_REPLIES

    def _parse(self, body: RequestBody, *, cut: bool) -> None:
        """Fill `to_route` from the complete body; raises RouterError."""
        assert self._endpoint is not None  # noqa: S101 (set before the state BODY)
        data = body.peek()
        self._context.metrics.request_body_bytes.observe(len(data))
        try:
            self.to_route = parse_body(
                self._endpoint,
                data,
                self._client_headers,
                prompt_max_bytes=self._context.prompt_max_bytes,
            )
        except RouterError:
            if cut:
                # The gateway's buffer was smaller than the body.
                raise body_over_gateway_buffer() from None
            raise
        self._state = SessionState.ROUTING

    def _client_headers(self) -> ClientHeaders:
        return client_headers_of(self._first_message, self.request_id)

    def _request_trailers(self) -> Sequence[bytes]:
        body = self._body
        if self._state is SessionState.BODY and body is not None:
            if body.mode.whole_in_one_message:
                # Trailers right behind the headers: there is no body to wait for.
                return self.failed(body_required())
            # The trailers end the body; their own reply comes behind the decision.
            self._trailers_waiting = True
            body.complete = True
            try:
                self._parse(body, cut=False)
            except RouterError as error:
                return self.failed(error)
            return _NO_REPLIES
        if self._state in (SessionState.HEADERS, SessionState.ANSWERED):
            return _NO_REPLIES
        return (replies.REQUEST_TRAILERS_CONTINUE,)

    def routed(self, lease: Lease | Pair) -> Sequence[bytes]:
        """The router has decided; the session owns the lease from here on."""
        self.to_route = None
        self._first_message = b""
        if self._state is not SessionState.ROUTING:
            # Expired while the router was thinking.
            lease.close()
            return _NO_REPLIES
        self._lease = lease
        self._state = SessionState.ROUTED
        body = self._body
        assert body is not None and self._endpoint is not None  # noqa: S101, PT018
        self._context.metrics.requests(self._endpoint.path, "routed").inc()
        decision = lease.decision
        decided = self._context.builder.routed(
            decision,
            in_body=not body.mode.headers_carry_decision,
            request_id=self.request_id if self._made_request_id else None,
        )
        data = body.take()
        # A body that was not seen can not be changed.
        members = decision.body_members if data else b""
        if members:
            data = with_members(data, members)
        out = [decided]
        if body.mode.full_duplex:
            out += replies.request_body_pieces(data, end_of_stream=not self._trailers_waiting)
        elif members and body.mode.headers_carry_decision:
            out += replies.request_body_replacements(bytes(data), body.chunks)
        elif members:
            set_length = not body.mode.may_be_cut
            out = [replies.with_request_body(decided, bytes(data), set_length=set_length)]
        elif body.mode.headers_carry_decision and body.mode.visible_before_decision:
            out += [replies.REQUEST_BODY_CONTINUE] * body.chunks
        if self._trailers_waiting:
            out.append(replies.REQUEST_TRAILERS_CONTINUE)
        return out

    def answered(self, answer: Answer) -> Sequence[bytes]:
        """The router has answered the client itself."""
        self.to_route = None
        if self._state is not SessionState.ROUTING:
            return _NO_REPLIES
        return self._answer_with(200, answer.body, ((CONTENT_TYPE_HEADER, "application/json"),))

    def failed(self, error: RouterError, event: str = "request_refused") -> Sequence[bytes]:
        """Answer the client ourselves with an error; `event` names it in the log."""
        self.to_route = None
        if self._state is SessionState.ANSWERED:
            return _NO_REPLIES
        self._state = SessionState.ANSWERED
        self._body = None
        self._first_message = b""
        path = self._endpoint.path if self._endpoint is not None else _UNMATCHED
        self._context.metrics.requests(path, error.code).inc()
        log = _log.warning if error.status >= 500 else _log.info
        log(
            event,
            request_id=self.request_id,
            path=path,
            status=error.status,
            code=error.code,
        )
        return (replies.error_response(error, self.request_id),)

    def body_timed_out(self) -> Sequence[bytes]:
        """The rest of the body did not come within our deadline."""
        return self.failed(request_timeout()) if self._state is SessionState.BODY else _NO_REPLIES

    def aborted(self, error: RouterError) -> Sequence[bytes]:
        """The request is too old, or its prefill has failed: the client gets the error, or a
        stream that is cut once response headers are out.
        """
        expired = error.code == stale_request_expired().code
        return self.failed(error, "request_expired" if expired else "prefill_failed")

    def _answer_models(self) -> Sequence[bytes]:
        return self._answer_with(
            200, self._context.models_body, ((CONTENT_TYPE_HEADER, "application/json"),)
        )

    def _answer_options(self, allow: str) -> Sequence[bytes]:
        return self._answer_with(204, b"", (("allow", allow),))

    def _answer_with(
        self, status: int, body: bytes, headers: tuple[tuple[str, str], ...]
    ) -> Sequence[bytes]:
        """An answer of our own that is no error."""
        self._state = SessionState.ANSWERED
        self._body = None
        path = self._endpoint.path if self._endpoint is not None else _UNMATCHED
        self._context.metrics.requests(path, "answered").inc()
        return (replies.immediate_response(status, body, headers, "extproc_answered"),)

    def _take_request_id(self, given: str) -> None:
        if (
            given
            and len(given) <= _REQUEST_ID_MAX_CHARS
            and given.isascii()
            and given.isprintable()
        ):
            self.request_id = given
        else:
            self.request_id = str(uuid.uuid4())
            self._made_request_id = True

    # -- response path

    def _response_headers(self, response: Response) -> Sequence[bytes]:
        if self._state is SessionState.ANSWERED:
            return _NO_REPLIES
        lease = self._lease
        if lease is None or self._state is not SessionState.ROUTED:
            return _RESPONSE_HEADERS_CONTINUE
        self._state = SessionState.RESPONDING
        if not lease.responded(
            response.status, response.address, response.code_details, response.streamed
        ):
            _log.warning(
                "destination_missed",
                request_id=self.request_id,
                worker=lease.decision.worker_url,
                served=response.address,
            )
        if response.end_of_stream:
            lease.close()
        if self._debug:
            return (self._debug_reply(lease),)
        return _RESPONSE_HEADERS_CONTINUE

    def _debug_reply(self, lease: Lease | Pair) -> bytes:
        return replies.debug_response_headers(lease)

    def _response_body(self, chunk: pb.HttpBody) -> Sequence[bytes]:
        if self._state is SessionState.ANSWERED:
            return _NO_REPLIES
        if chunk.end_of_stream and self._lease is not None:
            self._lease.close()
        if self._response_full_duplex:
            return replies.response_body_piece(chunk.body, end_of_stream=chunk.end_of_stream)
        return (replies.RESPONSE_BODY_CONTINUE,)

    def _response_trailers(self) -> Sequence[bytes]:
        if self._state is SessionState.ANSWERED:
            return _NO_REPLIES
        if self._lease is not None:
            self._lease.close()
        return (replies.RESPONSE_TRAILERS_CONTINUE,)

    def close(self) -> None:
        """The stream is over: whatever was held is released; idempotent."""
        self._body = None
        self.to_route = None
        if self._lease is not None:
            self._lease.close()
