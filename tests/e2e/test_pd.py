"""Prefill and decode on separate workers, end to end: destinations and contents of requests."""

import asyncio
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from extproc.simulator.http import RunningSimulator
from tests.e2e.pd_fleet import PdRunning, pd_stack

MODES = ["two_pass", "inline"]


def settings(mode: str) -> dict[str, Any]:
    return {"pd": {"decode": mode}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", MODES)
async def test_a_chat_is_served_by_a_pair(tmp_path: Path, mode: str, stream: bool) -> None:
    async with pd_stack(tmp_path, settings=settings(mode)) as running:
        async with running.chat(tokens=5, stream=stream) as response:
            text = await response.text()
            assert response.status == 200, text
            assert not [name for name in response.headers if name.startswith("x-extproc")]
        assert ("[DONE]" in text) if stream else json.loads(text)["choices"]
        (prefill,) = await running.legs(running.prefills)
        (decode,) = await running.legs(running.decodes)
        for leg in (prefill, decode):
            assert leg["bootstrap_host"] == "127.0.0.1"
            assert leg["bootstrap_port"] == running.prefills[0].bootstrap_port
            assert leg["bootstrap_room"] == prefill["bootstrap_room"]
            assert 0 <= leg["bootstrap_room"] < 1 << 63
            assert leg["request_id"] == prefill["request_id"]
            assert leg["path"] == "/v1/chat/completions"
            assert not [name for name in leg["headers"] if name.startswith("x-extproc-decode")]
        assert decode["completion_tokens"] == 5
        await running.at_rest()
        assert await running.sample("extproc_pd_pairs_total") == 1
        assert await running.sample('extproc_pd_decode_choices_total{model="m",reason="same_h') == 1
        assert await running.sample("extproc_destination_missed_total") == 0


async def test_the_body_changes_only_by_added_members(tmp_path: Path) -> None:
    body = (
        b' {"model" :"m",  "max_tokens":2, "unknown":{"b":1,"a":12345678901234567890123},\n'
        b'"temperature":1.10,"messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}] } \n'
    )
    async with pd_stack(tmp_path, worker={"log_requests": True}) as running:
        headers = {
            "content-type": "application/json",
            "authorization": "Bearer client",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "tracestate": "vendor=1",
            "x-correlation-id": "c",
            "x-sgl-anything": "yes",
            "x-request-id-parent": "p",
            "cookie": "secret",
        }
        url = f"{running.url}/v1/chat/completions?trace=1"
        async with running.http.post(url, data=body, headers=headers) as response:
            assert response.status == 200, await response.text()
        (prefill,) = await running.legs(running.prefills)
        (decode,) = await running.legs(running.decodes)
        assert prefill["body_bytes"] == decode["body_bytes"] > len(body)
        for name in headers.keys() - {"content-type", "cookie"}:
            assert prefill["headers"][name] == headers[name]
        assert prefill["headers"]["x-request-id"] == decode["headers"]["x-request-id"]
        assert "cookie" not in prefill["headers"]
        assert int(decode["headers"]["content-length"]) == decode["body_bytes"]


async def test_a_batch_gets_a_room_for_each_prompt(tmp_path: Path) -> None:
    async with pd_stack(tmp_path) as running:
        sampling = {"max_new_tokens": 2}
        for prompts in (["a", "b", "c"], ["a"], "a"):
            body = {"model": "m", "text": prompts, "sampling_params": sampling}
            async with running.http.post(f"{running.url}/generate", json=body) as response:
                answer = await response.json()
                assert response.status == 200, answer
            decode = (await running.legs(running.decodes))[-1]
            prefill = (await running.legs(running.prefills))[-1]
            rooms = decode["bootstrap_room"]
            assert rooms == prefill["bootstrap_room"]
            if isinstance(prompts, list):
                assert len(set(rooms)) == len(prompts) == len(answer)
                assert decode["bootstrap_host"] == ["127.0.0.1"] * len(prompts)
            else:
                assert isinstance(rooms, int)


async def test_paths_without_generation_are_refused(tmp_path: Path) -> None:
    async with pd_stack(tmp_path) as running:
        body = {"model": "m", "input": "x"}
        async with running.http.post(f"{running.url}/v1/embeddings", json=body) as response:
            assert await running.error(response) == (400, "bad_request")


@pytest.mark.parametrize("mode", MODES)
async def test_debug_headers_name_both_workers(tmp_path: Path, mode: str) -> None:
    more = settings(mode) | {"observability": {"debug_headers": True}}
    async with pd_stack(tmp_path, settings=more) as running:
        async with running.chat(headers={"x-extproc-debug": "true"}) as response:
            assert response.status == 200
            assert response.headers["x-extproc-worker"] == running.prefills[0].url
            assert response.headers["x-extproc-decode-worker"] == running.decodes[0].url
        async with running.chat() as response:
            assert not [name for name in response.headers if name.startswith("x-extproc")]


async def test_a_plain_and_a_pd_model_in_one_service(tmp_path: Path) -> None:
    async with pd_stack(tmp_path, plains=2) as running:

        async def send(model: str, number: int) -> None:
            async with running.chat(model, stream=number % 2 == 0) as response:
                await response.read()
                assert response.status == 200

        await asyncio.gather(*(send(("m", "other")[n % 2], n) for n in range(40)))
        assert len(await running.legs(running.prefills)) == 20
        assert len(await running.legs(running.decodes)) == 20
        plain = await running.legs(running.plains)
        assert len(plain) == 20
        assert not any(one.get("bootstrap_room") for one in plain)
        await running.at_rest()


async def test_large_prompts(tmp_path: Path) -> None:
    async with pd_stack(tmp_path, worker={"prefill_tokens_per_second": 1e7}) as running:
        for size in (100_000, 3_000_000):
            messages = [{"role": "user", "content": "x" * size}]
            body = json.dumps({"model": "m", "messages": messages, "max_tokens": 2}).encode()
            url = f"{running.url}/v1/chat/completions"
            async with running.http.post(url, data=io.BytesIO(body)) as response:
                assert response.status == 200, await response.text()
        assert {leg["body_bytes"] > 100_000 for leg in await running.legs(running.prefills)} == {
            True
        }
        await running.at_rest()


async def test_clients_cannot_choose_a_worker(tmp_path: Path) -> None:
    async with pd_stack(tmp_path, decodes=2) as running:
        evil = {
            "x-extproc-decode-order": "1;h;p;127.0.0.1:1",
            "x-gateway-destination-endpoint": "127.0.0.1:1",
            "x-extproc-cluster": "decode_pass",
            "x-envoy-attempt-count": "7",
            "x-extproc-retry": "1",
        }
        body: dict[str, Any] = {
            "bootstrap_room": 7,
            "bootstrap_host": "203.0.113.1",
            "bootstrap_port": 1,
        }
        for _ in range(4):
            async with running.chat(headers=evil, **body) as response:
                assert response.status == 200, await response.text()
        for leg in await running.legs(running.fleet.workers):
            assert leg["bootstrap_host"] == "127.0.0.1"
            assert leg["bootstrap_room"] != 7


async def spread(running: PdRunning, count: int) -> list[int]:
    """Send requests at the same time; returns the number of each decode worker."""

    async def send() -> None:
        async with running.chat(tokens=20) as response:
            await response.read()
            assert response.status == 200

    await asyncio.gather(*(send() for _ in range(count)))
    return [len(await running.legs([worker])) for worker in running.decodes]


@pytest.mark.parametrize("mode", MODES)
async def test_decode_load_is_spread(tmp_path: Path, mode: str) -> None:
    async with pd_stack(tmp_path, prefills=2, decodes=3, settings=settings(mode)) as running:
        counts = await spread(running, 60)
        assert sum(counts) == 60
        assert max(counts) - min(counts) <= 10, counts
        await running.at_rest()


async def switch(running: PdRunning, worker: RunningSimulator, role: str) -> None:
    """Give a worker another role, and wait until the service knows it."""
    body = {"new_role": role}
    async with running.http.post(f"{worker.url}/pd_role_switch", json=body) as answer:
        assert answer.status == 200, await answer.text()
    deadline = asyncio.get_running_loop().time() + 60
    while (await running.roles())[worker.url] != role:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)


