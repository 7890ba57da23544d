"""The whole service and the real Envoy with workers that a real API server names.

The workers are simulators on loopback addresses, which an API server accepts for pods.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from extproc.testing.stack import wait_until

from .cluster import Namespace
from .installation import Installation, installation, port_of
from .pods import end_pod, run_pod


@pytest.fixture
async def installed(namespace: Namespace, tmp_path: Path) -> AsyncIterator[Installation]:
    settings = {"envoy": {"endpoints_file": str(tmp_path / "endpoints.json")}}
    async with installation(namespace, tmp_path, settings) as found:
        yield found


async def test_a_pod_that_is_deleted_finishes_its_streams_and_gets_no_others(
    namespace: Namespace, installed: Installation
) -> None:
    leaving, staying = [await installed.start_worker() for _ in range(2)]
    for n, worker in enumerate((leaving, staying), 1):
        await run_pod(namespace, n, ip="127.0.0.1", port=int(port_of(worker)))
    async with installed.stack:
        await installed.shows(**{port_of(leaving): True, port_of(staying): True})
        # Round robin: one of the two streams is on the worker that leaves.
        async with (
            installed.chat(200, stream=True) as one,
            installed.chat(200, stream=True) as other,
        ):
            assert one.status == other.status == 200
            assert await installed.served_by(leaving) == 1
            await end_pod(namespace, 1, grace_seconds=60)
            await installed.shows(**{port_of(leaving): "draining", port_of(staying): True})
            for _ in range(10):
                async with installed.chat(1) as answer:
                    assert answer.status == 200
            assert await installed.served_by(leaving) == 1
            bodies = [await one.text(), await other.text()]
        assert [body.rstrip().endswith("data: [DONE]") for body in bodies] == [True, True]
        await end_pod(namespace, 1, grace_seconds=0)
        await installed.shows(**{port_of(staying): True})


async def test_trouble_of_the_api_server_and_a_list_that_is_too_short_take_no_worker_away(
    namespace: Namespace, installed: Installation
) -> None:
    one, two = [await installed.start_worker() for _ in range(2)]
    for n, worker in enumerate((one, two), 1):
        await run_pod(namespace, n, ip="127.0.0.1", port=int(port_of(worker)))
    statuses: list[int] = []
    async with installed.stack:
        both = {port_of(one): True, port_of(two): True}
        await installed.shows(**both)
        await installed.is_stale(False, False)
        stop = asyncio.Event()

        async def ask() -> None:
            while not stop.is_set():
                async with installed.chat(2) as answer:
                    await answer.read()
                    statuses.append(answer.status)

        asking = asyncio.create_task(ask())
        await namespace.forbid()
        namespace.cluster.kill()
        await installed.is_stale(True, True)
        namespace.cluster.start()
        await asyncio.sleep(2.0)
        await installed.is_stale(True, True)
        # During the trouble a pod disappears without a sign; its engine serves on.
        await end_pod(namespace, 1, grace_seconds=0)
        await namespace.allow()
        await installed.is_stale(True, False)
        before = await installed.served_by(one)
        await installed.shows(**both)
        await asyncio.sleep(1.0)
        assert await installed.served_by(one) > before
        # The pod is made again, as another one.
        await run_pod(namespace, 1, ip="127.0.0.1", port=int(port_of(one)))
        await installed.is_stale(False, False)
        stop.set()
        await asking
    assert set(statuses) == {200}


async def test_a_worker_that_vanishes_and_does_not_answer_is_not_held(
    namespace: Namespace, installed: Installation
) -> None:
    ending, staying = [await installed.start_worker() for _ in range(2)]
    for n, worker in enumerate((ending, staying), 1):
        await run_pod(namespace, n, ip="127.0.0.1", port=int(port_of(worker)))
    async with installed.stack:
        await installed.shows(**{port_of(ending): True, port_of(staying): True})
        namespace.cluster.kill()
        await installed.is_stale(True, True)
        namespace.cluster.start()
        await ending.stop()
        await end_pod(namespace, 1, grace_seconds=0)
        await installed.shows(**{port_of(staying): True})


async def test_workers_are_replaced_one_by_one_without_a_failed_request(
    namespace: Namespace, installed: Installation
) -> None:
    first = [await installed.start_worker() for _ in range(3)]
    for n, worker in enumerate(first, 1):
        await run_pod(namespace, n, ip="127.0.0.1", port=int(port_of(worker)))
    statuses: list[int] = []
    async with installed.stack:
        stop = asyncio.Event()

        async def ask() -> None:
            while not stop.is_set():
                async with installed.chat(5) as answer:
                    await answer.read()
                    statuses.append(answer.status)

        asking = [asyncio.create_task(ask()) for _ in range(4)]
        there = {port_of(worker): True for worker in first}
        await installed.shows(**there)
        for n, old in enumerate(first, 1):
            new = await installed.start_worker()
            await run_pod(namespace, 10 + n, ip="127.0.0.1", port=int(port_of(new)))
            there[port_of(new)] = True
            await installed.shows(**there)
            await end_pod(namespace, n, grace_seconds=60)
            await installed.shows(**(there | {port_of(old): "draining"}))
            await end_pod(namespace, n, grace_seconds=0)
            del there[port_of(old)]
            await installed.shows(**there)
        stop.set()
        await asyncio.gather(*asking)
    assert set(statuses) == {200}
    assert len(statuses) > 20


async def test_a_service_that_starts_while_a_pod_terminates_gives_it_no_requests(
    namespace: Namespace, installed: Installation
) -> None:
    leaving, staying = [await installed.start_worker() for _ in range(2)]
    for n, worker in enumerate((leaving, staying), 1):
        await run_pod(namespace, n, ip="127.0.0.1", port=int(port_of(worker)))
    async with installed.stack:
        await installed.shows(**{port_of(leaving): True, port_of(staying): True})
        await end_pod(namespace, 1, grace_seconds=60)
        await installed.shows(**{port_of(leaving): "draining", port_of(staying): True})
        await installed.stack.service.stop()
        await installed.stack.start_service()
        await installed.shows(**{port_of(leaving): "draining", port_of(staying): True})
        assert await installed.sample("extproc_workers_draining") == 1
        await wait_until(installed.stack.envoy_sees_service, "Envoy has connected again")
        served = await installed.served_by(leaving)
        for _ in range(10):
            async with installed.chat(1) as answer:
                assert answer.status == 200
        assert await installed.served_by(leaving) == served
        await end_pod(namespace, 1, grace_seconds=0)
        await installed.shows(**{port_of(staying): True})
