"""With nixl, decode begins with the answer of the prefill. And prompts without a prefill worker."""

import asyncio
import json
from typing import Any

import pytest

from extproc.errors import RouterError
from extproc.routing.json_members import with_members
from extproc.routing.lease import Lease
from extproc.routing.pd.decode_order import DecodeOrder
from extproc.routing.pd.pair import Pair
from extproc.workers.circuit_breaker import BreakerState
from extproc.workers.engine_calls import EngineTimeoutError, EngineUnreachableError
from tests.fakes import settle
from tests.unit.routing.pd.pd_fleet import (
    ADDRESSES,
    BODY,
    DECODES,
    KV,
    PREFILLS,
    VIA,
    PdFleet,
)

# -- nixl

PREFILL_MEMBERS = (
    b'"stream":false,"stream_options":null,"max_tokens":1,"max_completion_tokens":1,'
    b'"min_tokens":0,"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,'
    b'"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)
AGENT_BODIES = {
    "/v1/messages": b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":9}',
    "/v1/responses": b'{"model":"m","input":"x"}',
}


async def answered(task: "asyncio.Task[Lease | Pair]") -> Pair:
    pair = await task
    assert isinstance(pair, Pair)
    return pair


def nixl(**changes: Any) -> PdFleet:
    return PdFleet(protocols={"m": "nixl"}, **changes)


async def failed(task: "asyncio.Task[Lease | Pair]") -> RouterError:
    with pytest.raises(RouterError) as caught:
        await task
    return caught.value


@pytest.mark.parametrize("inline", [False, True])
async def test_nixl_waits_for_the_prefill_and_passes_its_answer_on(inline: bool) -> None:
    fleet = nixl(inline=inline)
    task = await fleet.waiting()
    (post,) = fleet.prefill_client.posts
    assert post.body == with_members(BODY, PREFILL_MEMBERS)
    assert (post.fields["max_tokens"], post.fields["stream"]) == (1, False)
    assert "bootstrap_room" not in post.fields
    assert post.keep_bytes == 1024 * 1024
    assert fleet.load == ([1, 0, 0], [0, 0, 0])
    fleet.prefill_client.calls[0].respond(200, b'{"kv_transfer_params":%b,"choices":[]}' % KV)
    pair = await answered(task)
    assert pair.decision.body_members == b'"kv_transfer_params":' + KV
    assert not pair.holds_stream
    assert fleet.load[0] == [0, 0, 0]
    assert sum(fleet.load[1]) == 1
    assert fleet.outcomes() == {PREFILLS[0]: ["success"]}
    assert (pair.decision.destinations == ()) != inline
    pair.responded(200, pair.decision.destinations[0] if inline else ADDRESSES[0], VIA, False)
    pair.close()
    fleet.nothing_is_left()
    assert fleet.metric("extproc_pd_pairs_total", model="m", outcome="ok") == 1


async def test_nixl_replaces_a_member_that_the_client_sent() -> None:
    fleet = nixl()
    body = b'{"model":"m","max_tokens":900,"stream":true,"kv_transfer_params":{"a":1}}'
    task = asyncio.create_task(fleet.start(body, stream=True))
    await settle()
    fields = fleet.prefill_client.posts[0].fields
    assert (fields["max_tokens"], fields["stream"]) == (1, False)
    assert fields["kv_transfer_params"]["do_remote_decode"] is True
    fleet.prefill_client.calls[0].respond(200, b'{"kv_transfer_params":%b}' % KV)
    pair = await answered(task)
    assert json.loads(with_members(body, pair.decision.body_members)) == {
        "model": "m",
        "max_tokens": 900,
        "stream": True,
        "kv_transfer_params": json.loads(KV),
    }
    pair.close()


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("body", [b"its words", b'{"kv_transfer_params":%b}' % KV])
async def test_nixl_a_4xx_reaches_the_client_in_the_engines_words(status: int, body: bytes) -> None:
    fleet = nixl(threshold=1)
    task = await fleet.waiting()
    fleet.prefill_client.calls[0].respond(status, body)
    error = await failed(task)
    assert (error.status, error.code, error.body) == (status, "prefill_refused", body)
    assert fleet.outcomes() == {PREFILLS[0]: ["success"]}
    assert fleet.failures("status_4xx") == 1
    assert fleet.rechecked == [fleet.prefills[0]]
    fleet.nothing_is_left()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (500, "status_5xx"),
        (503, "status_5xx"),
        (200, "no_kv"),
        (204, "no_kv"),
        (307, "no_kv"),
        (EngineTimeoutError(""), "timeout"),
        (EngineUnreachableError(""), "broken"),
    ],
)
async def test_nixl_any_other_failure_is_the_workers_fault(
    answer: int | EngineUnreachableError, reason: str
) -> None:
    fleet = nixl(threshold=1)
    task = await fleet.waiting()
    (call,) = fleet.prefill_client.calls
    if isinstance(answer, int):
        call.respond(answer, b'{"kv_transfer_params":null}')
    else:
        call.fail(answer)
    error = await failed(task)
    assert (error.status, error.code, error.body) == (502, "prefill_failed", None)
    # What the worker answered with 5xx may be the fault of the request.
    assert (fleet.prefills[0].breaker.state is BreakerState.OPEN) is (reason != "status_5xx")
    assert fleet.outcomes() == {PREFILLS[0]: ["busy" if answer == 503 else "error"]}
    assert fleet.failures(reason) == 1
    # It was sent once: the prefill may have begun there.
    assert len(fleet.prefill_client.posts) == 1
    fleet.nothing_is_left()


