"""The first pass as a machine of messages and steps: exact messages in, exact steps out."""

from typing import Any

import pytest

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import (
    RouterError,
    body_over_gateway_buffer,
    body_required,
    no_healthy_workers,
    payload_too_large,
    prefill_failed,
    request_timeout,
    stale_request_expired,
    unsupported_body_mode,
)
from extproc.routing.decision import Decision
from extproc.routing.request import Request
from extproc.server import replies
from extproc.server.messages import Response
from extproc.server.route_session import RouteSession
from extproc.server.steps import NOTHING, RELEASED, LogEvent, Step
from tests.protocol.exchange import (
    llm_body,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
    set_headers,
)
from tests.unit.server.building import NEW_REQUEST_ID, make_context

PATH = "/v1/chat/completions"
ADDRESS = "10.0.0.1:8000"
URL = f"http://{ADDRESS}"
BODY = llm_body()
DECISION = Decision(
    model="m",
    policy="round_robin",
    reason="next",
    worker_url=URL,
    destinations=(ADDRESS,),
    timeout_ms=300_000,
)


def receive(session: RouteSession, message: pb.ProcessingRequest) -> Step:
    return session.receive(message.SerializeToString())


def asking(mode: str = "BUFFERED", response_mode: str = "NONE", **headers: Any) -> RouteSession:
    """A session whose request is complete."""
    session = RouteSession(make_context())
    receive(session, request_headers(mode=mode, response_mode=response_mode, **headers))
    receive(session, request_body(BODY))
    return session


def routed(mode: str = "BUFFERED", response_mode: str = "NONE", **headers: Any) -> RouteSession:
    """A session whose decision is out."""
    session = asking(mode, response_mode, **headers)
    session.routed(DECISION)
    return session


def refused(error: RouterError, event: str = "request_refused", *, path: str = PATH) -> Step:
    """The step that answers an error."""
    level = "warning" if error.status >= 500 else "info"
    fields = {"request_id": "req-1", "path": path, "status": error.status, "code": error.code}
    return Step(
        replies=(replies.error_response(error, "req-1"),),
        path=path,
        code=error.code,
        events=(LogEvent(level, event, fields),),  # type: ignore[arg-type]
    )


# -- the question


def test_a_complete_body_becomes_a_question_and_its_size_is_a_fact() -> None:
    session = RouteSession(make_context())
    assert receive(session, request_headers()) == Step(replies=(replies.REQUEST_HEADERS_CONTINUE,))
    assert session.waits_for_body
    assert receive(session, request_body(BODY)) == Step(body_bytes=len(BODY))
    question = session.question
    assert isinstance(question, Request)
    assert (question.endpoint.path, question.model, question.body) == (PATH, "m", BODY)
    assert not session.waits_for_body


@pytest.mark.parametrize("limit", [0, len(BODY)])
def test_the_prompt_is_decoded_with_the_model_where_a_policy_needs_tokens(limit: int) -> None:
    session = RouteSession(make_context(prompt_max_bytes=limit))
    receive(session, request_headers())
    receive(session, request_body(BODY))
    request = session.question
    assert isinstance(request, Request)
    assert (request.fields is not None) is (limit > 0)


def test_in_full_duplex_nothing_is_replied_before_the_body_is_complete() -> None:
    session = RouteSession(make_context())
    assert receive(session, request_headers(mode="FULL_DUPLEX_STREAMED")) == NOTHING
    assert receive(session, request_body(BODY[:9], end=False)) == NOTHING
    assert receive(session, request_body(BODY[9:])) == Step(body_bytes=len(BODY))


def test_without_a_visible_body_the_question_comes_with_the_headers() -> None:
    session = RouteSession(make_context())
    assert receive(session, request_headers(mode="NONE")) == NOTHING
    assert isinstance(session.question, Request)
    assert (session.question.model, session.question.stream) == ("m", True)


def test_without_a_visible_body_several_models_are_refused_with_a_hint_in_the_log() -> None:
    session = RouteSession(make_context(only_model=None))
    step = receive(session, request_headers(mode="NONE"))
    expected = refused(unsupported_body_mode())
    assert (step.replies, step.path, step.code) == (
        expected.replies,
        expected.path,
        expected.code,
    )
    hint, refusal = step.events
    assert (hint.level, hint.event) == ("error", "body_not_visible")
    assert hint.fields.keys() == {"request_id", "fix"}
    assert (refusal,) == expected.events


