"""The session of the first pass: a request in, the decision out.

A complete request becomes a question to the router. In full duplex the reply to the headers waits
for the decision, and the body is echoed after it. Such a stream is never ended early, since that
loses pieces of the response.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import (
    RouterError,
    body_over_gateway_buffer,
    body_required,
    is_anthropic,
    payload_too_large,
    unsupported_body_mode,
    unsupported_content_encoding,
)
from extproc.routing.decision import Decision
from extproc.routing.json_members import with_members
from extproc.routing.request import (
    MODELS_PATH,
    ClientHeaders,
    Endpoint,
    Request,
    find_endpoint,
    parse_body,
)
from extproc.routing.subset import Subset
from extproc.server import replies, steps
from extproc.server.bodies import BodyMode, BodyTooLargeError, RequestBody
from extproc.server.messages import RequestHead, client_headers_of, wanted_headers
from extproc.server.session import Session, SessionContext, SessionState
from extproc.server.steps import NOTHING, Step, log_event

__all__ = ["RouteSession"]

_UNMATCHED: Final = "unmatched"


class RouteSession(Session):
    """A request of a client, from its headers to the end of its response."""

    __slots__ = (
        "_body",
        "_endpoint",
        "_first_message",
        "_held_bytes",
        "_raw_path",
        "_response_ended",
        "_response_full_duplex",
        "_steering_headers",
        "_subset",
        "_trailers_waiting",
    )

    def __init__(self, context: SessionContext) -> None:
        super().__init__(context)
        self._body: RequestBody | None = None
        self._endpoint: Endpoint | None = None
        self._first_message = b""
        # Counted by the admission as held for the body; -1 while the request is not admitted.
        self._held_bytes = -1
        # As the client has sent it.
        self._raw_path = ""
        self._response_full_duplex = False
        self._response_ended = False
        self._steering_headers: tuple[str, ...] = ()
        self._subset: Subset | None = None
        self._trailers_waiting = False

    @property
    def path(self) -> str:
        return self._endpoint.path if self._endpoint is not None else _UNMATCHED

    @property
    def waits_for_body(self) -> bool:
        return self._state is SessionState.BODY or self._waits_for_late_body

    @property
    def may_end_early(self) -> bool:
        return (
            self._state in (SessionState.ROUTED, SessionState.RESPONDING)
            and not self._response_full_duplex
            and not (self._body is not None and self._body.mode.full_duplex)
            and not self._waits_for_late_body
        )

    @property
    def _waits_for_late_body(self) -> bool:
        """True while pieces of a body are held back that came after the decision."""
        body = self._body
        return (
            body is not None
            and body.mode.visible_after_decision
            and not body.complete
            and self._state in (SessionState.ROUTED, SessionState.RESPONDING)
        )

    def _receive_first(self, raw: bytes) -> Step:
        self._first_message = raw
        heads = self._context.heads
        known = heads.find(raw)
        if known is not None:
            return self._request_headers(*known)
        message = pb.ProcessingRequest.FromString(raw)
        if message.observability_mode:
            return NOTHING
        if message.WhichOneof("request") == "request_headers":
            return self._request_headers(*heads.read(raw, message))
        return self._receive_parsed(raw, message)

    # -- request path

    def _request_headers(self, head: RequestHead, given_id: str, length: int) -> Step:
        context = self._context
        self._raw_path = head.path
        self._response_full_duplex = head.response_full_duplex
        self._steering_headers = head.steering
        self._subset = head.subset
        self._take_request_id(given_id)
        self.debug = head.debug and context.debug_headers
        try:
            endpoint = self._endpoint = find_endpoint(head.method, head.path)
            if endpoint.path == MODELS_PATH:
                return self._answer(context.models_body())
            if head.end_of_stream:
                raise body_required()
            if head.encoding:
                raise unsupported_content_encoding(head.encoding)
            if length > context.max_body_bytes:
                raise payload_too_large(context.max_body_bytes)
            self._enter(head.body_mode, length)
        except RouterError as error:
            if error.status == 405 and head.method == "OPTIONS":
                return self._answer(b"", 204, (("allow", dict(error.headers)["allow"]),))
            return self.failed(error)
        body = RequestBody(head.body_mode)
        if not head.body_mode.visible_before_decision:
            return self._ask_without_body(body, endpoint)
        self._body = body
        self._state = SessionState.BODY
        if body.mode.headers_carry_decision:
            return NOTHING
        return steps.REQUEST_HEADERS_CONTINUE

    def _enter(self, mode: BodyMode, length: int) -> None:
        """Be admitted; raises RouterError 503 while the service has too much to do."""
        is_shown = mode.visible_before_decision or mode.visible_after_decision
        held = length if is_shown and length > 0 else 0
        self._context.admission.enter(held)
        self._held_bytes = held

    def _ask_without_body(self, body: RequestBody, endpoint: Endpoint) -> Step:
        """The gateway wants a decision before it sends the body: only one model can be meant."""
        only_model = self._context.only_model
        if endpoint.answered_locally or only_model is None:
            event = log_event(
                "error",
                "body_not_visible",
                request_id=self.request_id,
                fix="set the filter's request_body_mode to BUFFERED or FULL_DUPLEX_STREAMED",
            )
            step = self.failed(unsupported_body_mode())
            return msgspec.structs.replace(step, events=(event, *step.events))
        self._body = body
        self._state = SessionState.ROUTING
        # The response may be streamed: it must not get the time-out of responses that are not.
        self.question = Request(
            endpoint,
            only_model,
            stream=True,
            read_headers=self._read_headers,
            subset=self._subset,
        )
        return NOTHING

    def _request_body(self, chunk: pb.HttpBody) -> Step:
        body = self._body
        if body is None:
            return NOTHING
        late = self._state is not SessionState.BODY
        if late and not self._waits_for_late_body:
            is_shown = body.mode.visible_before_decision or body.mode.visible_after_decision
            # While the router decides, the reply to the headers is still to come.
            is_early = self._state is SessionState.ROUTING
            return NOTHING if is_shown or is_early else steps.REQUEST_BODY_CONTINUE
        try:
            body.append(chunk, self._context.max_body_bytes)
            self._hold(len(body.peek()))
        except BodyTooLargeError:
            return self.failed(payload_too_large(self._context.max_body_bytes))
        except RouterError as error:
            return self.failed(error)
        if not body.complete:
            return NOTHING
        if late:
            return self._check_late(body)
        return self._ask(body, cut=body.mode.may_be_cut and not chunk.end_of_stream)

    def _hold(self, body_bytes: int) -> None:
        """Count what was not announced; raises RouterError 503."""
        more = body_bytes - self._held_bytes
        if more > 0:
            self._context.admission.hold(more, body_bytes)
            self._held_bytes = body_bytes

    def give_back(self) -> None:
        if self._held_bytes > 0 and not self._waits_for_late_body:
            self._context.admission.give_back(self._held_bytes)
            self._held_bytes = 0

    def close(self) -> None:
        if self._held_bytes >= 0:
            self._context.admission.leave(self._held_bytes)
            self._held_bytes = -1

    def _check_late(self, body: RequestBody) -> Step:
        """The body came after the decision: all that is left is to remove what steers engines."""
        data = body.peek()
        try:
            self._parse(body)
        except RouterError as error:
            # What cannot be read here cannot be checked, so it must not reach the engine.
            step = self.failed(error)
            return msgspec.structs.replace(step, body_bytes=len(data))
        out = self._pieces(body)
        self.give_back()
        return Step(replies=out, body_bytes=len(data))

    def _parse(self, body: RequestBody) -> Request:
        """Read the complete body, and change it if the engine must not get all of it."""
        assert self._endpoint is not None  # noqa: S101 (set with the headers)
        data = body.peek()
        request = parse_body(
            self._endpoint,
            data,
            self._client_headers,
            prompt_max_bytes=self._context.prompt_max_bytes,
        )
        request.read_headers = self._read_headers
        request.subset = self._subset
        if request.body is not data:
            body.replace(request.body)
        return request

    def _ask(self, body: RequestBody, *, cut: bool) -> Step:
        """The body is complete: set the question, or answer with an error."""
        data = body.peek()
        try:
            self.question = self._parse(body)
        except RouterError as error:
            # A body that is cut off is larger than the gateway's buffer.
            step = self.failed(body_over_gateway_buffer() if cut else error)
            return msgspec.structs.replace(step, body_bytes=len(data))
        self._state = SessionState.ROUTING
        return Step(body_bytes=len(data))

    def _client_headers(self) -> ClientHeaders:
        return client_headers_of(self._first_message, self.request_id)

    def _read_headers(self, names: frozenset[str]) -> Mapping[str, str]:
        return wanted_headers(pb.ProcessingRequest.FromString(self._first_message), names)

    def _request_trailers(self) -> Step:
        body = self._body
        if self._waits_for_late_body and body is not None:
            self._trailers_waiting = True
            body.complete = True
            return self._check_late(body)
        if self._state is not SessionState.BODY or body is None:
            return super()._request_trailers()
        if body.mode.whole_in_one_message:
            # Trailers right behind the headers: there is no body to wait for.
            return self.failed(body_required())
        # The trailers end the body; their own reply comes behind the decision.
        self._trailers_waiting = True
        body.complete = True
        return self._ask(body, cut=False)

    # -- the answer to the question

    def _decision_replies(self, decision: Decision) -> Sequence[bytes]:
        self._first_message = b""
        body = self._body
        assert body is not None  # noqa: S101 (set before the state ROUTING)
        mode = body.mode
        decided = self._context.builder.routed(
            decision,
            in_body=not mode.headers_carry_decision,
            request_id=self.request_id if self._made_request_id else None,
        )
        if self._steering_headers:
            decided = replies.without_request_headers(
                decided, self._steering_headers, in_body=not mode.headers_carry_decision
            )
        if decision.body_members and body.peek():  # a body that was not seen cannot be changed
            body.replace(with_members(body.peek(), decision.body_members))
        if not mode.visible_before_decision:
            return (decided,)
        if mode.headers_carry_decision:
            return (decided, *self._pieces(body))
        data = body.take()
        if body.changed:
            set_length = not mode.may_be_cut
            decided = replies.with_request_body(decided, bytes(data), set_length=set_length)
        return (decided,)

    def _pieces(self, body: RequestBody) -> Sequence[bytes]:
        """Replies to the pieces of a body that are behind the reply to the headers."""
        data = body.take()
        out: list[bytes]
        if body.mode.full_duplex:
            out = replies.request_body_pieces(data, end_of_stream=not self._trailers_waiting)
        elif body.changed:
            out = replies.request_body_replacements(bytes(data), body.chunks)
        else:
            out = [replies.REQUEST_BODY_CONTINUE] * body.chunks
        if self._trailers_waiting:
            out.append(replies.REQUEST_TRAILERS_CONTINUE)
        return out

    def _error_reply(self, error: RouterError, more_headers: tuple[tuple[str, str], ...]) -> bytes:
        anthropic = is_anthropic(self._raw_path)
        return replies.error_response(error, self.request_id, more_headers, anthropic=anthropic)

    def _forget_request(self) -> None:
        self._body = None
        self._first_message = b""
        self.close()

    # -- response path

    def _response_body(self, chunk: pb.HttpBody) -> Step:
        if not self._response_full_duplex or self._state is SessionState.ANSWERED:
            return super()._response_body(chunk)
        if self._response_ended:
            return NOTHING  # the end again
        end = self._response_ended = chunk.end_of_stream
        return Step(
            replies=replies.response_body_piece(chunk.body, end_of_stream=end), released=end
        )

    def served_by(self, worker: str, decode_worker: str | None, overlap: tuple[int, int]) -> Step:
        assert self._decision is not None  # noqa: S101 (a response follows a decision)
        reply = replies.debug_response_headers(self._decision, worker, decode_worker, overlap)
        return self._with_debug_headers(reply)
