"""The state machine of one ext_proc stream: the part that both passes share.

A session gets messages and returns steps. It does no I/O and knows no sockets, clock, metrics or
log. When a decision is needed, the session sets its `question`; the stream asks the router and
calls `routed` or `failed`. The passes differ in how a request becomes a question (route_session,
decode_session). The response and the ways to end are the same.

Outside full duplex there is exactly one reply to each message. Messages that Envoy repeats, or
that come after an answer of this service, get no reply.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import RouterError, request_timeout, stale_request_expired
from extproc.headers import CONTENT_TYPE_HEADER
from extproc.routing.decision import Decision
from extproc.routing.pd.decode_order import DecodeQuery
from extproc.routing.request import Request
from extproc.server import replies, steps
from extproc.server.admission import Admission
from extproc.server.messages import KNOWN_MAX_BYTES, RequestHeadTable, Response, ResponseTable
from extproc.server.steps import NOTHING, RELEASED, Step, log_event

__all__ = ["Session", "SessionContext", "SessionState"]

_REQUEST_ID_MAX_CHARS: Final = 128
_SERVER_ERROR: Final = 500
_UNAVAILABLE: Final = 503
_RESPONSE_HEADERS_RETRY_AFTER: Final = (
    replies.with_retry_after(replies.RESPONSE_HEADERS_CONTINUE),
)
_JSON: Final = ((CONTENT_TYPE_HEADER, "application/json"),)


class SessionState(enum.IntEnum):
    HEADERS = 0  # nothing seen yet
    BODY = 1  # waiting for the rest of the body
    ROUTING = 2  # a question is open
    ROUTED = 3  # the decision is out, waiting for the response
    RESPONDING = 4  # response headers seen
    ANSWERED = 5  # this service has answered the client


class SessionContext(Struct, frozen=True, kw_only=True):
    """What all sessions of one service share."""

    admission: Admission
    builder: replies.ReplyBuilder
    heads: RequestHeadTable
    responses: ResponseTable
    max_body_bytes: int
    models_body: Callable[[], bytes]
    only_model: str | None
    debug_headers: bool
    # Larger bodies are not decoded for their prompts; 0 where no model's policy needs tokens.
    prompt_max_bytes: int
    model_header: str
    # Makes the id of a request that came without one.
    new_request_id: Callable[[], str]


class Session:
    """One stream, one HTTP request."""

    __slots__ = (
        "_context",
        "_decision",
        "_lacks_retry_after",
        "_made_request_id",
        "_state",
        "debug",
        "question",
        "request_id",
    )

    def __init__(self, context: SessionContext) -> None:
        self._context = context
        self._state = SessionState.HEADERS
        self._decision: Decision | None = None
        self._made_request_id = False
        self._lacks_retry_after = False
        self.request_id = ""
        # True when the client gets debug headers: the stream calls `served_by` for them.
        self.debug = False
        # What the stream must ask the router, until `routed`, `answered` or `failed`.
        self.question: Request | DecodeQuery | None = None

    @property
    def path(self) -> str:
        """The API path under which the request is counted; "" where it is not counted."""
        return ""

    @property
    def waits_for_body(self) -> bool:
        return self._state is SessionState.BODY

    @property
    def may_end_early(self) -> bool:
        """True when this service can end the stream without harm to the response."""
        return self._state in (SessionState.ROUTED, SessionState.RESPONDING)

    def receive(self, raw: bytes) -> Step:
        """Take one serialised message; raises protobuf's DecodeError."""
        if self._state is SessionState.HEADERS:
            return self._receive_first(raw)
        if len(raw) <= KNOWN_MAX_BYTES:
            known = self._context.responses.get(raw)
            if known is not None:
                return self._response_headers(known)
        message = pb.ProcessingRequest.FromString(raw)
        if message.observability_mode:
            return NOTHING
        return self._receive_parsed(raw, message)

    def _receive_first(self, raw: bytes) -> Step:
        """Take the first message of the stream."""
        raise NotImplementedError

    def _receive_parsed(self, raw: bytes, message: pb.ProcessingRequest) -> Step:
        match message.WhichOneof("request"):
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
                # Headers again, or a kind of message that this version does not know.
                return NOTHING

    def _take_request_id(self, given: str) -> None:
        if (
            given
            and len(given) <= _REQUEST_ID_MAX_CHARS
            and given.isascii()
            and given.isprintable()
        ):
            self.request_id = given
        else:
            self.request_id = self._context.new_request_id()
            self._made_request_id = True

    def give_back(self) -> None:
        """The replies that carry the request's body are written: it is not held any more."""

    def close(self) -> None:
        """The request is answered, or the stream has ended; idempotent."""

    # -- request path

    def _request_body(self, chunk: pb.HttpBody) -> Step:
        return NOTHING

    def _request_trailers(self) -> Step:
        if self._state not in (SessionState.ROUTED, SessionState.RESPONDING):
            # The reply to the headers is still to come, and Envoy wants replies in order.
            return NOTHING
        return steps.REQUEST_TRAILERS_CONTINUE

    # -- the answer to the question

    def routed(self, decision: Decision) -> Step:
        """The router has decided."""
        self.question = None
        if self._state is not SessionState.ROUTING:
            # The request ended while the router was deciding.
            return RELEASED
        self._state = SessionState.ROUTED
        self._decision = decision
        out = self._decision_replies(decision)
        path = self.path
        return Step(replies=out, path=path, code="routed" if path else "")

    def _decision_replies(self, decision: Decision) -> Sequence[bytes]:
        raise NotImplementedError

    def answered(self, body: bytes) -> Step:
        """The router has answered the request, with a JSON body."""
        self.question = None
        if self._state is not SessionState.ROUTING:
            return NOTHING
        return self._answer(body)

    def _answer(
        self, body: bytes, status: int = 200, headers: tuple[tuple[str, str], ...] = _JSON
    ) -> Step:
        """Answer the client from here, without an error."""
        self._state = SessionState.ANSWERED
        self._forget_request()
        reply = replies.immediate_response(status, body, headers, "extproc_answered")
        path = self.path
        return Step(replies=(reply,), path=path, code="answered" if path else "")

    def failed(self, error: RouterError) -> Step:
        """There is no decision; the client gets the error."""
        return self._refuse(error, "request_refused")

    def _refuse(
        self, error: RouterError, event: str, more_headers: tuple[tuple[str, str], ...] = ()
    ) -> Step:
        """Answer the client with an error; `event` names it in the log."""
        self.question = None
        if self._state is SessionState.ANSWERED:
            return NOTHING
        self._state = SessionState.ANSWERED
        self._forget_request()
        path = self.path
        log = log_event(
            "warning" if error.status >= _SERVER_ERROR else "info",
            event,
            request_id=self.request_id,
            path=path or None,
            status=error.status,
            code=error.code,
        )
        return Step(
            replies=(self._error_reply(error, more_headers),),
            path=path,
            code=error.code if path else "",
            events=(log,),
        )

    def _error_reply(self, error: RouterError, more_headers: tuple[tuple[str, str], ...]) -> bytes:
        return replies.error_response(error, self.request_id, more_headers)

    def _forget_request(self) -> None:
        """Drop what is kept of the request: a stream may stay open for minutes."""

    def body_timed_out(self) -> Step:
        """The rest of the body did not come within the deadline."""
        return self.failed(request_timeout()) if self.waits_for_body else NOTHING

    def aborted(self, error: RouterError) -> Step:
        """The request is too old, or its prefill has failed. The client gets the error; a response
        that has begun is cut.
        """
        expired = error.code == stale_request_expired().code
        return self._refuse(error, "request_expired" if expired else "prefill_failed")

    # -- response path

    def _response_headers(self, response: Response) -> Step:
        if self._state is not SessionState.ROUTED:
            if self._state is SessionState.ANSWERED:
                return NOTHING
            return steps.RESPONSE_HEADERS_CONTINUE
        self._state = SessionState.RESPONDING
        if self.debug:
            self._lacks_retry_after = _lacks_retry_after(response)
            return Step(response=response)
        if response.status == _UNAVAILABLE and not response.retry_after:
            return Step(replies=_RESPONSE_HEADERS_RETRY_AFTER, response=response)
        return Step(replies=steps.RESPONSE_HEADERS_CONTINUE.replies, response=response)

    def _with_debug_headers(self, reply: bytes) -> Step:
        """The step that answers the response headers with debug headers."""
        if self._lacks_retry_after:
            reply = replies.with_retry_after(reply)
        return Step(replies=(reply,))

    def served_by(self, worker: str, decode_worker: str | None, overlap: tuple[int, int]) -> Step:
        """Reply to the response headers with debug headers, once the lease is settled.

        `worker` is the URL of the worker that served, `decode_worker` that of the one that
        decodes where it is another. `overlap` are cached and total tokens of `worker`.
        """
        raise NotImplementedError

    def _response_body(self, chunk: pb.HttpBody) -> Step:
        if self._state is SessionState.ANSWERED:
            return NOTHING
        return steps.RESPONSE_BODY_END if chunk.end_of_stream else steps.RESPONSE_BODY_CONTINUE

    def _response_trailers(self) -> Step:
        if self._state is SessionState.ANSWERED:
            return NOTHING
        return steps.RESPONSE_TRAILERS_END


def _lacks_retry_after(response: Response) -> bool:
    """True for a 503, also one of a worker, that does not say when to retry."""
    return response.status == _UNAVAILABLE and not response.retry_after
