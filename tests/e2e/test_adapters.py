"""LoRA adapters behind the real Envoy: workers, names and pages of their requests."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from extproc.simulator.http import RunningSimulator
from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.pd_fleet import pd_stack
from tests.e2e.test_gateway_modes import MODES, with_modes
from tests.unit.simulator.model_folders import model_folder

DEBUG = {"x-extproc-debug": "true"}
PAGE = 16
LONG = "The tide comes in and the tide goes out. " * 20
ENGINES: dict[str, dict[str, Any]] = {
    "vllm": {"engine": "vllm", "lora": ["sql"]},
    "sglang": {"lora": ["sql"]},
}


async def change(running: Running, worker: RunningSimulator, action: str, name: str) -> None:
    """Load or unload an adapter of one worker, as its operator does."""
    prefix = "/v1" if worker.settings.is_vllm else ""
    async with running.http.post(
        f"{worker.url}{prefix}/{action}_lora_adapter",
        json={"lora_name": name, "lora_path": f"/adapters/{name}"},
    ) as answer:
        assert answer.status == 200, await answer.text()


async def listed(running: Running, name: str, *workers: RunningSimulator) -> None:
    """Wait until the service knows that just these workers have the adapter."""
    urls = {worker.url for worker in workers}

    async def check() -> bool:
        return urls == {
            worker["url"] for worker in await running.stack.workers() if name in worker["adapters"]
        }

    await wait_until(check, f"{name} is at {urls}")


async def served(running: Running, model: str, count: int = 12, **fields: Any) -> Counter[str]:
    """The workers that have served so many requests."""
    found: Counter[str] = Counter()
    for _ in range(count):
        async with running.chat(model, headers=DEBUG, **fields) as answer:
            assert answer.status == 200, await answer.text()
            found[answer.headers["x-extproc-worker"]] += 1
    return found


async def refused(running: Running, model: str) -> tuple[int, str]:
    async with running.chat(model) as answer:
        return await running.error(answer)


DEBUG_HEADERS = {"observability": {"debug_headers": True}}


@pytest.mark.parametrize("engine", ENGINES)
async def test_only_workers_with_the_adapter_serve_it_by_either_name(
    launch: Launch, engine: str
) -> None:
    running = await launch(3, worker=ENGINES[engine], settings=DEBUG_HEADERS)
    first, *others = running.fleet.workers
    await change(running, first, "unload", "sql")
    await listed(running, "sql", *others)
    for name in ("sql", "m:sql"):
        assert set(await served(running, name)) == {worker.url for worker in others}
    assert len(await served(running, "m")) == 3
    assert await refused(running, "other") == (404, "model_not_found")
    assert await refused(running, "m:other") == (404, "model_not_found")
    async with running.http.get(f"{running.url}/v1/models") as answer:
        cards = (await answer.json())["data"]
    assert [(card["id"], card.get("parent")) for card in cards] == [("m", None), ("sql", "m")]
    metrics = await running.stack.metrics()
    assert metrics['extproc_adapters{model="m"}'] == 1
    assert metrics['extproc_adapter_requests_total{model="m"}'] == 24
    assert not [name for name in metrics if "sql" in name]


@pytest.mark.parametrize("engine", ENGINES)
async def test_loading_and_unloading_is_noticed(launch: Launch, engine: str) -> None:
    running = await launch(2, worker=ENGINES[engine], settings=DEBUG_HEADERS)
    one, two = running.fleet.workers
    assert await refused(running, "chat") == (404, "model_not_found")
    await change(running, two, "load", "chat")
    await listed(running, "chat", two)
    assert set(await served(running, "chat")) == {two.url}
    await change(running, one, "load", "chat")
    await listed(running, "chat", one, two)
    assert set(await served(running, "chat")) == {one.url, two.url}
    await change(running, one, "unload", "chat")
    await change(running, two, "unload", "chat")
    # The first request may get the engine's own answer, and lets the service look again.
    async with running.chat("chat") as answer:
        assert answer.status in (400, 404)
    await listed(running, "chat")
    assert await refused(running, "chat") == (404, "model_not_found")
    assert len(await served(running, "m")) == 2


async def test_an_adapter_whose_only_worker_is_gone_is_503(launch: Launch) -> None:
    running = await launch(2, worker=ENGINES["vllm"], settings=DEBUG_HEADERS)
    one, two = running.fleet.workers
    await change(running, one, "unload", "sql")
    await listed(running, "sql", two)
    await two.stop()

    async def is_busy() -> bool:
        async with running.chat("sql") as answer:
            return bool(answer.status == 503)

    await wait_until(is_busy, "the adapter has no worker")
    assert set(await served(running, "m")) == {one.url}


@pytest.mark.parametrize("mode", ["partial", "duplex", "duplex-both"])
@pytest.mark.parametrize("engine", ENGINES)
async def test_the_name_is_changed_in_every_body_mode(
    launch: Launch, engine: str, mode: str
) -> None:
    running = await launch(
        1,
        worker=ENGINES[engine] | {"prefill_tokens_per_second": 1e9},
        edit_bootstrap=with_modes(**MODES[mode]),
    )
    name = "m:sql" if engine == "vllm" else "sql"
    for text in ("hello", "x" * 100_000):
        messages = [{"role": "user", "content": text}]
        async with running.chat(name, messages=messages, tokens=2) as answer:
            assert answer.status == 200, await answer.text()
            found = await answer.json()
            # One token for each byte: the text has arrived as it was.
            assert found["usage"]["prompt_tokens"] >= len(text)


@pytest.mark.parametrize("engine", ENGINES)
async def test_adapters_do_not_share_pages_with_the_model(
    launch: Launch, tmp_path: Path, engine: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = model_folder(folder)
    events = {"page_size": PAGE, "kv_events_port": 0, "tokenizer_path": path}
    running = await launch(
        3,
        worker=ENGINES[engine] | events | {"lora": ["sql", "chat"]},
        settings=DEBUG_HEADERS
        | {"models": [{"id": "m", "policy": "cache_aware_zmq", "tokenizer_path": path}]},
    )
    text = LONG
    held: dict[str, str] = {}
    for turn in range(3):
        for model in ("sql", "m:chat", "m"):
            asked = {"role": "user", "content": text}
            async with running.chat(model, headers=DEBUG, messages=[asked], tokens=2) as answer:
                assert answer.status == 200, await answer.text()
                usage = (await answer.json())["usage"]
                worker = answer.headers["x-extproc-worker"]
                believed = int(answer.headers["x-extproc-overlap"].partition("/")[0])
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            assert believed == cached, (turn, model)
            assert (cached > 0) is (turn > 0)
            assert held.setdefault(model, worker) == worker
            await _settled(running)
        text += LONG[:100]
    assert await running.sample("extproc_cached_tokens_total") > 0


async def _settled(running: Running) -> None:
    """Wait until the service knows every page that the workers hold."""

    async def check() -> bool:
        stats = await running.fleet.stats()
        held = [cache["gpu_tokens"] // PAGE for one in stats for cache in one["caches"]]
        by_url = {worker["url"]: worker["kv"]["ranks"] for worker in await running.stack.workers()}
        known = [rank["pages"] for one in running.fleet.workers for rank in by_url[one.url]]
        return known == held

    await wait_until(check, "the service knows what the workers hold")


async def test_both_workers_of_a_pair_have_the_adapter(tmp_path: Path) -> None:
    async with pd_stack(
        tmp_path, prefills=2, decodes=2, worker={"lora": ["sql"]}, settings=DEBUG_HEADERS
    ) as running:
        for worker in (running.prefills[0], running.decodes[0]):
            await change(running, worker, "unload", "sql")
        await listed(running, "sql", running.prefills[1], running.decodes[1])
        for model in ("sql", "m:sql"):
            for _ in range(4):
                async with running.chat(model) as answer:
                    assert answer.status == 200, await answer.text()
        for number, expected in ((0, 0), (1, 8)):
            for workers in (running.prefills, running.decodes):
                assert len(await running.legs([workers[number]])) == expected
        await change(running, running.decodes[1], "unload", "sql")
        await listed(running, "sql", running.prefills[1])
        assert await refused(running, "sql") == (503, "no_workers_with_adapter")
        async with running.chat("m") as answer:
            assert answer.status == 200
        await running.at_rest()


async def test_adapters_that_come_and_go_under_traffic_harm_no_other_request(
    launch: Launch,
) -> None:
    running = await launch(3, worker=ENGINES["vllm"], settings=DEBUG_HEADERS)
    done = asyncio.Event()
    answers: Counter[tuple[str, int]] = Counter()

    async def ask(model: str) -> None:
        while not done.is_set():
            async with running.chat(model, tokens=2) as answer:
                await answer.read()
                answers[model, answer.status] += 1

    async with asyncio.TaskGroup() as group:
        for model in ("m", "sql", "m:sql", "churn"):
            group.create_task(ask(model))
        for number in range(30):
            for worker in running.fleet.workers:
                await change(running, worker, "load", "churn")
                await change(running, worker, "load", f"new-{number}")
            for worker in running.fleet.workers:
                await change(running, worker, "unload", "churn")
                await change(running, worker, "unload", f"new-{number}")
        done.set()
    assert {status for model, status in answers if model != "churn"} == {200}, answers
    assert {status for model, status in answers if model == "churn"} <= {200, 404, 503}, answers
    await listed(running, "churn")
    assert (await running.stack.metrics())['extproc_adapters{model="m"}'] == 1
    assert all(one["in_flight"] == 0 for one in await running.stack.workers())
