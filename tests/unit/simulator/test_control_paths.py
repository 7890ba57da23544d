"""Health, introspection, load and statistics."""

import asyncio

import pytest

from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings

from .clients import CHAT, Launch, SimulatedWorker, chat, endless


async def test_health(worker: SimulatedWorker) -> None:
    assert (await worker.get("/health"))[0] == 200
    assert (await worker.get("/health_generate"))[0] == 200
    assert (await worker.stats())["received"] == 0


async def test_server_info(launch: Launch) -> None:
    settings = SimulatorSettings(model="m", page_size=32, dp_size=4, disaggregation_mode="decode")
    worker = await launch(settings)
    status, info = await worker.get("/server_info")
    assert status == 200
    assert info["served_model_name"] == "m"
    assert (info["page_size"], info["dp_size"]) == (32, 4)
    assert info["disaggregation_mode"] == "decode"
    assert info["kv_events"] is None
    assert len(info["internal_states"]) == 4
    assert info["port"] == worker.simulator.port
    assert (await worker.get("/get_server_info"))[1] == info


async def test_roles_are_switched_while_nothing_runs(launch: Launch) -> None:
    settings = endless(disaggregation_mode="prefill", disaggregation_bootstrap_port=0)
    worker = await launch(settings)
    _, info = await worker.get("/server_info")
    assert info["disaggregation_mode"] == "prefill"
    assert info["disaggregation_bootstrap_port"] == worker.simulator.bootstrap_port != 0
    task = asyncio.ensure_future(worker.post(CHAT, chat(bootstrap_room=1)))
    await worker.until(running=1, rooms=1)
    assert (await worker.post("/pd_role_switch", {"new_role": "decode"}))[0] == 400
    task.cancel()
    await worker.until(running=0)
    assert (await worker.post("/pd_role_switch", {"new_role": "decode"}))[0] == 200
    assert (await worker.get("/server_info"))[1]["disaggregation_mode"] == "decode"
    assert (await worker.post("/pd_role_switch", {"new_role": "null"}))[0] == 400
    await worker.simulator.restart()
    assert (await worker.get("/server_info"))[1]["disaggregation_mode"] == "prefill"


async def test_a_plain_worker_has_no_role_to_switch(worker: SimulatedWorker) -> None:
    assert (await worker.post("/pd_role_switch", {"new_role": "decode"}))[0] == 400


@pytest.mark.parametrize(
    ("body", "headers", "rank"),
    [
        ({"routed_dp_rank": 2}, {}, 2),
        ({"data_parallel_rank": 1}, {}, 1),
        ({"routed_dp_rank": 0, "data_parallel_rank": 1}, {}, 0),
        ({"routed_dp_rank": 0}, {"X-Data-Parallel-Rank": "2"}, 2),
        ({"routed_dp_rank": 3}, {}, None),
        ({"routed_dp_rank": -1}, {}, None),
        ({}, {"X-Data-Parallel-Rank": "3"}, None),
        ({}, {"X-Data-Parallel-Rank": "one"}, None),
    ],
)
async def test_a_rank_is_asked_for(
    launch: Launch, body: dict[str, int], headers: dict[str, str], rank: int | None
) -> None:
    worker = await launch(endless(dp_size=3))
    task = asyncio.ensure_future(worker.post(CHAT, chat() | body, headers=headers))
    if rank is None:
        assert (await task)[0] == 400
        return
    await worker.until(running=1)
    _, loads = await worker.get("/v1/loads")
    assert [load["num_running_reqs"] for load in loads["loads"]] == [
        int(number == rank) for number in range(3)
    ]
    task.cancel()
    await worker.until(running=0)


async def test_a_worker_without_server_info(launch: Launch) -> None:
    worker = await launch(SimulatorSettings(no_server_info=True))
    for path in ("/server_info", "/get_server_info", "/v1/loads"):
        assert (await worker.get(path))[0] == 404
    assert (await worker.get("/v1/models"))[0] == 200


