"""Legs as with vLLM's NIXL connector: the first answer says where the second finds the KV."""

import asyncio
import socket
from contextlib import closing
from typing import Any

import pytest

from extproc.simulator.settings import SimulatorSettings

from .clients import CHAT, FOREVER_MILLISECONDS, Launch, SimulatedWorker, chat
from .pd_clients import COMPLETIONS, SOON_SECONDS, pd

PROMPT = "x" * 130  # three pages of 64


def nixl(**fields: Any) -> SimulatorSettings:
    defaults: dict[str, Any] = {
        "pd_protocol": "nixl",
        "no_server_info": True,
        "prefill_tokens_per_second": 1e9,
        "decode_milliseconds_per_token": 0,
    }
    return SimulatorSettings(**(defaults | fields))


def first_leg(**fields: Any) -> dict[str, Any]:
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    return {"prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": params, **fields}


async def computed(worker: SimulatedWorker) -> dict[str, Any]:
    """The parameters for the second leg in the answer of the first."""
    status, answer = await worker.post(COMPLETIONS, first_leg())
    assert status == 200
    params: dict[str, Any] = answer["kv_transfer_params"]
    return params


def second_leg(params: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": 3, "kv_transfer_params": params}


async def test_one_leg_after_the_other(launch: Launch) -> None:
    prefill = await launch(nixl())
    decode = await launch(nixl(prefill_tokens_per_second=0.001))
    params = await computed(prefill)
    assert params == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": params["remote_engine_id"],
        "remote_block_ids": [1, 2, 3],
        "remote_host": "127.0.0.1",
        "remote_port": params["remote_port"],
        "tp_size": 1,
    }
    assert params["remote_port"] == prefill.simulator.side_channel_port
    stats = await prefill.until(running=0, held_blocks_requests=1)
    assert pd(stats) == (0, 0, 0)
    assert (await prefill.get("/flush_cache"))[0] == 400  # the blocks are in use
    async with asyncio.timeout(20):  # the decode side has no time for a prefill of its own
        status, answer = await decode.post(COMPLETIONS, second_leg(params))
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
    assert "kv_transfer_params" not in answer
    assert pd(await prefill.until(held_blocks_requests=0)) == (1, 0, 0)
    assert pd(await decode.stats()) == (1, 0, 0)
    assert (await decode.stats())["requests"][0]["kv_transfer_params"] == params
    assert (await prefill.get("/flush_cache"))[0] == 200
    assert (await decode.post(COMPLETIONS, second_leg(params)))[0] == 500  # fetched once only


async def test_the_first_leg_computes_what_it_is_asked_for(launch: Launch) -> None:
    worker = await launch(nixl())
    status, answer = await worker.post(CHAT, chat() | first_leg(max_tokens=4))
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
    assert answer["kv_transfer_params"]["remote_block_ids"]


async def test_blocks_that_are_kept_are_not_evicted(launch: Launch) -> None:
    worker = await launch(nixl(max_total_num_tokens=192))
    await computed(worker)  # 130 tokens of prompt and one of output: two full pages
    await worker.post(COMPLETIONS, {"prompt": "y" * 300, "max_tokens": 1})
    _, answer = await worker.post(COMPLETIONS, {"prompt": PROMPT, "max_tokens": 1})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 128


async def test_a_stream_of_the_second_leg(launch: Launch) -> None:
    prefill, decode = await launch(nixl()), await launch(nixl())
    body = second_leg(await computed(prefill)) | {"stream": True}
    async with decode.session.post(COMPLETIONS, json=body) as response:
        assert response.status == 200
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


async def test_unfetched_blocks_are_freed_after_a_time_out(launch: Launch) -> None:
    worker = await launch(nixl(bootstrap_timeout_seconds=SOON_SECONDS))
    params = await computed(worker)
    assert pd(await worker.until(held_blocks_requests=0)) == (0, 1, 0)
    assert (await worker.get("/flush_cache"))[0] == 200
    assert (await worker.post(COMPLETIONS, second_leg(params)))[0] == 500


