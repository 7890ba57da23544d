"""Two legs of a request that meet."""

import asyncio
from typing import Any

import aiohttp
import pytest

from .clients import CHAT, FOREVER_MILLISECONDS, Launch, chat, events
from .kv_clients import Connect
from .pd_clients import COMPLETIONS, GENERATE, pair, pd, sided


@pytest.mark.parametrize("first", ["prefill", "decode"])
async def test_either_leg_may_come_first(launch: Launch, first: str) -> None:
    legs = await pair(launch)
    workers = [legs.prefill, legs.decode] if first == "prefill" else [legs.decode, legs.prefill]
    early = asyncio.ensure_future(workers[0].post(GENERATE, legs.body()))
    await workers[0].until(rooms=1)
    done, _ = await asyncio.wait([early], timeout=0.05)
    assert not done
    late = await workers[1].post(GENERATE, legs.body())
    for worker, (status, answer) in zip(workers, (await early, late), strict=True):
        tokens = 1 if worker is legs.prefill else 3
        assert (status, answer["meta_info"]["completion_tokens"]) == (200, tokens)
        assert answer["meta_info"]["finish_reason"]["type"] == "length"
        assert pd(await worker.stats()) == (1, 0, 0)
    await legs.is_empty()


async def test_the_journals_of_both_legs_can_be_compared(launch: Launch) -> None:
    legs = await pair(launch)
    body = legs.body(5, rid="r-5", disagg_prefill_dp_rank=0)
    await legs.both(body)
    for worker, role in ((legs.prefill, "prefill"), (legs.decode, "decode")):
        (entry,) = (await worker.stats())["requests"]
        assert (entry["rid"], entry["role"], entry["outcome"]) == ("r-5", role, "completed")
        for name in ("bootstrap_host", "bootstrap_port", "bootstrap_room"):
            assert entry[name] == body[name]
        assert entry["disagg_prefill_dp_rank"] == 0


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, GENERATE])
async def test_both_legs_stream(launch: Launch, path: str) -> None:
    legs = await pair(launch)
    body = legs.body(stream=True, prompt="a", max_tokens=4, **chat())

    async def tokens(worker: Any) -> int:
        async with worker.session.post(path, json=body) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            assert events(await response.read())[-1] == "[DONE]"
        entry: dict[str, int] = (await worker.stats())["requests"][0]
        return entry["completion_tokens"]

    async def tokens_of_both() -> tuple[int, int]:
        prefill, decode = await asyncio.gather(tokens(legs.prefill), tokens(legs.decode))
        return prefill, decode

    wanted = 3 if path == GENERATE else 4
    assert (await tokens_of_both()) == (1, wanted)


async def test_a_stream_begins_after_the_transfer(launch: Launch) -> None:
    legs = await pair(launch)

    async def headers(worker: Any) -> int:
        async with worker.session.post(GENERATE, json=legs.body(stream=True)) as response:
            await response.read()
            return int(response.status)

    early = asyncio.ensure_future(headers(legs.decode))
    await legs.decode.until(rooms=1, waiting=1)
    done, _ = await asyncio.wait([early], timeout=0.05)
    assert not done
    assert (await headers(legs.prefill), await early) == (200, 200)


async def test_the_kv_is_sent_when_the_prefill_is_done(launch: Launch) -> None:
    legs = await pair(launch, {"prefill_tokens_per_second": 0.001})
    tasks = [
        asyncio.ensure_future(worker.post(GENERATE, legs.body()))
        for worker in (legs.prefill, legs.decode)
    ]
    await legs.prefill.until(running=1, rooms=1)
    await legs.decode.until(waiting=1, rooms=1)
    done, _ = await asyncio.wait(tasks, timeout=0.1)
    assert not done
    for task in tasks:
        task.cancel()
    await legs.is_empty()


async def test_the_decode_side_spends_no_time_on_prefill(launch: Launch) -> None:
    legs = await pair(launch, decode={"prefill_tokens_per_second": 0.001})
    async with asyncio.timeout(20):
        for room in range(2):
            _, (status, answer) = await legs.both(legs.body(room))
            assert (status, answer["meta_info"]["completion_tokens"]) == (200, 3)
    # The prompt of the first is in its own cache: two pages of 64 of 130 bytes.
    assert answer["meta_info"]["cached_tokens"] == 128


async def test_the_decode_side_takes_its_own_time_for_tokens(launch: Launch) -> None:
    legs = await pair(launch, decode={"decode_milliseconds_per_token": FOREVER_MILLISECONDS})
    task = asyncio.ensure_future(legs.decode.post(GENERATE, legs.body()))
    assert (await legs.prefill.post(GENERATE, legs.body()))[0] == 200
    await legs.decode.until(rooms=0, running=1, tokens_generated=1)
    task.cancel()
    await legs.is_empty()
    assert pd(await legs.decode.stats()) == (1, 0, 0)  # aborted after the transfer


async def test_both_sides_publish_what_they_hold(launch: Launch, connect: Connect) -> None:
    legs = await pair(launch, {"kv_events_port": 0}, {"kv_events_port": 0})
    clients = [connect(legs.prefill), connect(legs.decode)]
    await legs.both(legs.body())
    stored = []
    for client in clients:
        batches = await client.replay()
        stored.append([event for batch in batches for event in batch.events][1:])
    assert stored[0] == stored[1]
    assert stored[0]


async def test_the_prefill_side_reuses_its_cache(launch: Launch) -> None:
    legs = await pair(launch)
    for room, cached in ((1, 0), (2, 128)):
        (_, answer), _ = await legs.both(legs.body(room))
        assert answer["meta_info"]["cached_tokens"] == cached


