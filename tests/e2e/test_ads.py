"""Envoy has the workers from the service, over ADS."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running

ADS = {"envoy": {"endpoints": "ads"}}
CLUSTER = "workers/m/plain"


def state_of_the_world(bootstrap: dict[str, Any]) -> None:
    bootstrap["dynamic_resources"]["ads_config"]["api_type"] = "GRPC"


async def envoys(running: Running) -> list[dict[str, Any]]:
    async with running.http.get(f"{running.stack.admin_url}/workers") as response:
        shown: list[dict[str, Any]] = (await response.json())["envoys"]
        return shown


async def ready(running: Running) -> set[str]:
    return {one["url"] for one in await running.stack.workers() if one["ready"]}


async def requests_of(running: Running) -> list[int]:
    return [len(stats["requests"]) for stats in await running.fleet.stats()]


async def endpoints_of_envoy(running: Running) -> set[str]:
    """The workers' addresses in Envoy's cluster."""
    url = f"{running.stack.envoy_admin_url}/clusters?format=json"
    async with running.http.get(url) as response:
        clusters = (await response.json(content_type=None))["cluster_statuses"]
    (workers,) = (one for one in clusters if one["name"] == CLUSTER)
    found = (one["address"]["socket_address"] for one in workers.get("host_statuses", []))
    return {f"http://{one['address']}:{one['port_value']}" for one in found}


@contextlib.asynccontextmanager
async def asking(running: Running) -> AsyncIterator[list[int]]:
    """Send requests all the time; gives their statuses."""
    statuses: list[int] = []
    ended = asyncio.Event()

    async def ask() -> None:
        while not ended.is_set():
            async with running.chat(tokens=1) as response:
                await response.read()
                statuses.append(response.status)

    tasks = [asyncio.create_task(ask()) for _ in range(4)]
    try:
        yield statuses
    finally:
        ended.set()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("edit", [None, state_of_the_world], ids=["delta", "state"])
async def test_workers_come_and_go_by_reload_and_no_request_fails(
    launch: Launch, edit: Any
) -> None:
    running = await launch(3, settings=ADS, edit_bootstrap=edit, urls=lambda urls: urls[:2])
    stack = running.stack
    first, second, third = (one.url for one in running.fleet.workers)
    assert await ready(running) == {first, second}
    await wait_until(lambda: connected(running), "Envoy has its endpoints")

    async def third_asked() -> bool:
        return (await requests_of(running))[2] > 0

    async with asking(running) as statuses:
        stack.config["discovery"]["static_urls"]["urls"] = [second, third]
        assert (await stack.reload())["problems"] == []
        await wait_until(third_asked, "the new worker is asked")

        async def first_gone() -> bool:
            return await endpoints_of_envoy(running) == {second, third}

        await wait_until(first_gone, "Envoy does not know the removed worker")
        before = (await requests_of(running))[0]
        count = len(statuses)

        async def more() -> bool:
            return len(statuses) > count + 50

        await wait_until(more, "further requests")
        assert (await requests_of(running))[0] == before
    assert set(statuses) == {200}
    assert await running.sample("extproc_xds_rejections_total") == 0
    assert await running.sample("extproc_xds_streams_open") == 1
    missed = await stack.metrics()
    assert not sum(v for k, v in missed.items() if k.startswith("extproc_destination_missed_total"))


async def connected(running: Running) -> bool:
    return [set(one["acknowledged"]) for one in await envoys(running)] == [{CLUSTER}]


async def test_service_and_envoy_restart(launch: Launch) -> None:
    running = await launch(2, settings=ADS)
    stack = running.stack
    urls = {one.url for one in running.fleet.workers}
    await wait_until(lambda: connected(running), "Envoy has its endpoints")
    async with asking(running) as statuses:
        await stack.service.stop()
        assert await endpoints_of_envoy(running) == urls
        await stack.start_service()
        await wait_until(lambda: connected(running), "Envoy is connected again")
    assert set(statuses) == {200}
    await stack.envoy.stop()
    await stack.envoy.start()
    await stack.envoy.wait_ready(stack.envoy_sees_service)
    await wait_until(lambda: connected(running), "the new Envoy has its endpoints")
    async with running.chat() as response:
        assert response.status == 200
    assert await endpoints_of_envoy(running) == urls


async def test_an_envoy_that_starts_without_the_service_fails_open(launch: Launch) -> None:
    running = await launch(2, settings=ADS)
    stack = running.stack
    await stack.envoy.stop()
    await stack.service.stop()
    await stack.envoy.start()

    async def answered() -> bool:
        try:
            async with running.chat() as response:
                return bool(response.status == 200)
        except aiohttp.ClientError:
            return False

    await wait_until(answered, "Envoy sends requests to the workers", seconds=15)
    async with asking(running) as statuses:
        await stack.start_service()
        await wait_until(lambda: connected(running), "Envoy has its endpoints")
        await wait_until(lambda: decided(running), "the service decides")
    # Not one was decided before Envoy had the workers.
    assert set(statuses) == {200}
    assert await running.sample("extproc_destination_missed_total") == 0


async def decided(running: Running) -> bool:
    routed = 'extproc_requests_total{code="routed",path="/v1/chat/completions"}'

    async with running.chat() as response:
        assert response.status == 200
    return (await running.stack.metrics()).get(routed, 0) > 0


async def test_an_envoy_that_starts_without_the_service_answers_503_if_it_must_not_fail_open(
    launch: Launch,
) -> None:
    running = await launch(1, settings={"envoy": {"endpoints": "ads", "fail_open": False}})
    stack = running.stack
    await stack.envoy.stop()
    await stack.service.stop()
    await stack.envoy.start()

    async def refused() -> bool:
        try:
            async with running.chat() as response:
                return await running.error(response) == (503, "router_unavailable")
        except aiohttp.ClientError:
            return False

    await wait_until(refused, "Envoy answers", seconds=15)
    assert (await requests_of(running)) == [0]


async def test_an_envoy_fails_open_to_the_host_of_all_workers(launch: Launch) -> None:
    """The name stands for all workers, as a headless Service does."""

    def edit(bootstrap: dict[str, Any]) -> None:
        clusters = bootstrap["static_resources"]["clusters"]
        (pool,) = (one for one in clusters if one["name"] == "workers-fail-open")
        assert pool["cluster_type"]["name"] == "envoy.clusters.dns"
        (entry,) = pool["load_assignment"]["endpoints"][0]["lb_endpoints"]
        address = entry["endpoint"]["address"]["socket_address"]
        assert (address["address"], address["port_value"]) == ("localhost", 1)
        address["port_value"] = port_of[0]

    port_of: list[int] = []

    def settings(workers: Any) -> dict[str, Any]:
        port_of.append(int(workers[0].url.rpartition(":")[2]))
        return {"envoy": {"endpoints": "ads", "fail_open_host": "localhost:1"}}

    running = await launch(1, settings=settings, edit_bootstrap=edit)
    await running.stack.service.stop()

    async def answered() -> bool:
        async with running.chat() as response:
            return bool(response.status == 200)

    await wait_until(answered, "Envoy sends requests to the host", seconds=15)


async def test_an_envoy_fails_open_to_the_workers_that_it_has(launch: Launch) -> None:
    """As for pods without `envoy.fail_open_host`."""

    def edit(bootstrap: dict[str, Any]) -> None:
        resources = bootstrap["static_resources"]
        resources["clusters"] = [
            one for one in resources["clusters"] if one["name"] != "workers-fail-open"
        ]
        (manager,) = resources["listeners"][0]["filter_chains"][0]["filters"]
        routes = manager["typed_config"]["route_config"]
        routes["validate_clusters"] = False
        (host,) = routes["virtual_hosts"]
        (route,) = (one for one in host["routes"] if one["name"] == "fail_open")
        route["route"]["cluster"] = CLUSTER

    running = await launch(2, settings=ADS, edit_bootstrap=edit)
    await wait_until(lambda: connected(running), "Envoy has its endpoints")
    async with asking(running) as statuses:
        await running.stack.service.stop()
        count = len(statuses)

        async def more() -> bool:
            return len(statuses) > count + 50

        await wait_until(more, "further requests")
    assert set(statuses) == {200}
    # One that starts knows no worker.
    await running.stack.envoy.stop()
    await running.stack.envoy.start()

    async def refused() -> bool:
        try:
            async with running.chat() as response:
                return await running.error(response) == (503, "upstream_unreachable")
        except aiohttp.ClientError:
            return False

    await wait_until(refused, "Envoy answers", seconds=15)