def test_a_missing_request_id_is_made_and_sent_on() -> None:
    session = RouteSession(make_context())
    receive(session, request_headers(x_request_id=""))
    receive(session, request_body(BODY))
    assert session.request_id == NEW_REQUEST_ID
    (reply,) = session.routed(DECISION).replies
    assert set_headers(pb.ProcessingResponse.FromString(reply))["x-request-id"] == NEW_REQUEST_ID


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (request_headers(end=True), body_required()),
        (request_headers(content_length="1025"), payload_too_large(1024)),
    ],
)
def test_headers_that_make_no_request_are_refused(
    message: pb.ProcessingRequest, error: RouterError
) -> None:
    session = RouteSession(make_context())
    assert receive(session, message) == refused(error)
    assert session.question is None


def test_an_unknown_path_is_counted_as_unmatched() -> None:
    session = RouteSession(make_context())
    step = receive(session, request_headers("/v2/chat"))
    assert (step.path, step.code) == ("unmatched", "not_found")


def test_a_body_over_the_limit_is_refused_without_a_size() -> None:
    session = RouteSession(make_context())
    receive(session, request_headers())
    assert receive(session, request_body(b"x" * 1025)) == refused(payload_too_large(1024))


def test_a_body_that_the_gateway_has_cut_is_refused_with_its_size() -> None:
    session = RouteSession(make_context())
    receive(session, request_headers(mode="BUFFERED_PARTIAL"))
    step = receive(session, request_body(BODY[:9], end=False))
    expected = refused(body_over_gateway_buffer())
    assert step.body_bytes == 9
    assert (step.replies, step.code, step.events) == (
        expected.replies,
        expected.code,
        expected.events,
    )


def test_models_and_options_are_answered_at_once() -> None:
    session = RouteSession(make_context())
    step = receive(session, request_headers("/v1/models", method="GET", end=True))
    assert (step.path, step.code, step.events) == ("/v1/models", "answered", ())
    (reply,) = step.replies
    assert pb.ProcessingResponse.FromString(reply).immediate_response.body == b'{"data":[]}'
    session = RouteSession(make_context())
    step = receive(session, request_headers(method="OPTIONS", end=True))
    assert (step.path, step.code) == ("unmatched", "answered")


# -- the decision


def test_a_decision_is_counted_as_routed() -> None:
    session = asking()
    step = session.routed(DECISION)
    assert step == Step(replies=step.replies, path=PATH, code="routed")
    assert len(step.replies) == 1
    assert session.question is None
    assert session.may_end_early


def test_in_full_duplex_the_body_follows_the_decision() -> None:
    session = asking("FULL_DUPLEX_STREAMED")
    decided, echoed = session.routed(DECISION).replies
    assert pb.ProcessingResponse.FromString(decided).HasField("request_headers")
    piece = pb.ProcessingResponse.FromString(echoed).request_body.response.body_mutation
    assert piece.streamed_response.body == BODY
    assert not session.may_end_early


def test_an_answer_of_the_router_is_counted_as_answered() -> None:
    step = asking().answered(b'{"tokens":[]}')
    assert (step.path, step.code, step.released) == (PATH, "answered", False)


def test_a_router_that_finds_no_worker_is_an_error_to_the_client() -> None:
    session = asking()
    assert session.failed(no_healthy_workers()) == refused(no_healthy_workers())
    assert session.question is None
    assert session.routed(DECISION) == RELEASED
    assert session.answered(b"{}") == NOTHING


# -- the response


def test_the_response_headers_are_a_fact_to_settle_the_lease_by() -> None:
    session = routed()
    message = response_headers(500, upstream=ADDRESS, content_type="text/event-stream")
    assert receive(session, message) == Step(
        replies=(replies.RESPONSE_HEADERS_CONTINUE,),
        response=Response(500, True, ADDRESS, "via_upstream", 0, (), False),
    )


def test_with_debug_headers_the_reply_says_which_worker_served() -> None:
    session = routed(x_extproc_debug="true")
    step = receive(session, response_headers(upstream=ADDRESS))
    assert session.debug
    assert step.replies == ()
    (reply,) = session.served_by(URL, "http://10.0.1.1:8000", (32, 50)).replies
    assert set_headers(pb.ProcessingResponse.FromString(reply)) == {
        "x-extproc-worker": URL,
        "x-extproc-policy": "round_robin",
        "x-extproc-reason": "next",
        "x-extproc-overlap": "32/50",
        "x-extproc-decode-worker": "http://10.0.1.1:8000",
    }