async def test_nixl_a_refused_connection_leads_to_another_worker() -> None:
    fleet = nixl()
    fleet.prefill_client.refuse(PREFILLS[0])
    task = await fleet.waiting()
    assert len(fleet.prefill_client.posts) == 2
    fleet.prefill_client.calls[0].respond(200, b'{"kv_transfer_params":%b}' % KV)
    pair = await answered(task)
    order = DecodeOrder.from_header(pair.decision.decode_order)
    assert order.prefill_host == pair.leg.worker.spec.url.host != "10.0.0.1"
    pair.close()
    fleet.nothing_is_left()


async def test_nixl_a_client_that_leaves_while_the_prefill_runs_ends_it() -> None:
    fleet = nixl(threshold=1)
    fleet.trip(*fleet.prefills)
    fleet.clock.tick(30.0)
    task = await fleet.waiting()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert fleet.prefill_client.calls[0].cancels >= 1
    assert fleet.outcomes() == {PREFILLS[0]: ["cancelled"]}
    assert fleet.prefills[0].breaker.would_allow(fleet.clock.monotonic())
    fleet.nothing_is_left()


async def test_nixl_no_decode_worker_is_left_when_the_prefill_is_over() -> None:
    fleet = nixl()
    task = await fleet.waiting()
    fleet.leave(*fleet.decodes)
    fleet.prefill_client.calls[0].respond(200, b'{"kv_transfer_params":%b}' % KV)
    assert (await failed(task)).code == "no_decode_workers_available"
    assert fleet.outcomes() == {PREFILLS[0]: ["success"]}
    fleet.nothing_is_left()


# -- prompts that a decode worker holds almost completely

# 400 tokens, one a character: far more than what a policy takes as equal.
TEXT = "".join(chr(33 + n * 7 % 90) for n in range(400))


@pytest.mark.parametrize(
    ("held", "least", "alone"),
    [
        # 396 of 400 tokens are held and spare prefill: 4 are missing.
        (396, 5, True),
        (396, 4, False),
        (396, 0, False),
        # The last page of a prompt that is held completely is computed nevertheless.
        (400, 5, True),
        (400, 4, False),
        # Nothing is held: 400 are missing.
        (0, 401, True),
        (0, 400, False),
    ],
)
async def test_a_prompt_that_lacks_little_goes_to_decode_alone(
    held: int, least: int, alone: bool
) -> None:
    fleet = nixl(min_ttft=True, min_prefill_tokens={"m": least})
    for worker in (*fleet.prefills, *fleet.decodes):
        fleet.hold("", worker)
    if held:
        fleet.hold(TEXT[:held], fleet.decodes[1])
    body = json.dumps({"model": "m", "prompt": TEXT}).encode()
    task = asyncio.create_task(fleet.start(body))
    await settle()
    if alone:
        lease = await task
        assert isinstance(lease, Lease)
        assert fleet.prefill_client.posts == []
        if held:
            assert lease.decision.destinations[0] == ADDRESSES[1]
        assert set(lease.decision.destinations) <= set(ADDRESSES)
        assert lease.decision.body_members == b""
        assert lease.decision.decode_order == ""
        assert sum(fleet.load[1]) == 1
        lease.close()
    else:
        assert len(fleet.prefill_client.posts) == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert fleet.metric("extproc_pd_decode_alone_total", model="m") == int(alone)
    fleet.nothing_is_left()


@pytest.mark.parametrize("min_ttft", [True, False])
async def test_without_tokens_a_prefill_worker_is_always_used(min_ttft: bool) -> None:
    fleet = PdFleet(min_ttft=min_ttft, min_prefill_tokens={"m": 1000})
    body = b'{"model":"m","prompt":""}' if min_ttft else BODY
    pair = await fleet.pair(body)
    assert len(fleet.prefill_client.posts) == 1
    pair.close()
    fleet.nothing_is_left()


