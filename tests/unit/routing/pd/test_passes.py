"""The first pass: which workers get a request, and what is in it."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import pytest

from extproc.errors import RouterError
from extproc.routing.chooser import Chosen
from extproc.routing.json_members import with_members
from extproc.routing.pd.decode_order import DecodeOrder
from extproc.routing.placement import NO_TOKENS, PromptTokens
from extproc.routing.request import Request, find_endpoint
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.engine_calls import EngineTimeoutError, EngineUnreachableError, PrefillCall
from extproc.workers.worker import KvEvents, Worker
from tests.fakes import settle
from tests.unit.routing.pd.pd_fleet import (
    ADDRESSES,
    BODY,
    DECODES,
    PAGE,
    PREFILLS,
    VIA,
    PdFleet,
)


class Choices:
    """A chooser that is a function of the workers."""

    reads_prompts = False

    def __init__(self, function: Callable[[Sequence[Worker]], Chosen]) -> None:
        self._function = function

    async def read(self, request: Request, adapter: str | None) -> PromptTokens:
        return NO_TOKENS

    def choose(self, workers: Sequence[Worker], prompt: PromptTokens, now: float) -> Chosen:
        return self._function(workers)

    def decided(self, chosen: Chosen) -> None:
        pass


# -- what is decided


async def test_with_two_passes_the_decision_has_an_order_and_no_destinations() -> None:
    fleet = PdFleet(linger_seconds=0.0)
    pair = await fleet.pair()
    decision = pair.decision
    assert (decision.model, decision.policy, decision.reason) == ("m", "round_robin", "next")
    assert decision.worker_url == PREFILLS[0]
    assert decision.destinations == ()
    assert decision.timeout_ms == 300_000
    assert decision.attempts == 3
    order = DecodeOrder.from_header(decision.decode_order)
    assert (order.attempts, order.prefill_host, order.pair) == (3, "10.0.0.1", pair.id)
    assert sorted(order.addresses) == sorted(ADDRESSES)
    # Both workers are counted, the decode worker by a reservation.
    assert fleet.load[0] == [1, 0, 0]
    assert sum(fleet.load[1]) == 1
    assert pair.reservation is not None
    assert pair.reservation.worker.address == order.addresses[0]
    labels = {"model": "m", "policy": "round_robin", "reason": "next"}
    assert fleet.metric("extproc_decisions_total", **labels) == 1
    pair.close()
    fleet.nothing_is_left()


async def test_inline_names_the_decode_workers_in_order() -> None:
    fleet = PdFleet(inline=True, decode_attempts=2)
    pair = await fleet.pair()
    decision = pair.decision
    assert decision.decode_order == ""
    assert decision.attempts == len(decision.destinations) == 2
    assert set(decision.destinations) < set(ADDRESSES)
    assert pair.reservation is None
    assert pair.decode is not None
    assert pair.decode.claim.worker.address == decision.destinations[0]
    assert fleet.metric("extproc_pd_decode_choices_total", model="m", reason="no_peer") == 1
    assert fleet.load[0] == [1, 0, 0]
    assert sum(fleet.load[1]) == 1
    # The first could not be reached; the second served.
    first, second = decision.destinations
    pair.responded(200, second, VIA, streamed=False)
    assert {DECODES[ADDRESSES.index(first)]: ["error"]}.items() <= fleet.outcomes().items()
    pair.close()
    fleet.nothing_is_left()


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(("stream", "timeout_ms"), [(False, 300_000), (True, 0)])
async def test_a_stream_has_no_time_out(inline: bool, stream: bool, timeout_ms: int) -> None:
    fleet = PdFleet(inline=inline)
    pair = await fleet.pair(stream=stream)
    assert pair.decision.timeout_ms == timeout_ms
    pair.close()


@pytest.mark.parametrize(("decodes", "attempts", "made"), [(3, 1, 1), (3, 2, 2), (2, 9, 2)])
async def test_there_are_never_more_attempts_than_decode_workers(
    decodes: int, attempts: int, made: int
) -> None:
    fleet = PdFleet(decodes=DECODES[:decodes], decode_attempts=attempts)
    pair = await fleet.pair()
    assert pair.decision.attempts == made
    assert DecodeOrder.from_header(pair.decision.decode_order).attempts == made
    pair.close()


async def test_a_neighbour_of_the_prefill_worker_comes_first() -> None:
    fleet = PdFleet(decodes=[*DECODES, *(f"http://10.0.0.{n}:9000" for n in (1, 2, 3))])
    for _ in range(12):
        pair = await fleet.pair()
        host = pair.leg.worker.spec.url.host
        order = DecodeOrder.from_header(pair.decision.decode_order)
        assert (order.prefill_host, order.addresses[0]) == (host, f"{host}:9000")
        pair.close()
    fleet.nothing_is_left()


async def test_the_load_that_an_engine_reports_counts() -> None:
    fleet = PdFleet()
    fleet.reports(fleet.decodes[0], 50)
    fleet.reports(fleet.decodes[1], 0, usage=0.9)
    fleet.reports(fleet.decodes[2], 0, usage=0.1)
    for _ in range(8):
        pair = await fleet.pair()
        order = DecodeOrder.from_header(pair.decision.decode_order)
        assert order.addresses == (ADDRESSES[2], ADDRESSES[1], ADDRESSES[0])
        pair.close()


async def test_a_reservation_is_seen_by_the_next_request() -> None:
    fleet = PdFleet()
    pairs = [await fleet.pair() for _ in range(6)]
    assert fleet.load == ([2, 2, 2], [2, 2, 2])
    for pair in pairs:
        pair.close()
    fleet.nothing_is_left()


# -- the prefill's request


async def test_both_workers_get_the_same_room_and_the_rest_of_the_body_unchanged() -> None:
    fleet = PdFleet()
    pair = await fleet.pair()
    (post,) = fleet.prefill_client.posts
    assert post.body == with_members(BODY, pair.decision.body_members)
    assert (post.url, post.path) == (PREFILLS[0], "/v1/completions")
    assert post.fields["bootstrap_host"] == "10.0.0.1"
    assert post.fields["bootstrap_port"] == 8998
    assert 0 <= post.fields["bootstrap_room"] < 2**63
    assert (post.connect_seconds, post.answer_seconds) == (1.5, 120.0)
    assert post.keep_bytes == 64 * 1024
    pair.close()


async def test_an_unknown_bootstrap_port_is_null() -> None:
    fleet = PdFleet(port=None)
    (await fleet.pair()).close()
    assert fleet.prefill_client.posts[0].fields["bootstrap_port"] is None


async def test_an_ipv6_bootstrap_host_has_no_brackets() -> None:
    fleet = PdFleet(["http://[2001:db8::1]:8000"], ["http://[2001:db8::1]:9000"])
    pair = await fleet.pair()
    assert fleet.prefill_client.posts[0].fields["bootstrap_host"] == "2001:db8::1"
    order = DecodeOrder.from_header(pair.decision.decode_order)
    assert order.prefill_host == "2001:db8::1"
    lease = fleet.pick(pair)
    assert lease.decision.reason == "same_host"
    assert lease.decision.destinations == ("[2001:db8::1]:9000",)
    lease.close()
    pair.close()
    fleet.nothing_is_left()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", b'{"text":["a","b","c"]}'),
        ("/v1/completions", b'{"prompt":["a","b","c"]}'),
    ],
)
async def test_a_batch_gets_a_room_for_each_prompt(path: str, body: bytes) -> None:
    fleet = PdFleet()
    pair = await fleet.pair(body, path=path)
    fields = fleet.prefill_client.posts[0].fields
    assert len(set(fields["bootstrap_room"])) == 3
    assert fields["bootstrap_host"] == ["10.0.0.1"] * 3
    pair.close()


@pytest.mark.parametrize("rank", [0, 1, 5, 7])
async def test_the_room_carries_the_rank(rank: int) -> None:
    fleet = PdFleet()
    worker = fleet.prefills[1]
    events = KvEvents(host="10.0.0.2", port=5557, block_size=PAGE, dp_size=8)
    worker.spec = msgspec.structs.replace(worker.spec, kv_events=events)

    def choose(_: Sequence[Worker]) -> Chosen:
        return Chosen(worker, "p", "r", dp_rank=rank)

    request = Request(find_endpoint("POST", "/generate"), "m", stream=False, body=b'{"text":"a"}')
    for _ in range(5):
        pair = await fleet.pd.route(request, "m", Choices(choose), NO_TOKENS)
        assert pair is not None
        assert fleet.prefill_client.posts[-1].fields["bootstrap_room"] % 8 == rank
        pair.close()
    fleet.nothing_is_left()


@pytest.mark.parametrize(
    ("authorization", "expected"),
    [(None, "Bearer client"), ("Bearer ours", "Bearer ours")],
)
async def test_the_prefill_has_the_headers_that_decode_has(
    authorization: str | None, expected: str
) -> None:
    fleet = PdFleet(authorization=authorization)
    sent = [("authorization", "Bearer client"), ("x-request-id", "r1"), ("traceparent", "t")]
    (await fleet.pair(headers=sent)).close()
    headers = fleet.prefill_client.posts[0].headers
    assert dict(headers) == {
        "content-type": "application/json",
        "authorization": expected,
        "x-request-id": "r1",
        "traceparent": "t",
    }
    assert len(headers) == 4


async def test_a_client_without_credentials_gets_no_authorization_header() -> None:
    fleet = PdFleet()
    (await fleet.pair()).close()
    assert "authorization" not in dict(fleet.prefill_client.posts[0].headers)


# -- workers that are not there


@pytest.mark.parametrize(
    "error", [EngineUnreachableError("connection refused"), EngineTimeoutError("connect")]
)
async def test_a_refused_connection_leads_to_another_worker_and_another_room(
    error: EngineUnreachableError,
) -> None:
    fleet = PdFleet(threshold=1)
    fleet.prefill_client.refuses[PREFILLS[0]] = error
    for worker, port in zip(fleet.prefills, (8998, None, 9), strict=True):
        worker.spec = msgspec.structs.replace(worker.spec, bootstrap_port=port)
    pair = await fleet.pair()
    first, second = fleet.prefill_client.posts
    assert (first.url, second.url) == (PREFILLS[0], pair.leg.worker.url)
    assert first.url != second.url
    assert second.fields["bootstrap_host"] == pair.leg.worker.spec.url.host
    assert second.fields["bootstrap_port"] == pair.leg.worker.spec.bootstrap_port
    assert first.fields["bootstrap_room"] != second.fields["bootstrap_room"]
    # The decode worker learns about the second one only.
    assert second.body == with_members(BODY, pair.decision.body_members)
    assert second.body.count(b"bootstrap_room") == 1
    assert pair.decision.worker_url == second.url
    assert fleet.prefills[0].breaker.state is BreakerState.OPEN
    assert fleet.rechecked == [fleet.prefills[0]]
    assert fleet.failures("connect") == 1
    assert fleet.outcomes() == {PREFILLS[0]: ["error"]}
    assert fleet.prefills[0].in_flight == 0
    pair.close()
    fleet.nothing_is_left()


async def test_when_all_prefill_workers_refuse_each_was_tried_once() -> None:
    fleet = PdFleet()
    fleet.prefill_client.refuse(*PREFILLS)
    error = await fleet.refused()
    assert (error.status, error.code) == (503, "no_prefill_workers_available")
    assert sorted(post.url for post in fleet.prefill_client.posts) == PREFILLS
    assert len({post.fields["bootstrap_room"] for post in fleet.prefill_client.posts}) == 3
    assert fleet.failures("connect") == 3
    assert fleet.metric("extproc_pd_pairs_total", model="m", outcome="prefill_failed") == 0
    fleet.nothing_is_left()


async def test_the_breaker_of_a_worker_that_refuses_opens() -> None:
    fleet = PdFleet(threshold=1)
    fleet.prefill_client.refuse(*PREFILLS)
    await fleet.refused()
    await fleet.refused()
    assert {worker.breaker.state for worker in fleet.prefills} == {BreakerState.OPEN}
    fleet.clock.tick(30.0)
    fleet.prefill_client.refuses.clear()
    pair = await fleet.pair()
    assert pair.leg.worker.breaker.state is BreakerState.HALF_OPEN
    fleet.prefill_client.calls[-1].respond(200)
    await settle()
    assert pair.leg.worker.breaker.state.name == "CLOSED"
    pair.close()
    fleet.nothing_is_left()


@pytest.mark.parametrize(
    ("side", "code"),
    [("prefill", "no_prefill_workers_available"), ("decode", "no_decode_workers_available")],
)
async def test_without_one_side_nothing_is_sent_to_the_other(side: str, code: str) -> None:
    fleet = PdFleet()
    fleet.leave(*(fleet.prefills if side == "prefill" else fleet.decodes))
    error = await fleet.refused()
    assert (error.status, error.code) == (503, code)
    assert dict(error.headers)["retry-after"] == "1"
    assert fleet.prefill_client.posts == []
    fleet.nothing_is_left()


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_one_side_whose_breakers_are_all_open_is_used_as_the_last_resort(side: str) -> None:
    fleet = PdFleet()
    fleet.trip(*(fleet.prefills if side == "prefill" else fleet.decodes))
    for _ in range(4):
        pair = await fleet.pair()
        lease = fleet.pick(pair)
        lease.close()
        fleet.prefill_client.calls[-1].respond(200)
        await settle()
        pair.close()
    fleet.nothing_is_left()


async def test_a_running_probe_keeps_other_requests_away_on_both_sides() -> None:
    fleet = PdFleet(PREFILLS[:2], DECODES[:2])
    fleet.trip(fleet.prefills[0], fleet.decodes[0])
    fleet.clock.tick(30.0)
    probe = await fleet.pair()
    assert probe.leg.worker is fleet.prefills[0]
    for _ in range(3):
        pair = await fleet.pair()
        assert pair.leg.worker is fleet.prefills[1]
        pair.close()
    probe.close()
    # The client left: the next may probe.
    workers = set()
    for _ in range(2):
        pair = await fleet.pair()
        workers.add(pair.leg.worker)
        pair.close()
    assert workers == set(fleet.prefills)
    fleet.nothing_is_left()


async def test_no_more_prefill_workers_are_tried_when_all_decode_workers_have_vanished() -> None:
    fleet = PdFleet()
    fleet.prefill_client.refuse(PREFILLS[0])

    def choose(candidates: Sequence[Worker]) -> Chosen:
        fleet.leave(*fleet.decodes)
        return Chosen(candidates[0], "p", "r")

    request = Request(find_endpoint("POST", "/v1/completions"), "m", False, BODY)
    with pytest.raises(RouterError, match="no_decode_workers"):
        await fleet.pd.route(request, "m", Choices(choose), NO_TOKENS)
    assert len(fleet.prefill_client.posts) == 1
    fleet.nothing_is_left()


async def test_a_prefill_is_cancelled_when_all_decode_workers_have_vanished() -> None:
    fleet = PdFleet()

    def choose(candidates: Sequence[Worker]) -> Chosen:
        fleet.leave(*fleet.decodes)
        return Chosen(candidates[0], "p", "r")

    request = Request(find_endpoint("POST", "/v1/completions"), "m", False, BODY)
    with pytest.raises(RouterError, match="no_decode_workers"):
        await fleet.pd.route(request, "m", Choices(choose), NO_TOKENS)
    assert [call.cancels for call in fleet.prefill_client.calls] == [1]
    assert fleet.outcomes() == {PREFILLS[0]: ["cancelled"]}
    fleet.nothing_is_left()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", b'{"model":"m","messages":[],"max_tokens":9}'),
        ("/v1/responses", b'{"model":"m","input":"x"}'),
    ],
)
async def test_messages_and_responses_meet_in_a_room(path: str, body: bytes) -> None:
    fleet = PdFleet()
    pair = await fleet.pair(body, path=path)
    (post,) = fleet.prefill_client.posts
    assert (post.path, post.fields["bootstrap_port"]) == (path, 8998)
    assert post.body == with_members(body, pair.decision.body_members)
    pair.close()
    fleet.nothing_is_left()


async def test_a_response_that_follows_another_is_refused_before_any_work() -> None:
    fleet = PdFleet()
    body = b'{"model":"m","input":"x","previous_response_id":"resp_1"}'
    error = await fleet.refused(body, path="/v1/responses")
    assert error.status == 400
    assert "`previous_response_id`" in error.message
    assert fleet.prefill_client.posts == []


async def test_an_endpoint_without_prefill_and_decode_is_refused_before_any_work() -> None:
    fleet = PdFleet()
    error = await fleet.refused(path="/v1/embeddings")
    assert (error.status, error.code) == (400, "bad_request")
    assert fleet.prefill_client.posts == []


async def test_a_request_without_a_visible_body_is_refused() -> None:
    fleet = PdFleet()
    assert (await fleet.refused(b"")).code == "body_mode_unsupported"
    assert fleet.prefill_client.posts == []


# -- requests that end early


async def test_a_deadline_while_connecting_leaves_nothing() -> None:
    fleet = PdFleet(PREFILLS[:1], threshold=1)
    fleet.trip(fleet.prefills[0])
    fleet.clock.tick(30.0)
    fleet.prefill_client.silent.add(PREFILLS[0])
    task = await fleet.waiting()
    assert fleet.load[0] == [1]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    fleet.nothing_is_left()
    assert fleet.outcomes() == {PREFILLS[0]: ["cancelled"]}
    assert fleet.prefills[0].breaker.would_allow(fleet.clock.monotonic())


async def test_an_exception_of_the_client_leaves_nothing() -> None:
    fleet = PdFleet()

    async def post(*_: Any, **__: Any) -> PrefillCall:
        raise RuntimeError("boom")

    fleet.prefill_client.post = post  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="boom"):
        await fleet.pair()
    fleet.nothing_is_left()


async def test_a_pair_ends_with_its_prefill_and_its_stream() -> None:
    fleet = PdFleet()
    pair = await fleet.pair()
    failures: list[RouterError] = []
    pair.on_abort = failures.append
    fleet.prefill_client.calls[0].respond(500)
    await settle()
    assert [error.code for error in failures] == ["prefill_failed"]
    assert fleet.rechecked == [fleet.prefills[0]]
    pair.close()
    fleet.nothing_is_left()


async def test_a_changed_role_aborts_the_prefills_on_the_worker() -> None:
    fleet = PdFleet()
    pairs = [await fleet.pair() for _ in range(3)]
    failures: list[RouterError] = []
    for pair in pairs:
        pair.on_abort = failures.append
    worker = pairs[1].leg.worker
    fleet.pd.role_changed(worker, "prefill", "decode")
    assert [error.status for error in failures] == [502]
    assert [pair.holds_stream for pair in pairs] == [True, False, True]
    labels = {"from": "prefill", "to": "decode"}
    assert fleet.metric("extproc_worker_role_changes_total", **labels) == 1
    for pair in pairs:
        pair.close()
    fleet.nothing_is_left()
    assert fleet.metric("extproc_pd_pairs_total", model="m", outcome="abandoned") == 1
    assert fleet.metric("extproc_pd_pairs_total", model="m", outcome="cancelled") == 2


@pytest.mark.parametrize(
    ("path", "body"),
    [("/generate", b'{"text":1e999}'), ("/v1/completions", b'{"model":"m","prompt":1e999}')],
)
async def test_a_body_that_no_parser_takes_is_left_to_the_engine(path: str, body: bytes) -> None:
    pair = await PdFleet().pair(body, path=path)
    assert b"bootstrap_room" in pair.decision.body_members
    pair.close()
