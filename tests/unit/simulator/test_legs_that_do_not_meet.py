"""Legs that fail, leave or never come: the other leg does not notice; nothing is left."""

import asyncio
import socket
from contextlib import closing
from typing import Any

import aiohttp
import pytest

from .clients import CHAT, Launch, chat
from .pd_clients import GENERATE, SOON_SECONDS, Pair, pair, pd, sided

SOON = {"bootstrap_timeout_seconds": SOON_SECONDS}


async def task(worker: Any, body: Any) -> "asyncio.Task[tuple[int, Any]]":
    """A leg that waits in its room."""
    started = asyncio.create_task(worker.post(GENERATE, body))
    await worker.until(rooms=1)
    return started


@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_leg_alone_gives_up(launch: Launch, mode: str, stream: bool) -> None:
    legs = await pair(launch, SOON, SOON)
    worker = getattr(legs, mode)
    status, answer = await worker.post(GENERATE, legs.body(stream=stream))
    assert status == 500
    assert "KV transfer failed" in answer["error"]["message"]
    stats = await worker.stats()
    assert pd(stats) == (0, 1, 0)
    assert stats["failed"] == 1
    await legs.is_empty()


@pytest.mark.parametrize(
    "fields",
    [
        {"disagg_prefill_dp_rank": 0, "bootstrap_room": 1},
        {"routed_dp_rank": 0, "bootstrap_room": 1},
        {"disagg_prefill_dp_rank": 5, "bootstrap_room": 1},
    ],
)
async def test_legs_on_different_ranks(launch: Launch, fields: dict[str, int]) -> None:
    legs = await pair(launch, SOON | {"dp_size": 2}, SOON)
    answers = await legs.both(legs.body(**fields))
    assert [status for status, _ in answers] == [500, 500]
    for worker in (legs.prefill, legs.decode):
        assert pd(await worker.stats()) == (0, 1, 0)
    await legs.is_empty()


async def test_legs_in_different_rooms(launch: Launch) -> None:
    legs = await pair(launch, SOON, SOON)
    answers = await asyncio.gather(
        legs.prefill.post(GENERATE, legs.body(1)), legs.decode.post(GENERATE, legs.body(2))
    )
    assert [status for status, _ in answers] == [500, 500]
    await legs.is_empty()


async def test_a_batch_fails_when_one_of_its_rooms_stays_empty(launch: Launch) -> None:
    legs = await pair(launch, SOON, SOON)
    both = {"text": ["a", "b"]}
    answers = await asyncio.gather(
        legs.prefill.post(GENERATE, legs.body([1, 2], **both)),
        legs.decode.post(GENERATE, legs.body([1, 3], **both)),
    )
    assert [status for status, _ in answers] == [500, 500]
    for worker in (legs.prefill, legs.decode):
        assert pd(await worker.stats()) == (1, 1, 0)
    await legs.is_empty()


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "no-such-host.invalid", "", "not a host", "http://127.0.0.1", None]
)
async def test_an_unreachable_prefill_worker_is_noticed_at_once(
    launch: Launch, host: str | None
) -> None:
    legs = await pair(launch)
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    body = legs.body(bootstrap_host=host, bootstrap_port=port)
    async with asyncio.timeout(30):
        status, answer = await legs.decode.post(GENERATE, body)
    assert status == 500
    assert "no prefill worker at" in answer["error"]["message"]
    assert pd(await legs.decode.stats()) == (0, 0, 0)
    await legs.is_empty()


async def test_a_port_of_something_else(launch: Launch) -> None:
    legs = await pair(launch)
    body = legs.body(bootstrap_port=legs.decode.simulator.port)
    assert (await legs.decode.post(GENERATE, body))[0] == 500


async def test_a_batch_fails_when_one_of_its_rooms_is_unreachable(launch: Launch) -> None:
    legs = await pair(launch)
    ports = [legs.prefill.simulator.bootstrap_port, legs.decode.simulator.port]
    body = legs.body([1, 2], text=["a", "b"], bootstrap_port=ports)
    assert (await legs.decode.post(GENERATE, body))[0] == 500
    await legs.is_empty()


@pytest.mark.parametrize("how", ["leaves", "aborted"])
@pytest.mark.parametrize("leaving", ["prefill", "decode"])
async def test_the_other_leg_does_not_notice_a_failure(
    launch: Launch, leaving: str, how: str
) -> None:
    legs = await pair(launch, {"prefill_tokens_per_second": 0.001})
    workers = (legs.prefill, legs.decode)
    goes, stays = workers if leaving == "prefill" else workers[::-1]
    going = await task(goes, legs.body(rid="r-1-a"))
    staying = await task(stays, legs.body(rid="r-1-b"))
    if how == "leaves":
        going.cancel()
        await asyncio.wait([going])
    else:
        assert (await goes.post("/abort_request", {"rid": "r-1"}))[0] == 200
        _, answer = await going
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert answer["meta_info"]["completion_tokens"] == 0
    stats = await goes.until(rooms=0, running=0, waiting=0, aborted=1)
    assert pd(stats) == (0, 0, 1)
    done, _ = await asyncio.wait([staying], timeout=0.1)
    assert not done
    assert (await stays.stats())["rooms"] == 1
    await stays.post("/abort_request", {"abort_all": True})
    await staying
    await legs.is_empty()


async def test_an_abort_of_a_prefill_that_is_done(launch: Launch) -> None:
    legs = await pair(launch)
    waiting = await task(legs.prefill, legs.body(rid="mine"))
    await legs.prefill.until(running=1)
    await legs.prefill.post("/abort_request", {"rid": "mine"})
    _, answer = await waiting
    assert answer["meta_info"]["finish_reason"]["type"] == "abort"
    assert pd(await legs.prefill.stats()) == (0, 0, 1)
    prefill, decode = await legs.both(legs.body())  # the room is free again
    assert (prefill[0], decode[0]) == (200, 200)


