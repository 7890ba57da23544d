"""The second pass as a machine of messages and steps: headers in, a question and replies out."""

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from extproc._protos import llm_extproc_pb2 as pb
from extproc.errors import (
    RouterError,
    internal_error,
    no_decode_workers,
    prefill_failed,
    stale_request_expired,
)
from extproc.routing.decision import Decision
from extproc.routing.pd.decode_order import DecodeOrder, DecodeQuery
from extproc.server import replies
from extproc.server.decode_session import DecodeSession
from extproc.server.messages import Response
from extproc.server.steps import NOTHING, RELEASED, LogEvent, Step
from tests.protocol.exchange import (
    destination,
    error,
    header_map,
    kind,
    request_body,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
    set_headers,
)
from tests.unit.server.building import NEW_REQUEST_ID, make_context

ADDRESS = "10.0.1.1:8000"
ORDER = DecodeOrder(3, "10.0.0.1", "0a1b2c", (ADDRESS, "10.0.1.2:8000"))
DECISION = Decision(
    model="m",
    policy="decode_affinity",
    reason="no_peer",
    worker_url=f"http://{ADDRESS}",
    destinations=(ADDRESS,),
    timeout_ms=0,
)


def decode_headers(
    order: str | None = None,
    attempt: str | None = "1",
    *,
    model: str = "m",
    more: dict[str, str] | None = None,
    observability: bool = False,
) -> pb.ProcessingRequest:
    """What the filter of the second pass sends."""
    fields = {":method": "POST", ":path": "/generate", "x-request-id": "r1"}
    fields["x-extproc-model"] = model
    fields["x-extproc-decode-order"] = ORDER.to_header() if order is None else order
    if attempt is not None:
        fields["x-envoy-attempt-count"] = attempt
    return pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(headers=header_map(fields | (more or {}))),
        observability_mode=observability,
    )


def receive(session: DecodeSession, message: pb.ProcessingRequest) -> Step:
    return session.receive(message.SerializeToString())


def only_reply(step: Step) -> pb.ProcessingResponse:
    (reply,) = step.replies
    return pb.ProcessingResponse.FromString(reply)


def routed(**context: object) -> DecodeSession:
    """A session whose decision is out."""
    session = DecodeSession(make_context(**context))  # type: ignore[arg-type]
    receive(session, decode_headers())
    session.routed(DECISION)
    return session


# -- the question


def test_the_headers_become_a_question() -> None:
    session = DecodeSession(make_context())
    assert receive(session, decode_headers()) == NOTHING
    assert session.question == DecodeQuery("m", ORDER, 1)
    assert session.request_id == "r1"


@pytest.mark.parametrize(
    ("header", "attempt"),
    [
        (None, 1),
        ("", 1),
        ("1", 1),
        ("2", 2),
        ("03", 3),
        ("0", 0),
        ("-1", 1),
        ("x", 1),
        ("²", 1),
        ("999", 999),
        ("9" * 5000, 999),
    ],
)
def test_the_attempt_is_the_proxys_number_and_the_first_without_one(
    header: str | None, attempt: int
) -> None:
    session = DecodeSession(make_context())
    receive(session, decode_headers(attempt=header))
    assert session.question == DecodeQuery("m", ORDER, attempt)


def test_headers_are_found_whatever_their_case_and_in_either_field() -> None:
    session = DecodeSession(make_context())
    message = pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(
            headers=pb.HeaderMap(
                headers=[
                    pb.HeaderValue(key="X-Extproc-Model", value="other"),
                    pb.HeaderValue(key="X-Extproc-Decode-Order", value=ORDER.to_header()),
                    pb.HeaderValue(key="X-Envoy-Attempt-Count", value="2"),
                ]
            )
        )
    )
    receive(session, message)
    assert session.question == DecodeQuery("other", ORDER, 2)


def test_another_model_header_is_read_where_it_is_configured() -> None:
    session = DecodeSession(make_context(model_header="x-model"))
    receive(session, decode_headers(more={"x-model": "named"}))
    assert session.question == DecodeQuery("named", ORDER, 1)


