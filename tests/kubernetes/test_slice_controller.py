"""Discovery from the EndpointSlices that the controller of Kubernetes writes for Services."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from lightkube.resources.core_v1 import Service
from lightkube.resources.discovery_v1 import EndpointSlice
from lightkube.types import PatchType

from .cluster import Cluster, Namespace, eventually
from .following import following_slices
from .pods import end_pod, run_pod, set_labels, set_status
from .services import make_node, make_service

A, B, C = (f"http://10.0.0.{n}:8000" for n in (1, 2, 3))
# As many as the controller puts into one slice, and some more.
MORE_THAN_ONE_SLICE = 120


@pytest.fixture
async def services(namespace: Namespace) -> AsyncIterator[Namespace]:
    """The namespace, with the controller at work; it skips pods of nodes that do not exist."""
    await make_node(namespace)
    with namespace.cluster.slice_controller():
        yield namespace


async def test_pods_of_a_service_join_and_leave_as_they_become_ready(services: Namespace) -> None:
    await make_service(services, "workers", {"app": "sglang"}, app="sglang")
    await run_pod(services, 1)
    await run_pod(services, 2, ready=False)
    async with following_slices(services, port_name="http") as found:
        await found.sees(A)
        await set_status(services, 2, ready=True)
        await found.sees(A, B)
        await run_pod(services, 3)
        await found.sees(A, B, C)
        await set_status(services, 1, ready=False)
        await found.sees(B, C)
        await end_pod(services, 2, grace_seconds=0)
        await found.sees(C)


async def test_a_pod_that_is_deleted_drains_until_it_is_gone(services: Namespace) -> None:
    await make_service(services, "workers", {"app": "sglang"}, app="sglang")
    leaving = await run_pod(services, 1)
    await run_pod(services, 2)
    async with following_slices(services) as found:
        await found.sees(A, B)
        await end_pod(services, 1, grace_seconds=60)
        await found.sees(B)
        assert found.draining == {leaving}
        await set_status(services, 1, ready=False)
        await eventually(lambda: leaving not in found.workers, "the pod does not serve any more")
        await end_pod(services, 1, grace_seconds=0)
        await found.sees(B)


async def test_a_pod_of_the_same_address_is_another_worker(services: Namespace) -> None:
    await make_service(services, "workers", {"app": "sglang"}, app="sglang")
    first = await run_pod(services, 1)
    async with following_slices(services) as found:
        await found.sees(A)
        await end_pod(services, 1, grace_seconds=0)
        second = await run_pod(services, 1)
        await eventually(lambda: set(found.workers) == {second}, f"{first} is replaced")


async def test_roles_come_from_the_labels_of_the_services(services: Namespace) -> None:
    await make_service(services, "prefill", {"app": "sglang", "role": "prefill"}, role="p")
    await make_service(services, "decode", {"app": "sglang", "role": "decode"}, role="d")
    await run_pod(services, 1, {"role": "p"})
    await run_pod(services, 2, {"role": "d"})
    async with following_slices(
        services, prefill_selector="role=prefill", decode_selector="role=decode"
    ) as found:
        await found.sees(A, B)
        assert found.roles == {A: "prefill", B: "decode"}
        # The pod leaves one Service and joins the other, whose slice may come first or last.
        await set_labels(services, 1, role="d")
        await eventually(lambda: found.roles == {A: "decode", B: "decode"}, str(found.roles))


async def test_a_service_that_loses_its_label_is_not_followed_any_more(
    services: Namespace,
) -> None:
    await make_service(services, "workers", {"app": "sglang"}, app="sglang")
    await run_pod(services, 1)
    async with following_slices(services) as found:
        await found.sees(A)
        await services.client.patch(
            Service,
            "workers",
            {"metadata": {"labels": {"app": None}}},
            namespace=services.name,
            patch_type=PatchType.MERGE,
        )
        await found.sees()


async def test_pods_that_fill_several_slices_are_all_workers(services: Namespace) -> None:
    await make_service(services, "workers", {"app": "sglang"}, app="sglang")
    numbers = range(1, MORE_THAN_ONE_SLICE + 1)
    urls = [f"http://10.0.0.{n}:8000" for n in numbers]
    async with following_slices(services) as found:
        await asyncio.gather(*(run_pod(services, n) for n in numbers))
        await found.sees(*urls)
        slices = [one async for one in services.client.list(EndpointSlice, namespace=services.name)]
        assert len(slices) > 1
        await asyncio.gather(*(end_pod(services, n, grace_seconds=0) for n in numbers[::2]))
        await found.sees(*urls[1::2])


async def test_changes_while_the_controller_is_away_come_when_it_is_back(
    namespace: Namespace, cluster: Cluster
) -> None:
    await make_node(namespace)
    await make_service(namespace, "workers", {"app": "sglang"}, app="sglang")
    await run_pod(namespace, 1)
    async with following_slices(namespace) as found:
        with cluster.slice_controller():
            await found.sees(A)
        await end_pod(namespace, 1, grace_seconds=0)
        await run_pod(namespace, 2)
        with cluster.slice_controller():
            await found.sees(B)