async def test_two_prefill_legs_in_one_room(launch: Launch) -> None:
    legs = await pair(launch)
    first = await task(legs.prefill, legs.body())
    status, answer = await legs.prefill.post(GENERATE, legs.body())
    assert status == 400
    assert "room 7" in answer["error"]["message"]
    assert (await legs.decode.post(GENERATE, legs.body()))[0] == 200
    assert (await first)[0] == 200
    assert (await legs.prefill.post(GENERATE, legs.body([1, 1], text=["a", "b"])))[0] == 400
    await legs.is_empty()


async def test_the_decode_leg_does_not_notice_a_dead_prefill_worker(launch: Launch) -> None:
    legs = await pair(launch, decode=SOON)
    waiting = await task(legs.decode, legs.body())
    await legs.prefill.simulator.stop()
    status, answer = await waiting
    assert status == 500
    assert "no partner came" in answer["error"]["message"]
    assert pd(await legs.decode.stats()) == (0, 1, 0)


async def test_a_prefill_worker_that_comes_back_is_met(launch: Launch) -> None:
    legs = await pair(launch)
    port = legs.prefill.simulator.bootstrap_port
    waiting = await task(legs.decode, legs.body())
    await legs.prefill.simulator.stop()
    again = await launch(sided("prefill", disaggregation_bootstrap_port=port))
    assert (await again.post(GENERATE, legs.body()))[0] == 200
    assert (await waiting)[0] == 200


async def test_no_role_is_switched_while_a_room_is_open(launch: Launch) -> None:
    legs = await pair(launch)
    for worker, role in ((legs.decode, "prefill"), (legs.prefill, "decode")):
        waiting = await task(worker, legs.body())
        assert (await worker.post("/pd_role_switch", {"new_role": role}))[0] == 400
        waiting.cancel()
        await worker.until(rooms=0, running=0, waiting=0)
        assert (await worker.post("/pd_role_switch", {"new_role": role}))[0] == 200


async def test_a_taken_bootstrap_port_is_an_error(launch: Launch) -> None:
    legs = await pair(launch)
    port = legs.prefill.simulator.bootstrap_port
    with pytest.raises(OSError, match=f"disaggregation_bootstrap_port: 127.0.0.1:{port}"):
        await launch(sided("prefill", disaggregation_bootstrap_port=port, kv_events_port=0))


async def test_requests_that_wait_for_kv_are_load(launch: Launch) -> None:
    legs = await pair(launch)
    waiting = await task(legs.decode, legs.body())
    _, loads = await legs.decode.get("/v1/loads")
    (load,) = loads["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (0, 1)
    assert load["num_waiting_uncached_tokens"] == 0
    waiting.cancel()
    await legs.is_empty()


async def faulty(launch: Launch, faults: dict[str, Any]) -> Pair:
    """The next prefill leg fails this way; the decode leg has a short time-out."""
    legs = await pair(launch, decode=SOON)
    await legs.prefill.post("/simulator/faults", {"count": 1, **faults})
    return legs


async def test_a_prefill_leg_that_is_refused_after_a_while(launch: Launch) -> None:
    legs = await faulty(launch, {"hang": 0.05, "status": 500})
    prefill, decode = await legs.both(legs.body())
    assert (prefill[0], decode[0]) == (500, 500)
    assert "no partner came" in decode[1]["error"]["message"]
    prefill, decode = await legs.both(legs.body())
    assert (prefill[0], decode[0]) == (200, 200)


@pytest.mark.parametrize("reset", [False, True])
async def test_a_prefill_leg_whose_connection_breaks(launch: Launch, reset: bool) -> None:
    legs = await faulty(launch, {"hang": 0.05, "die_before_headers": True, "reset": reset})
    decode = asyncio.ensure_future(legs.decode.post(GENERATE, legs.body()))
    with pytest.raises(aiohttp.ClientConnectionError):
        await legs.prefill.post(GENERATE, legs.body())
    assert (await decode)[0] == 500
    await legs.is_empty()


async def test_a_prefill_leg_that_breaks_after_the_transfer(launch: Launch) -> None:
    legs = await faulty(launch, {"die_after_tokens": 0})
    decode = asyncio.ensure_future(legs.decode.post(GENERATE, legs.body()))
    with pytest.raises(aiohttp.ClientConnectionError):
        await legs.prefill.post(GENERATE, legs.body())
    assert (await decode)[0] == 200
    await legs.is_empty()


async def test_a_prefill_leg_that_hangs(launch: Launch) -> None:
    legs = await faulty(launch, {"hang": True})
    hanging = asyncio.ensure_future(legs.prefill.post(GENERATE, legs.body()))
    assert (await legs.decode.post(GENERATE, legs.body()))[0] == 500
    assert not hanging.done()
    hanging.cancel()
    await legs.prefill.until(aborted=1)
    await legs.is_empty()


async def test_a_decode_leg_that_breaks_in_mid_stream(launch: Launch) -> None:
    legs = await pair(launch)
    body = chat(stream=True, bootstrap_room=1, max_tokens=5)
    body |= {name: legs.body()[name] for name in ("bootstrap_host", "bootstrap_port")}
    headers = {"x-simulator-fault": "die-after-tokens=2"}
    prefill = asyncio.ensure_future(legs.prefill.post(CHAT, body | {"stream": False}))
    async with legs.decode.session.post(CHAT, json=body, headers=headers) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert (await prefill)[0] == 200
    await legs.is_empty()