async def test_a_worker_that_starts_late(launch: Launch) -> None:
    worker = await launch(SimulatorSettings(startup_delay_seconds=3600))
    for path in ("/health", "/health_generate", "/server_info"):
        assert (await worker.get(path))[0] == 503
    assert (await worker.post(CHAT, chat()))[0] == 503


async def test_a_worker_that_has_started(launch: Launch) -> None:
    worker = await launch(SimulatorSettings(startup_delay_seconds=0.05))
    await asyncio.sleep(0.06)
    assert (await worker.get("/health"))[0] == 200


async def test_loads(launch: Launch) -> None:
    worker = await launch(endless(dp_size=2, max_running_requests=1))
    body = {"input_ids": [1, 2, 3], "routed_dp_rank": 1}
    tasks = [asyncio.ensure_future(worker.post("/generate", body)) for _ in range(2)]
    await worker.until(running=1, waiting=1, tokens_generated=1)
    _, loads = await worker.get("/v1/loads?include=core")
    assert loads["dp_rank_count"] == 2
    idle, busy = loads["loads"]
    assert (idle["num_running_reqs"], idle["num_waiting_reqs"]) == (0, 0)
    assert (busy["num_running_reqs"], busy["num_waiting_reqs"]) == (1, 1)
    # 3 tokens of prompt and 1 of output run, 3 of prompt wait.
    assert (busy["num_used_tokens"], busy["num_total_tokens"]) == (4, 7)
    assert busy["num_waiting_uncached_tokens"] == 3
    assert loads["aggregate"]["total_reqs"] == 2
    _, one = await worker.get("/v1/loads?dp_rank=1")
    assert [rank["dp_rank"] for rank in one["loads"]] == [1]
    for task in tasks:
        task.cancel()
    await worker.until(running=0, waiting=0)


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_flush_cache(worker: SimulatedWorker, method: str) -> None:
    async with worker.session.request(method, "/flush_cache") as response:
        assert response.status == 200


async def test_stats_show_what_arrived(worker: SimulatedWorker) -> None:
    headers = {"X-Request-Id": "q-1", "X-Twice": "a"}
    body = b'{"prompt": "0123456789abcdef", "max_tokens": 2, "rid": "r-1"}'
    await worker.post("/v1/completions", body, headers=headers)
    stats = await worker.stats()
    assert (stats["received"], stats["completed"]) == (1, 1)
    assert stats["tokens_generated"] == 2
    (request,) = stats["requests"]
    assert request["path"] == "/v1/completions"
    assert (request["rid"], request["request_id"]) == ("r-1", "q-1")
    assert (request["prompt_tokens"], request["completion_tokens"]) == (16, 2)
    assert request["body_bytes"] == len(body)
    assert request["stream"] is False
    assert request["headers"]["x-request-id"] == "q-1"


async def test_stats_keep_the_last_hundred(worker: SimulatedWorker) -> None:
    for number in range(103):
        await worker.post("/v1/embeddings", {"input": "a", "rid": str(number)})
    stats = await worker.stats()
    assert stats["received"] == 103
    assert [item["rid"] for item in stats["requests"]] == [str(n) for n in range(3, 103)]


async def test_many_streams_at_once(launch: Launch) -> None:
    worker = await launch(
        SimulatorSettings(
            prefill_tokens_per_second=1e9, decode_milliseconds_per_token=1, max_running_requests=300
        )
    )
    body = chat(stream=True, max_tokens=20)
    await asyncio.gather(*(_drain(worker, body) for _ in range(250)))
    stats = await worker.stats()
    assert (stats["completed"], stats["tokens_generated"]) == (250, 250 * 20)


async def _drain(worker: SimulatedWorker, body: object) -> None:
    async with worker.session.post(CHAT, json=body) as response:
        await response.read()


async def test_a_taken_port_is_an_error() -> None:
    async with await start(SimulatorSettings()) as first:
        with pytest.raises(OSError, match="Address already in use"):
            await start(SimulatorSettings(port=first.port))


async def test_a_wildcard_address_is_dialled_on_this_machine() -> None:
    async with await start(SimulatorSettings(host="0.0.0.0")) as simulator:
        assert simulator.url == f"http://127.0.0.1:{simulator.port}"
