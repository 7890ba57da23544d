"""Successful requests: the right worker serves them, and answers stream token by token."""

import asyncio
import io
import json
from typing import Any

import openai
import pytest

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running


async def test_the_openai_sdk_talks_through_envoy(launch: Launch) -> None:
    running = await launch(2)
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="client-key") as client:
        models = [model.id async for model in client.models.list()]
        assert models == ["m"]
        answer = await client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], max_tokens=3
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3
        completion = await client.completions.create(model="m", prompt="hi", max_tokens=2)
        assert completion.usage is not None
        embedding = await client.embeddings.create(model="m", input="hi", encoding_format="float")
        assert embedding.data[0].embedding
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(
                model="other", messages=[{"role": "user", "content": "hi"}]
            )
        assert unknown.value.code == "model_not_found"
    # Three requests in turn over two workers, and the client's own key goes to the engine.
    assert [stats["completed"] for stats in await running.fleet.stats()] == [2, 1]
    requests = await running.fleet.requests()
    assert {request["headers"]["authorization"] for request in requests} == {"Bearer client-key"}


async def test_tokens_arrive_one_by_one_and_not_at_the_end(launch: Launch) -> None:
    running = await launch(1)
    async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="k") as client:
        chunks = await client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=4,
            stream=True,
            extra_headers={"x-simulator-fault": "stall-after-tokens=2"},
        )
        # The worker falls silent for ever after two tokens: they can only be here because
        # nothing between us waits for the end.
        contents = []
        async for chunk in chunks:
            if chunk.choices and chunk.choices[0].delta.content:
                contents.append(chunk.choices[0].delta.content)
            if len(contents) == 2:
                break
        await chunks.close()
    await wait_until(lambda: no_load(running), "load released after the client left")


async def no_load(running: Running) -> bool:
    return await running.stack.in_flight() == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/generate", {"text": "hi", "sampling_params": {"max_new_tokens": 2}}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
        ("/v1/rerank", {"query": "q", "documents": ["a", "b"]}),
        ("/v1/score", {"query": "q", "items": ["a"], "label_token_ids": [1]}),
        ("/v1/classify", {"input": "hi"}),
    ],
)
async def test_every_path_is_served(launch: Launch, path: str, body: dict[str, Any]) -> None:
    running = await launch(1)
    sent = body if path == "/generate" else {"model": "m", **body}
    async with running.http.post(f"{running.url}{path}", json=sent) as response:
        assert response.status == 200, await response.text()
    (request,) = await running.fleet.requests()
    assert request["path"] == path


async def test_requests_never_reach_workers_of_another_model(launch: Launch) -> None:
    running = await launch(2, models=("a", "b"))
    for model in "abab":
        async with running.chat(model) as response:
            assert (await response.json())["model"] == model
    assert [stats["completed"] for stats in await running.fleet.stats()] == [1, 1, 1, 1]


async def test_two_hundred_concurrent_streams_are_spread_evenly(launch: Launch) -> None:
    running = await launch(
        4,
        worker={
            "max_running_requests": 256,
            "prefill_tokens_per_second": 1e6,
            # Long enough for all to be open at a time.
            "decode_milliseconds_per_token": 30.0,
        },
        settings={"models": [{"id": "m", "policy": "least_load"}]},
    )
    seen_in_flight = 0

    async def one() -> int:
        async with running.chat(tokens=40, stream=True) as response:
            assert response.status == 200
            return int((await response.read()).count(b"data: "))

    async def watch() -> None:
        nonlocal seen_in_flight
        while True:
            seen_in_flight = max(seen_in_flight, await running.stack.in_flight())
            await asyncio.sleep(0.02)

    watching = asyncio.create_task(watch())
    counts = await asyncio.gather(*(one() for _ in range(200)))
    watching.cancel()
    # A role chunk, 40 tokens, a finish chunk and [DONE].
    assert set(counts) == {43}
    assert seen_in_flight > 100
    await wait_until(lambda: no_load(running), "load released")
    completed = [stats["completed"] for stats in await running.fleet.stats()]
    assert sum(completed) == 200
    assert max(completed) - min(completed) <= 20
    assert await running.sample("extproc_tickets_open") == 0


async def test_the_answer_is_the_workers_own_headers_included(launch: Launch) -> None:
    running = await launch(1)
    async with running.chat(fault="status=429, retry-after=7") as response:
        assert response.status == 429
        assert response.headers["retry-after"] == "7"
        assert response.headers["x-simulator-port"] == str(running.fleet.workers[0].port)
        assert "error" in await response.json()
    assert not any(
        name.startswith(("x-extproc", "x-gateway", "x-envoy")) for name in response.headers
    )


async def test_debug_headers_name_the_worker_when_allowed(launch: Launch) -> None:
    running = await launch(1, settings={"observability": {"debug_headers": True}})
    async with running.chat(headers={"x-extproc-debug": "true"}) as response:
        assert response.headers["x-extproc-worker"] == running.fleet.workers[0].url
        assert response.headers["x-extproc-policy"] == "round_robin"
        assert response.headers["x-extproc-reason"] == "next"
        assert response.headers["x-extproc-overlap"] == "0/0"
    async with running.chat() as response:
        assert "x-extproc-worker" not in response.headers


async def test_workers_by_host_name_and_over_ipv6(launch: Launch) -> None:
    running = await launch(1, urls=lambda urls: [urls[0].replace("127.0.0.1", "localhost")])
    async with running.chat() as response:
        assert response.status == 200
    assert await running.sample("extproc_destination_missed_total") == 0
    (worker,) = await running.stack.workers()
    assert worker["address"] == f"127.0.0.1:{running.fleet.workers[0].port}"


async def test_a_worker_over_ipv6(launch: Launch) -> None:
    running = await launch(1, worker={"host": "::1"})
    async with running.chat() as response:
        assert response.status == 200
    assert await running.sample("extproc_destination_missed_total") == 0


async def test_an_engine_that_wants_a_key_gets_it_from_the_configuration(launch: Launch) -> None:
    running = await launch(
        1,
        worker={"api_key": "engine-key"},
        settings={"workers": {"api_key": "engine-key", "forward_api_key": True}},
    )
    async with running.chat(headers={"authorization": "Bearer client"}) as response:
        assert response.status == 200


async def test_a_body_of_three_megabytes_reaches_the_worker_whole(launch: Launch) -> None:
    running = await launch(1, worker={"prefill_tokens_per_second": 1e9})
    body = {"model": "m", "prompt": "x" * 3_000_000, "max_tokens": 2}
    sent = io.BytesIO(json.dumps(body).encode())
    async with running.http.post(f"{running.url}/v1/completions", data=sent) as response:
        assert response.status == 200
    (request,) = await running.fleet.requests()
    assert request["body_bytes"] > 3_000_000


async def test_the_access_log_holds_the_decision_and_no_prompt_text(
    launch: Launch,
) -> None:
    running = await launch(1)
    async with running.chat(headers={"x-request-id": "the-id"}) as response:
        assert response.headers["x-request-id"] == "the-id"
    log = running.stack.folder / "access.log"

    async def written() -> bool:
        return log.exists() and b"the-id" in log.read_bytes()

    await wait_until(written, "an access log line")
    (line,) = [json.loads(line) for line in log.read_text().splitlines() if "the-id" in line]
    worker = f"127.0.0.1:{running.fleet.workers[0].port}"
    assert (line["model"], line["policy"], line["reason"]) == ("m", "round_robin", "next")
    assert (line["upstream_host"], line["status"]) == (worker, 200)
    assert "hello" not in log.read_text()
    assert "hello" not in running.stack.service.tail()