QUICK = {"discovery": {"introspection_interval_secs": 0.2}}


async def test_a_model_without_prefill_or_decode_workers_says_which_are_missing(
    tmp_path: Path,
) -> None:
    async with pd_stack(tmp_path, settings=QUICK) as running:
        (prefill,), (decode,) = running.prefills, running.decodes
        await switch(running, decode, "prefill")
        async with running.chat() as response:
            assert await running.error(response) == (503, "no_decode_workers_available")
        await switch(running, prefill, "decode")
        await switch(running, decode, "decode")
        async with running.chat() as response:
            assert await running.error(response) == (503, "no_prefill_workers_available")
        # No leg was sent in vain.
        assert await running.legs([prefill, decode]) == []


async def test_a_changed_role_is_noticed(tmp_path: Path) -> None:
    async with pd_stack(tmp_path, prefills=2, decodes=2, settings=QUICK) as running:
        changing = running.prefills[1]
        await switch(running, changing, "decode")
        assert sum(await spread(running, 30)) >= 10
        assert len(await running.legs([running.prefills[0]])) == 30
        assert len(await running.legs([changing])) >= 5
        assert await running.sample("extproc_worker_role_changes_total") == 1
        await running.at_rest()


async def test_roles_change_under_load(tmp_path: Path) -> None:
    """Engines change roles only while idle: the router keeps sending until it has noticed."""
    async with pd_stack(tmp_path, prefills=2, decodes=2, settings=QUICK) as running:
        stop = asyncio.Event()
        seen: Counter[tuple[int, str]] = Counter()

        async def send() -> None:
            while not stop.is_set():
                async with running.chat(tokens=3) as response:
                    await response.read()
                    code = response.headers.get("x-router-error-code", "")
                    seen[response.status, code] += 1

        clients = [asyncio.create_task(send()) for _ in range(4)]
        changing = running.prefills[1]
        for role in ("decode", "prefill", "decode"):
            deadline = asyncio.get_running_loop().time() + 60
            while True:
                url, body = f"{changing.url}/pd_role_switch", {"new_role": role}
                async with running.http.post(url, json=body) as answer:
                    if answer.status == 200:
                        break
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.6)
        stop.set()
        await asyncio.gather(*clients)
        assert seen[200, ""] > 50, seen
        allowed = {
            (200, ""),
            (400, "prefill_refused"),
            (500, ""),
            (502, "prefill_failed"),
            (504, "stale_request_expired"),
        }
        assert set(seen) <= allowed, seen
        await running.at_rest()