@pytest.mark.parametrize(
    "wrong",
    [
        {"remote_engine_id": "other"},
        {"remote_block_ids": [1, 2]},
        {"remote_block_ids": []},
        {"remote_block_ids": None},
        {"remote_engine_id": None},
        {"remote_port": None},
        {"remote_port": "x"},
        {"remote_port": 70_000},
        {"remote_host": None},
        {"remote_host": "no-such-host.invalid"},
    ],
)
async def test_blocks_that_are_not_there(launch: Launch, wrong: dict[str, Any]) -> None:
    worker = await launch(nixl())
    params = await computed(worker)
    status, answer = await worker.post(COMPLETIONS, second_leg(params | wrong))
    assert status == 500
    assert "KV transfer failed" in answer["error"]["message"]
    await worker.until(held_blocks_requests=1, rooms=0, running=0, waiting=0)


async def test_an_unreachable_worker_fails_the_decode_leg(launch: Launch) -> None:
    worker = await launch(nixl())
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    params = await computed(worker) | {"remote_port": port}
    assert (await worker.post(COMPLETIONS, second_leg(params)))[0] == 500


async def test_blocks_of_a_worker_that_restarted_are_gone(launch: Launch) -> None:
    prefill, decode = await launch(nixl()), await launch(nixl())
    params = await computed(prefill)
    port = prefill.simulator.side_channel_port
    await prefill.simulator.restart()
    assert prefill.simulator.side_channel_port == port
    assert (await prefill.stats())["held_blocks_requests"] == 0
    assert (await decode.post(COMPLETIONS, second_leg(params)))[0] == 500


async def test_a_first_leg_that_ends_early_keeps_nothing(launch: Launch) -> None:
    worker = await launch(nixl(decode_milliseconds_per_token=FOREVER_MILLISECONDS))
    task = asyncio.ensure_future(worker.post(COMPLETIONS, first_leg(max_tokens=2, rid="mine")))
    await worker.until(running=1, tokens_generated=1)
    await worker.post("/abort_request", {"rid": "mine"})
    _, answer = await task
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert "kv_transfer_params" not in answer
    task = asyncio.ensure_future(worker.post(COMPLETIONS, first_leg(max_tokens=2)))
    await worker.until(running=1)
    task.cancel()
    await worker.until(running=0, held_blocks_requests=0, aborted=2)


@pytest.mark.parametrize(
    "params", [None, {}, {"do_remote_decode": False}, {"do_remote_prefill": False, "x": 1}]
)
async def test_any_other_request_is_plain(launch: Launch, params: Any) -> None:
    worker = await launch(nixl(disaggregation_mode="prefill"))
    body = {"prompt": "a", "max_tokens": 3, "kv_transfer_params": params, "bootstrap_room": "x"}
    status, answer = await worker.post(COMPLETIONS, body)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
    assert "kv_transfer_params" not in answer
    assert (await worker.stats())["held_blocks_requests"] == 0


@pytest.mark.parametrize(
    "params", [5, [], {"do_remote_decode": 1}, {"do_remote_prefill": True, "remote_block_ids": "x"}]
)
async def test_parameters_of_a_wrong_kind(launch: Launch, params: Any) -> None:
    worker = await launch(nixl())
    body = {"prompt": "a", "kv_transfer_params": params}
    assert (await worker.post(COMPLETIONS, body))[0] == 400


async def test_other_workers_ignore_transfer_parameters(launch: Launch) -> None:
    worker = await launch(SimulatorSettings(decode_milliseconds_per_token=0))
    status, answer = await worker.post(COMPLETIONS, first_leg(max_tokens=3))
    assert (status, answer["usage"]["completion_tokens"]) == (200, 3)
    assert "kv_transfer_params" not in answer


async def test_the_side_channel_port_can_be_given(launch: Launch) -> None:
    worker = await launch(nixl())
    port = worker.simulator.side_channel_port
    with pytest.raises(OSError, match="nixl_side_channel_port"):
        await launch(nixl(nixl_side_channel_port=port))
