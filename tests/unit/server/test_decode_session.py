"""The second pass as a machine of messages and replies: headers in, a decode worker out."""

from collections.abc import Callable, Sequence

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from prometheus_client import CollectorRegistry

from extproc._protos import llm_extproc_pb2 as pb
from extproc.config.envoy import EnvoyConfig
from extproc.errors import RouterError, no_decode_workers, stale_request_expired
from extproc.metrics.service import Metrics
from extproc.routing.decision import Decision
from extproc.routing.lease import Lease
from extproc.routing.pd.decode_order import DecodeOrder
from extproc.routing.pd.passes import DecodeQuery
from extproc.server.decode_session import DecodeSession
from extproc.server.messages import RequestHeadTable, ResponseTable
from extproc.server.replies import ReplyBuilder
from extproc.server.session import SessionContext
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.worker import Worker
from tests.builders import Fleet, make_fleet, make_worker
from tests.protocol.exchange import (
    destination,
    error,
    header_map,
    kind,
    request_body,
    response_body,
    response_headers,
    response_trailers,
    set_headers,
)

ADDRESS = "10.0.1.1:8000"
ORDER = DecodeOrder(3, "10.0.0.1", "0a1b2c", (ADDRESS, "10.0.1.2:8000"))
REFUSED = "upstream_reset_before_response_started{remote_connection_failure}"