@pytest.mark.parametrize("order", ["", "x", "0;h;p;a:1", "2;h;p", "2;h;p;a:1;b", "\x7f"])
def test_a_request_without_an_order_is_an_internal_error(order: str) -> None:
    session = DecodeSession(make_context())
    step = receive(session, decode_headers(order))
    status, code, body = error(only_reply(step))
    assert (status, code) == (500, "internal_error")
    assert body["request_id"] == "r1"
    assert session.question is None
    refused = {"request_id": "r1", "status": 500, "code": "internal_error"}
    assert step == Step(
        replies=(replies.error_response(internal_error(), "r1"),),
        events=(
            LogEvent("error", "decode_order_missing", {"request_id": "r1"}),
            LogEvent("warning", "request_refused", refused),
        ),
    )


def test_a_stream_without_any_header_is_answered_all_the_same() -> None:
    session = DecodeSession(make_context())
    step = receive(session, pb.ProcessingRequest(request_headers=pb.HttpHeaders()))
    assert error(only_reply(step))[:2] == (500, "internal_error")
    assert session.request_id == NEW_REQUEST_ID


@given(st.binary(max_size=80))
def test_no_order_breaks_the_session(raw: bytes) -> None:
    session = DecodeSession(make_context())
    message = pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(
            headers=pb.HeaderMap(
                headers=[
                    pb.HeaderValue(key="x-extproc-decode-order", raw_value=raw),
                    pb.HeaderValue(key="x-envoy-attempt-count", raw_value=raw),
                ]
            )
        )
    )
    step = receive(session, message)
    if session.question is None:
        assert kind(only_reply(step)) == "immediate_response"
    else:
        assert step == NOTHING


def test_an_observed_stream_gets_no_reply() -> None:
    session = DecodeSession(make_context())
    assert receive(session, decode_headers(observability=True)) == NOTHING
    assert session.question is None


def test_other_messages_before_the_headers_are_ignored() -> None:
    session = DecodeSession(make_context())
    for message in (response_headers(), request_body(b"{}"), request_trailers()):
        assert receive(session, message) == NOTHING
    receive(session, decode_headers())
    assert session.question == DecodeQuery("m", ORDER, 1)


def test_the_second_headers_of_a_stream_ask_nothing() -> None:
    session = routed()
    assert receive(session, decode_headers()) == NOTHING
    assert session.question is None


# -- the decision


def test_the_headers_are_answered_with_a_worker_and_nothing_is_counted() -> None:
    session = DecodeSession(make_context())
    receive(session, decode_headers())
    step = session.routed(DECISION)
    reply = only_reply(step)
    assert kind(reply) == "request_headers"
    assert destination(reply) == ADDRESS
    assert set_headers(reply) == {
        "x-extproc-cluster": "workers",
        "x-extproc-model": "m",
        "x-gateway-destination-endpoint": ADDRESS,
        "x-envoy-max-retries": "0",
    }
    assert MessageToDict(reply.dynamic_metadata)["extproc"] == {
        "model": "m",
        "policy": "decode_affinity",
        "reason": "no_peer",
        "destination": ADDRESS,
    }
    assert step == Step(replies=step.replies)
    assert session.question is None
    assert session.may_end_early


def test_the_configured_credentials_are_set_here_too() -> None:
    session = DecodeSession(make_context(authorization="Bearer ours"))
    receive(session, decode_headers())
    assert set_headers(only_reply(session.routed(DECISION)))["authorization"] == "Bearer ours"