async def test_the_decision_shows_the_pages_of_the_prefill_worker() -> None:
    fleet = PdFleet(min_ttft=True)
    for worker in fleet.prefills:
        fleet.hold("", worker)
    fleet.hold(TEXT[:200], fleet.prefills[2])
    pair = await fleet.pair(json.dumps({"model": "m", "prompt": TEXT}).encode())
    assert pair.leg.worker is fleet.prefills[2]
    assert (pair.decision.cached_tokens, pair.decision.total_tokens) == (200, 400)
    (rank,) = fleet.ranks.of(fleet.prefills[2])
    assert rank.load.in_flight == 1
    pair.close()
    assert rank.load.in_flight == 0
    fleet.nothing_is_left()


@pytest.mark.parametrize(
    "answer",
    [200, 500, EngineUnreachableError("x"), EngineTimeoutError("x")],
    ids=["no_kv", "500", "broken", "timeout"],
)
async def test_nixl_any_failure_makes_the_service_recheck_the_worker(
    answer: int | EngineUnreachableError,
) -> None:
    fleet = nixl()
    task = await fleet.waiting()
    if isinstance(answer, int):
        fleet.prefill_client.calls[0].respond(answer, b"{}")
    else:
        fleet.prefill_client.calls[0].fail(answer)
    await failed(task)
    assert fleet.rechecked == [fleet.prefills[0]]


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","prompt":["x","y"]}',
        b'{"model":"m","prompt":[[1,2],[3]]}',
        b'{"model":"m","prompt":"x","n":2}',
    ],
)
async def test_what_vllm_cannot_hand_over_goes_to_a_decode_worker_alone(body: bytes) -> None:
    fleet = nixl()
    lease = await fleet.start(body)
    assert isinstance(lease, Lease)
    assert lease.decision.worker_url in DECODES
    assert lease.decision.body_members == b""
    assert fleet.prefill_client.posts == []
    assert fleet.metric("extproc_pd_decode_alone_total", model="m") == 1
    lease.close()
    fleet.nothing_is_left()


async def test_a_batch_of_one_prompt_is_handed_over() -> None:
    fleet = nixl()
    task = asyncio.create_task(fleet.start(b'{"model":"m","prompt":["x"]}'))
    await settle()
    fleet.prefill_client.calls[0].respond(200, b'{"kv_transfer_params":%b}' % KV)
    (await answered(task)).close()


async def test_sglang_is_not_asked_for_several_answers() -> None:
    fleet = PdFleet()
    with pytest.raises(RouterError) as caught:
        await fleet.start(b'{"model":"m","prompt":"x","n":2}')
    assert caught.value.status == 400
    assert "`n`" in caught.value.message
    assert fleet.prefill_client.posts == []
    fleet.nothing_is_left()


@pytest.mark.parametrize("path", AGENT_BODIES)
async def test_nixl_hands_over_messages_and_responses(path: str) -> None:
    fleet = nixl()
    task = asyncio.create_task(fleet.start(AGENT_BODIES[path], path=path))
    await settle()
    (post,) = fleet.prefill_client.posts
    assert post.path == path
    assert post.fields["kv_transfer_params"]["do_remote_decode"] is True
    fleet.prefill_client.calls[0].respond(200, b'{"kv_transfer_params":%b}' % KV)
    pair = await answered(task)
    assert pair.decision.body_members == b'"kv_transfer_params":' + KV
    pair.close()
    fleet.nothing_is_left()


@pytest.mark.parametrize("path", AGENT_BODIES)
async def test_a_vllm_that_does_not_know_the_member_lets_a_decode_worker_serve_alone(
    path: str,
) -> None:
    fleet = nixl()
    body = AGENT_BODIES[path]
    task = asyncio.create_task(fleet.start(body, path=path))
    await settle()
    fleet.prefill_client.calls[0].respond(200, b'{"content":[]}')
    alone = await task
    assert isinstance(alone, Lease)
    assert alone.decision.worker_url in DECODES
    assert alone.decision.body_members == b""
    assert fleet.outcomes()[PREFILLS[0]] == ["success"]
    # For a minute no prefill worker computes in vain.
    again = await fleet.start(body, path=path)
    assert isinstance(again, Lease)
    assert len(fleet.prefill_client.posts) == 1
    assert fleet.metric("extproc_pd_decode_alone_total", model="m") == 2
    alone.close()
    again.close()
    await fleet.clock.advance(61)
    task = asyncio.create_task(fleet.start(body, path=path))
    await settle()
    fleet.prefill_client.calls[1].respond(200, b'{"kv_transfer_params":%b}' % KV)
    (await answered(task)).close()
    fleet.nothing_is_left()
