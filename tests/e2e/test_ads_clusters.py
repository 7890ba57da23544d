"""Envoy has a cluster for each model and role, which come and go with the models, over ADS."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.pd_fleet import pd_stack
from tests.e2e.test_ads import ADS, asking, connected, state_of_the_world
from tests.e2e.test_replicas import Answers

FORMS = pytest.mark.parametrize("edit", [None, state_of_the_world], ids=["delta", "state"])


async def clusters_of_envoy(running: Running) -> dict[str, set[str]]:
    """The addresses in each cluster that Envoy has from the service."""
    url = f"{running.stack.envoy_admin_url}/clusters?format=json"
    async with running.http.get(url) as response:
        clusters = (await response.json(content_type=None))["cluster_statuses"]
    return {
        one["name"]: {
            "http://{address}:{port_value}".format(**host["address"]["socket_address"])
            for host in one.get("host_statuses", [])
        }
        for one in clusters
        if one.get("added_via_api")
    }


async def statistic(running: Running, name: str) -> float:
    url = f"{running.stack.envoy_admin_url}/stats?format=json&filter=^{name}$"
    async with running.http.get(url) as response:
        (found,) = (await response.json(content_type=None))["stats"]
    return float(found["value"])


async def test_a_request_never_leaves_the_workers_of_its_model(launch: Launch) -> None:
    settings = {"proxy": {"fallback_workers": 2}, **ADS}
    running = await launch(1, models=("a.1", "b"), settings=settings)
    first, second = running.fleet.workers

    async def known() -> bool:
        return await clusters_of_envoy(running) == {
            "workers/a.1/plain": {first.url},
            "workers/b/plain": {second.url},
        }

    await wait_until(known, "Envoy has both clusters")
    for model in ("a.1", "b"):
        async with running.chat(model) as response:
            assert response.status == 200
    # A dot would end the name.
    for name in ("workers/a_1/plain", "workers/b/plain"):
        assert await statistic(running, f"cluster[.]{name}[.]upstream_rq_total") == 1
    await first.stop()
    for _ in range(5):
        async with running.chat("a.1") as response:
            assert await running.error(response) == (503, "upstream_unreachable")
    assert await statistic(running, "cluster[.]workers/b/plain[.]upstream_rq_total") == 1


async def test_a_pair_has_a_cluster_for_each_role(tmp_path: Path) -> None:
    async with pd_stack(tmp_path, prefills=1, decodes=2, settings=ADS) as running:
        prefill, *decodes = running.prefills + running.decodes

        async def known() -> bool:
            return await clusters_of_envoy(running) == {
                "workers/m/prefill": {prefill.url},
                "workers/m/decode": {one.url for one in decodes},
            }

        await wait_until(known, "Envoy has both clusters")
        for _ in range(4):
            async with running.chat(tokens=3) as response:
                assert response.status == 200
        assert await statistic(running, "cluster[.]workers/m/decode[.]upstream_rq_total") == 4
        assert await statistic(running, "cluster[.]workers/m/prefill[.]upstream_rq_total") == 0
        assert await running.sample("extproc_destination_missed_total") == 0


@FORMS
async def test_models_come_and_go_by_reload_and_no_request_or_stream_fails(
    launch: Launch, edit: Any
) -> None:
    both = [{"id": "stays"}, {"id": "comes"}]
    running = await launch(
        1,
        models=("stays", "comes"),
        settings=ADS | {"models": both[:1]},
        edit_bootstrap=edit,
    )
    stack = running.stack

    async def without() -> bool:
        return set(await clusters_of_envoy(running)) == {"workers/stays/plain"}

    await wait_until(without, "Envoy has the cluster of one model")

    async def served() -> bool:
        async with running.chat("comes", tokens=1) as response:
            return bool(response.status == 200)

    answers = Answers(running, model="stays")
    async with answers.flowing():
        stack.config["models"] = both
        assert (await stack.reload())["problems"] == []
        await wait_until(served, "the new model is served")
        async with running.chat("comes", tokens=1000, stream=True) as response:
            assert response.status == 200
            stack.config["models"] = both[:1]
            assert (await stack.reload())["problems"] == []
            await wait_until(without, "Envoy does not have the cluster any more")
            assert not response.content.at_eof()
            assert (await response.text()).rstrip().endswith("data: [DONE]")
    assert set(answers.statuses) == {200}


@FORMS
async def test_a_changed_cluster_takes_the_place_of_the_old_one_and_no_request_fails(
    launch: Launch, edit: Any
) -> None:
    running = await launch(2, settings=ADS, edit_bootstrap=edit)
    stack = running.stack
    await wait_until(lambda: connected(running), "Envoy has its endpoints")
    updates = "cluster_manager[.]cluster_modified"
    async with asking(running) as statuses:
        for seconds in (3, 4):
            before = await statistic(running, updates)
            stack.config["proxy"] = {"connect_timeout_secs": seconds}
            assert (await stack.reload())["problems"] == []

            async def changed(before: float = before) -> bool:
                warming = await statistic(running, "cluster_manager[.]warming_clusters")
                return await statistic(running, updates) > before and warming == 0

            await wait_until(changed, "Envoy uses the changed cluster")
            count = len(statuses)

            async def more(count: int = count) -> bool:
                return len(statuses) > count + 30

            await wait_until(more, "further requests")
    assert set(statuses) == {200}
    assert await running.sample("extproc_destination_missed_total") == 0


@FORMS
async def test_a_service_that_starts_with_other_clusters_fails_no_request(
    launch: Launch, edit: Any
) -> None:
    running = await launch(2, settings=ADS, edit_bootstrap=edit)
    stack = running.stack
    await wait_until(lambda: connected(running), "Envoy has its endpoints")
    async with asking(running) as statuses:
        await stack.service.stop()
        stack.config["proxy"] = {"connect_timeout_secs": 3}
        stack.write_config()
        await stack.start_service()
        await wait_until(lambda: connected(running), "Envoy is connected again")
        count = len(statuses)

        async def more() -> bool:
            return len(statuses) > count + 200

        # Longer than Envoy waits for the endpoints of a cluster.
        await asyncio.gather(wait_until(more, "further requests"), asyncio.sleep(2.5))
    assert set(statuses) == {200}
    assert await running.sample("extproc_destination_missed_total") == 0
