"""Workers that an operator adds over the admin port, on the real Envoy."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", "let-me-change-workers")


def settings(envoy: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {"server": {"admin_token_env": "ADMIN_TOKEN"}, "envoy": envoy} | sections


async def counts(running: Running) -> list[int]:
    return [len(stats["requests"]) for stats in await running.fleet.stats()]


async def ask(running: Running, count: int) -> set[int]:
    async def one() -> int:
        async with running.chat(tokens=1) as response:
            await response.read()
            return int(response.status)

    return set(await asyncio.gather(*(one() for _ in range(count))))


async def until_ready(running: Running, *urls: str) -> None:
    async def done() -> bool:
        return {one["url"] for one in await running.stack.workers() if one["ready"]} == set(urls)

    await wait_until(done, f"the workers are {urls}")


@pytest.mark.parametrize("endpoints", ["ads", "file"])
async def test_an_added_worker_gets_requests_until_it_is_removed(
    launch: Launch, tmp_path: Path, endpoints: str
) -> None:
    file = str(tmp_path / "endpoints.json")
    envoy = {"endpoints": "ads"} if endpoints == "ads" else {"endpoints_file": file}
    running = await launch(2, settings=settings(envoy), urls=lambda urls: urls[:1])
    stack = running.stack
    await stack.envoy.wait_ready(lambda: stack.answers(f"{stack.envoy_admin_url}/ready"))
    first, second = (one.url for one in running.fleet.workers)
    await until_ready(running, first)

    status, body = await stack.admin("POST", "/workers", json={"url": f"{second}/"})
    assert (status, body["added"]["url"]) == (201, second)
    assert body["scope"].startswith("this replica only, until it restarts")
    assert ("ADS" if endpoints == "ads" else file) in body["gateway"]
    await until_ready(running, first, second)
    assert await ask(running, 30) == {200}
    assert min(await counts(running)) > 5
    shown = {one["url"]: one["added_by"] for one in await stack.workers()}
    assert shown == {first: "discovery", second: "admin"}
    assert await running.sample("extproc_runtime_workers") == 1

    status, body = await stack.admin("POST", "/workers", json={"url": second})
    assert (status, "added before" in body["error"]) == (409, True)
    status, body = await stack.admin("DELETE", "/workers", params={"url": first})
    assert (status, "discovery names this worker" in body["error"]) == (409, True)

    # A reload keeps it.
    stack.config["models"].append({"id": "another"})
    assert (await stack.reload())["problems"] == []
    await until_ready(running, first, second)

    # It is removed while a stream of it goes on.
    streams = [running.chat(tokens=2000, stream=True) for _ in range(2)]
    before = await counts(running)
    responses = [await one.__aenter__() for one in streams]
    busy = await counts(running)
    assert [now - then for now, then in zip(busy, before, strict=True)] == [1, 1]
    status, body = await stack.admin("DELETE", "/workers", params={"url": second})
    assert (status, body["removed"]) == (200, {"url": second})
    await until_ready(running, first)
    assert await ask(running, 10) == {200}
    assert (await counts(running))[1] == busy[1]
    for stream, response in zip(streams, responses, strict=True):
        assert response.status == 200
        assert (await response.read()).endswith(b"data: [DONE]\n\n")
        await stream.__aexit__(None, None, None)
    assert await running.sample("extproc_destination_missed_total") == 0
    assert await running.sample("extproc_runtime_workers") == 0


async def test_after_a_restart_an_added_worker_is_gone(launch: Launch) -> None:
    running = await launch(2, settings=settings({"endpoints": "ads"}), urls=lambda urls: urls[:1])
    stack = running.stack
    first, second = (one.url for one in running.fleet.workers)
    status, _ = await stack.admin("POST", "/workers", json={"url": second})
    assert status == 201
    await until_ready(running, first, second)
    await stack.service.stop()
    await stack.start_service()
    await until_ready(running, first)
    status, body = await stack.admin("DELETE", "/workers", params={"url": second})
    assert (status, body["error"]) == (404, "url: there is no such worker")


async def test_with_a_fixed_list_in_envoys_file_no_worker_can_be_added(launch: Launch) -> None:
    running = await launch(2, settings=settings({}), urls=lambda urls: urls[:1])
    url = running.fleet.workers[1].url
    status, body = await running.stack.admin("POST", "/workers", json={"url": url})
    assert status == 409
    assert "envoy.endpoints: ads" in body["error"]