def test_the_end_of_the_response_releases_the_lease() -> None:
    session = routed()
    receive(session, response_headers(upstream=ADDRESS))
    assert receive(session, response_body(b"x")) == Step(replies=(replies.RESPONSE_BODY_CONTINUE,))
    assert receive(session, response_body(b"", end=True)).released
    assert receive(session, response_trailers()) == Step(
        replies=(replies.RESPONSE_TRAILERS_CONTINUE,), released=True
    )


def test_a_response_in_full_duplex_is_echoed() -> None:
    session = routed("FULL_DUPLEX_STREAMED", "FULL_DUPLEX_STREAMED")
    receive(session, response_headers(upstream=ADDRESS))
    for end in (False, True):
        assert receive(session, response_body(b"x", end=end)) == Step(
            replies=replies.response_body_piece(b"x", end_of_stream=end), released=end
        )


# -- the ends


@pytest.mark.parametrize(
    ("error", "event"),
    [(stale_request_expired(), "request_expired"), (prefill_failed(), "prefill_failed")],
)
def test_an_aborted_request_is_answered_with_the_error(error: RouterError, event: str) -> None:
    session = routed()
    assert session.aborted(error) == refused(error, event)
    for message in (
        request_headers(),
        request_body(b""),
        request_trailers(),
        response_headers(503),
        response_body(b"x", end=True),
        response_trailers(),
    ):
        assert receive(session, message) == NOTHING
    assert session.aborted(error) == NOTHING


def test_only_a_body_that_is_missing_can_be_late() -> None:
    session = RouteSession(make_context())
    assert session.body_timed_out() == NOTHING
    receive(session, request_headers())
    assert session.body_timed_out() == refused(request_timeout())
    assert routed().body_timed_out() == NOTHING


# -- odd requests


@pytest.mark.parametrize("encoding", ["gzip", "BR ", "gzip, br"])
def test_an_encoded_body_is_refused_before_it_is_read(encoding: str) -> None:
    session = RouteSession(make_context())
    step = receive(session, request_headers(content_encoding=encoding))
    assert step.code == "unsupported_content_encoding"
    (reply,) = step.replies
    immediate = pb.ProcessingResponse.FromString(reply).immediate_response
    assert immediate.status.code == 415
    assert encoding.strip().lower() in immediate.body.decode()


@pytest.mark.parametrize("encoding", ["identity", " Identity"])
def test_a_body_without_an_encoding_may_say_so(encoding: str) -> None:
    session = RouteSession(make_context())
    receive(session, request_headers(content_encoding=encoding))
    assert session.waits_for_body


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true"])
def test_errors_on_messages_are_in_anthropics_envelope(path: str) -> None:
    session = RouteSession(make_context())
    receive(session, request_headers(path))
    receive(session, request_body(BODY))
    step = session.failed(no_healthy_workers())
    error = replies.error_response(no_healthy_workers(), "req-1", anthropic=True)
    assert step.replies == (error,)
    session = routed()
    assert session.aborted(prefill_failed()).replies == (
        replies.error_response(prefill_failed(), "req-1"),
    )


@pytest.mark.parametrize(
    ("status", "retry_after", "added"), [(503, "", True), (503, "7", False), (429, "", False)]
)
@pytest.mark.parametrize("debug", [False, True])
def test_a_503_says_when_to_retry(status: int, retry_after: str, added: bool, debug: bool) -> None:
    session = routed(x_extproc_debug=str(debug).lower())
    message = response_headers(status, upstream=ADDRESS)
    if retry_after:
        message.response_headers.headers.headers.add(
            key="retry-after", raw_value=retry_after.encode()
        )
    step = receive(session, message)
    assert step.response is not None
    assert step.response.retry_after == retry_after
    if debug:
        step = session.served_by(URL, None, (0, 0))
    (reply,) = step.replies
    found = set_headers(pb.ProcessingResponse.FromString(reply))
    assert found.get("retry-after") == ("1" if added else None)
    assert ("x-extproc-worker" in found) is debug