@pytest.mark.parametrize(
    ("fields", "rank"),
    [
        ({"bootstrap_room": 6}, 2),
        ({"bootstrap_room": 2**63 - 1}, 3),
        ({"bootstrap_room": 6, "routed_dp_rank": 1, "disagg_prefill_dp_rank": 1}, 1),
    ],
)
async def test_the_room_names_the_rank(launch: Launch, fields: dict[str, Any], rank: int) -> None:
    legs = await pair(launch, {"dp_size": 4}, {"dp_size": 2})
    prefill, decode = await legs.both(legs.body(**fields))
    assert (prefill[0], decode[0]) == (200, 200)
    assert (await legs.prefill.stats())["requests"][0]["rank"] == rank


@pytest.mark.parametrize("stream", [False, True])
async def test_a_batch_uses_one_room_for_each_prompt(launch: Launch, stream: bool) -> None:
    legs = await pair(launch, {"dp_size": 2})
    rooms, port = [4, 5, 8], legs.prefill.simulator.bootstrap_port
    body = legs.body(
        rooms,
        text=["a" * 70, "b" * 70, "c" * 70],
        bootstrap_host=["127.0.0.1"] * 3,
        bootstrap_port=[port] * 3,
    )
    early = asyncio.ensure_future(legs.prefill.post(GENERATE, body))
    stats = await legs.prefill.until(rooms=3, running=2)  # rooms 4 and 8 on rank 0
    async with legs.decode.session.post(GENERATE, json=body | {"stream": stream}) as response:
        assert response.status == 200
        await response.read()
    status, answer = await early
    assert status == 200
    assert [item["meta_info"]["completion_tokens"] for item in answer] == [1, 1, 1]
    for worker in (legs.prefill, legs.decode):
        stats = await worker.stats()
        assert pd(stats) == (3, 0, 0)
        assert stats["requests"][0]["bootstrap_room"] == rooms
    assert [cache["gpu_tokens"] for cache in (await legs.prefill.stats())["caches"]] == [128, 64]
    await legs.is_empty()


async def test_several_outputs_of_a_prompt_share_its_room(launch: Launch) -> None:
    legs = await pair(launch)
    prefill, decode = await legs.both(legs.body(prompt="a", n=2, max_tokens=3), COMPLETIONS)
    assert [len(answer["choices"]) for _, answer in (prefill, decode)] == [2, 2]


async def test_a_port_that_is_not_named_is_the_decode_workers_own(launch: Launch) -> None:
    prefill = await launch(sided("prefill"))
    port = prefill.simulator.bootstrap_port
    decode = await launch(sided("decode", disaggregation_bootstrap_port=port))
    body = chat(bootstrap_host="localhost", bootstrap_port=None, bootstrap_room=1)
    answers = await asyncio.gather(prefill.post(CHAT, body), decode.post(CHAT, body))
    assert [status for status, _ in answers] == [200, 200]


async def test_many_legs_at_once(launch: Launch) -> None:
    legs = await pair(launch, {"max_running_requests": 8, "dp_size": 3}, {"dp_size": 2})
    answers = await asyncio.gather(*(legs.both(legs.body(room)) for room in range(150)))
    assert {status for both in answers for status, _ in both} == {200}
    for worker in (legs.prefill, legs.decode):
        assert pd(await worker.stats()) == (150, 0, 0)
    await legs.is_empty()


async def test_roles_are_exchanged(launch: Launch) -> None:
    legs = await pair(launch)
    port = legs.prefill.simulator.bootstrap_port
    switch = "/pd_role_switch"
    assert (await legs.prefill.post(switch, {"new_role": "decode"}))[0] == 200
    with pytest.raises(OSError, match=r"refused|failed"):
        await asyncio.open_connection("127.0.0.1", port)
    assert (await legs.decode.post(switch, {"new_role": "prefill"}))[0] == 200
    legs.prefill, legs.decode = legs.decode, legs.prefill
    _, info = await legs.prefill.get("/server_info")
    assert info["disaggregation_mode"] == "prefill"
    assert info["disaggregation_bootstrap_port"] == legs.prefill.simulator.bootstrap_port
    prefill, decode = await legs.both(legs.body())
    assert prefill[1]["meta_info"]["completion_tokens"] == 1
    assert decode[1]["meta_info"]["completion_tokens"] == 3
    assert (await legs.decode.post(switch, {"new_role": "prefill"}))[0] == 200
    assert legs.decode.simulator.bootstrap_port == port


async def test_a_role_whose_port_is_taken_is_not_taken_on(launch: Launch) -> None:
    legs = await pair(launch)
    port = legs.prefill.simulator.bootstrap_port
    other = await launch(sided("decode", disaggregation_bootstrap_port=port))
    status, answer = await other.post("/pd_role_switch", {"new_role": "prefill"})
    assert status == 500
    assert "disaggregation_bootstrap_port" in answer["error"]["message"]
    assert (await other.get("/server_info"))[1]["disaggregation_mode"] == "decode"


async def test_a_restart_keeps_the_bootstrap_port(launch: Launch) -> None:
    legs = await pair(launch)
    port = legs.prefill.simulator.bootstrap_port
    early = asyncio.ensure_future(legs.prefill.post(GENERATE, legs.body()))
    await legs.prefill.until(rooms=1)
    await legs.prefill.simulator.restart()
    with pytest.raises(aiohttp.ClientError):
        await early
    assert legs.prefill.simulator.bootstrap_port == port
    prefill, decode = await legs.both(legs.body())
    assert (prefill[0], decode[0]) == (200, 200)
    await legs.is_empty()