@pytest.mark.parametrize(
    ("attempt", "retry"), [(0, True), (1, True), (2, True), (3, False), (4, False)]
)
def test_an_attempt_without_a_worker_says_whether_another_may_follow(
    attempt: int, retry: bool
) -> None:
    session = DecodeSession(make_context())
    receive(session, decode_headers(attempt=str(attempt)))
    failure = no_decode_workers()
    headers = failure.headers
    step = session.failed(failure)
    reply = only_reply(step)
    assert error(reply)[:2] == (503, "no_decode_workers_available")
    assert set_headers(reply).get("x-extproc-retry") == ("1" if retry else None)
    assert reply.immediate_response.details == "extproc_no_decode_workers_available"
    # The request was counted by the first pass.
    assert (step.path, step.code) == ("", "")
    fields = {"request_id": "r1", "status": 503, "code": "no_decode_workers_available"}
    assert step.events == (LogEvent("warning", "request_refused", fields),)
    assert failure.headers == headers


# -- the response


def test_the_response_headers_are_a_fact_to_settle_the_lease_by() -> None:
    session = routed()
    message = response_headers(503, upstream=ADDRESS, details="via_upstream", end=True)
    assert receive(session, message) == Step(
        replies=(replies.with_retry_after(replies.RESPONSE_HEADERS_CONTINUE),),
        response=Response(503, False, ADDRESS, "via_upstream", 0, (), True),
    )
    # A second time they are passed on, and settle nothing.
    assert receive(session, message) == Step(replies=(replies.RESPONSE_HEADERS_CONTINUE,))


def test_with_debug_headers_the_reply_waits_until_it_is_known_which_worker_served() -> None:
    session = DecodeSession(make_context())
    receive(session, decode_headers(more={"x-extproc-debug": "true"}))
    session.routed(DECISION)
    assert session.debug
    step = receive(session, response_headers(upstream=ADDRESS))
    assert step.replies == ()
    assert step.response is not None
    reply = only_reply(session.served_by(f"http://{ADDRESS}", None, (0, 0)))
    assert set_headers(reply) == {"x-extproc-decode-worker": f"http://{ADDRESS}"}


def test_debug_headers_are_not_given_where_they_are_not_configured() -> None:
    session = DecodeSession(make_context(debug_headers=False))
    receive(session, decode_headers(more={"x-extproc-debug": "true"}))
    assert not session.debug


def test_the_end_of_the_response_releases_the_lease() -> None:
    session = routed()
    receive(session, response_headers(upstream=ADDRESS))
    going_on = receive(session, response_body(b"x"))
    assert going_on == Step(replies=(replies.RESPONSE_BODY_CONTINUE,))
    for message, reply in (
        (response_body(b"x", end=True), replies.RESPONSE_BODY_CONTINUE),
        (response_trailers(), replies.RESPONSE_TRAILERS_CONTINUE),
    ):
        assert receive(session, message) == Step(replies=(reply,), released=True)


# -- the ends


@pytest.mark.parametrize(
    ("failure", "event"),
    [(stale_request_expired(), "request_expired"), (prefill_failed(), "prefill_failed")],
)
def test_an_aborted_request_is_answered_without_another_attempt(
    failure: RouterError, event: str
) -> None:
    session = routed()
    step = session.aborted(failure)
    reply = only_reply(step)
    assert error(reply)[:2] == (failure.status, failure.code)
    assert "x-extproc-retry" not in set_headers(reply)
    fields = {"request_id": "r1", "status": failure.status, "code": failure.code}
    assert step == Step(replies=step.replies, events=(LogEvent("warning", event, fields),))


def test_after_an_answer_of_the_service_nothing_follows() -> None:
    session = routed()
    session.aborted(stale_request_expired())
    for message in (
        decode_headers(),
        request_body(b""),
        response_headers(503),
        response_body(b"x", end=True),
        response_trailers(),
    ):
        assert receive(session, message) == NOTHING
    assert session.aborted(stale_request_expired()) == NOTHING
    assert session.failed(no_decode_workers()) == NOTHING
    assert session.body_timed_out() == NOTHING


def test_a_decision_for_a_request_that_has_ended_is_released() -> None:
    session = DecodeSession(make_context())
    receive(session, decode_headers())
    session.failed(no_decode_workers())
    assert session.routed(DECISION) == RELEASED