def headers(
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


class Case(Struct, kw_only=True):
    """A session of the second pass with one decode worker, of which a failure opens the breaker."""

    routing: Fleet
    worker: Worker
    queries: list[DecodeQuery]
    metrics: Metrics
    session: DecodeSession

    def receive(self, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        replies: Sequence[bytes] = self.session.receive(message.SerializeToString())
        return [pb.ProcessingResponse.FromString(reply) for reply in replies]

    def reply(self, message: pb.ProcessingRequest) -> pb.ProcessingResponse:
        (reply,) = self.receive(message)
        return reply

    def abort(self) -> Sequence[bytes]:
        """The janitor's abort, as the ext_proc stream passes it on."""
        replies: list[bytes] = []
        lease = self.session.lease
        assert lease is not None
        lease.on_abort = lambda error: replies.extend(self.session.aborted(error))
        lease.abort(stale_request_expired())
        return replies

    def requests_counted(self) -> int:
        return sum(counter.value for counter in self.metrics.requests.children.values())


def make_case(
    *,
    error: RouterError | None = None,
    authorization: str | None = None,
    pick: Callable[[DecodeQuery], Lease] | None = None,
) -> Case:
    worker = make_worker(f"http://{ADDRESS}", role="decode", threshold=1)
    routing = make_fleet([worker])
    queries: list[DecodeQuery] = []

    def pick_decode(query: DecodeQuery) -> Lease:
        queries.append(query)
        if error is not None:
            raise error
        now = routing.clock.monotonic()
        decision = Decision(
            model=query.model,
            policy="decode_affinity",
            reason="no_peer",
            worker_url=worker.url,
            destinations=(ADDRESS,),
            timeout_ms=0,
        )
        claim = routing.claims.take(worker, now)
        return Lease(routing.lease_parts, decision, [worker], claim, now)

    metrics = Metrics(CollectorRegistry())
    context = SessionContext(
        builder=ReplyBuilder(EnvoyConfig(), authorization),
        metrics=metrics,
        heads=RequestHeadTable(),
        responses=ResponseTable(),
        max_body_bytes=1024,
        models_body=b"",
        only_model="m",
        debug_headers=True,
        prompt_max_bytes=0,
        pick_decode=pick or pick_decode,
    )
    return Case(
        routing=routing,
        worker=worker,
        queries=queries,
        metrics=metrics,
        session=DecodeSession(context),
    )


# -- the request


def test_the_headers_are_answered_with_a_worker() -> None:
    case = make_case()
    reply = case.reply(headers())
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
    assert case.queries == [DecodeQuery("m", ORDER, 1)]
    assert case.worker.in_flight == 1
    assert case.session.may_end_early
    case.session.close()
    assert case.worker.in_flight == 0


def test_our_credentials_are_set_here_too() -> None:
    case = make_case(authorization="Bearer ours")
    assert set_headers(case.reply(headers()))["authorization"] == "Bearer ours"
    case.session.close()


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
    case = make_case()
    case.receive(headers(attempt=header))
    assert [query.attempt for query in case.queries] == [attempt]
    case.session.close()


def test_headers_are_found_whatever_their_case_and_in_either_field() -> None:
    case = make_case()
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
    case.receive(message)
    assert case.queries == [DecodeQuery("other", ORDER, 2)]
    case.session.close()


@pytest.mark.parametrize("order", ["", "x", "0;h;p;a:1", "2;h;p", "2;h;p;a:1;b", "\x7f"])
def test_without_an_order_it_is_a_mistake_of_ours(order: str) -> None:
    case = make_case()
    status, code, body = error(case.reply(headers(order)))
    assert (status, code) == (500, "internal_error")
    assert body["request_id"] == "r1"
    assert case.queries == []
    assert case.worker.in_flight == 0


def test_a_stream_without_any_header_is_answered_all_the_same() -> None:
    case = make_case()
    reply = case.reply(pb.ProcessingRequest(request_headers=pb.HttpHeaders()))
    assert error(reply)[:2] == (500, "internal_error")
    assert case.session.request_id


@given(st.binary(max_size=80))
def test_no_order_breaks_the_session(raw: bytes) -> None:
    case = make_case()
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
    (reply,) = case.receive(message)
    assert kind(reply) in ("request_headers", "immediate_response")
    case.session.close()
    assert case.worker.in_flight == 0


@pytest.mark.parametrize(
    ("attempt", "retry"), [(0, True), (1, True), (2, True), (3, False), (4, False)]
)
def test_an_attempt_without_a_worker_says_whether_another_may_follow(
    attempt: int, retry: bool
) -> None:
    case = make_case(error=no_decode_workers())
    reply = case.reply(headers(attempt=str(attempt)))
    assert error(reply)[:2] == (503, "no_decode_workers_available")
    assert set_headers(reply).get("x-extproc-retry") == ("1" if retry else None)
    assert reply.immediate_response.details == "extproc_no_decode_workers_available"
    # The request was counted by the first pass.
    assert case.requests_counted() == 0


def test_where_nothing_can_be_picked_it_is_503() -> None:
    context = make_case().session._context
    plain = SessionContext(
        builder=context.builder,
        metrics=context.metrics,
        heads=context.heads,
        responses=context.responses,
        max_body_bytes=1024,
        models_body=b"",
        only_model=None,
        debug_headers=False,
        prompt_max_bytes=0,
    )
    session = DecodeSession(plain)
    (raw,) = session.receive(headers().SerializeToString())
    assert error(pb.ProcessingResponse.FromString(raw))[0] == 503


def test_another_model_header_is_read_where_it_is_configured() -> None:
    case = make_case()
    context = case.session._context
    session = DecodeSession(
        SessionContext(
            builder=context.builder,
            metrics=context.metrics,
            heads=context.heads,
            responses=context.responses,
            max_body_bytes=1024,
            models_body=b"",
            only_model=None,
            debug_headers=False,
            prompt_max_bytes=0,
            model_header="x-model",
            pick_decode=context.pick_decode,
        )
    )
    session.receive(headers(more={"x-model": "named"}).SerializeToString())
    assert case.queries[0].model == "named"
    session.close()


def test_an_observed_stream_gets_no_reply() -> None:
    case = make_case()
    assert case.receive(headers(observability=True)) == []
    assert case.queries == []


def test_other_messages_before_the_headers_are_ignored() -> None:
    case = make_case()
    assert case.receive(response_headers()) == []
    assert case.receive(request_body(b"{}")) == []
    assert destination(case.reply(headers())) == ADDRESS
    case.session.close()


def test_the_second_headers_of_a_stream_pick_nobody() -> None:
    case = make_case()
    case.receive(headers())
    assert case.receive(headers()) == []
    assert len(case.queries) == 1
    case.session.close()
    assert case.worker.in_flight == 0


# -- the response


@pytest.mark.parametrize(
    ("status", "details", "state"),
    [
        (200, "via_upstream", BreakerState.CLOSED),
        (422, "via_upstream", BreakerState.CLOSED),
        (500, "via_upstream", BreakerState.OPEN),
        (503, REFUSED, BreakerState.OPEN),
        (504, "stream_idle_timeout", BreakerState.OPEN),
        (413, "request_payload_too_large", BreakerState.CLOSED),
    ],
)
def test_the_response_settles_the_workers_books(
    status: int, details: str, state: BreakerState
) -> None:
    case = make_case()
    case.receive(headers())
    reply = case.reply(response_headers(status, upstream=ADDRESS, details=details))
    assert reply == pb.ProcessingResponse(response_headers=pb.HeadersResponse())
    assert case.worker.breaker.state is state
    assert len(case.routing.outcomes()[case.worker.url]) == 1
    assert case.worker.in_flight == 1
    case.session.close()
    case.session.close()
    assert case.worker.in_flight == 0
    assert len(case.routing.outcomes()[case.worker.url]) == 1


@pytest.mark.parametrize("how", ["headers", "body", "trailers"])
def test_the_end_of_the_response_releases_the_worker(how: str) -> None:
    case = make_case()
    case.receive(headers())
    case.receive(response_headers(upstream=ADDRESS, end=how == "headers"))
    match how:
        case "body":
            case.receive(response_body(b"x", end=True))
        case "trailers":
            case.receive(response_trailers())
    assert case.worker.in_flight == 0


def test_a_client_that_leaves_says_nothing_of_the_worker() -> None:
    case = make_case()
    case.receive(headers())
    case.session.close()
    assert case.routing.outcomes() == {case.worker.url: ["cancelled"]}
    assert case.worker.breaker.state is BreakerState.CLOSED


def test_a_request_that_is_too_old_is_ended_without_another_attempt() -> None:
    case = make_case()
    case.receive(headers())
    (raw,) = case.abort()
    reply = pb.ProcessingResponse.FromString(raw)
    assert error(reply)[:2] == (504, "stale_request_expired")
    assert "x-extproc-retry" not in set_headers(reply)
    assert case.worker.breaker.state is BreakerState.OPEN
    assert case.receive(response_headers(upstream=ADDRESS)) == []
    case.session.close()
    assert case.worker.in_flight == 0
    assert case.requests_counted() == 0


def test_after_an_answer_of_our_own_there_is_nothing_to_say() -> None:
    case = make_case(error=no_decode_workers())
    case.receive(headers())
    assert case.receive(response_headers(503)) == []
    assert case.session.aborted(stale_request_expired()) == ()
    assert case.receive(headers()) == []
    case.session.close()
