"""Discovery from EndpointSlices against a real API server."""

import asyncio
import random
from typing import Any

import pytest
from lightkube.resources.discovery_v1 import EndpointSlice

from extproc.clock import SystemClock
from extproc.discovery.kube_api import ApiTroubleError, KubeApi, WatchLimits, open_client
from extproc.workers.source import Added, DrainingChanged, Removed, RoleChanged, Vanished
from tests.unit.discovery.slices import endpoint, slice_of

from .cluster import Namespace, eventually
from .following import following_slices

A, B, C = (f"http://10.0.0.{n}:8000" for n in (1, 2, 3))
# Watches that end often: an open watch outlives a change of the permissions.
SHORT = WatchLimits(seconds=1)
TERMINATING = {"ready": False, "serving": True, "terminating": True}


def made(*endpoints: dict[str, Any], name: str = "slice-1", **fields: Any) -> EndpointSlice:
    """A slice to be written: the server gives the uid and the version."""
    found = slice_of(*endpoints, name=name, **fields)
    assert found.metadata is not None
    found.metadata.uid = found.metadata.resourceVersion = None
    return found


def one(n: int, **fields: Any) -> dict[str, Any]:
    return endpoint(f"10.0.0.{n}", f"pod-{n}", **fields)


async def test_workers_of_before_come_with_the_list_and_later_ones_with_the_watch(
    namespace: Namespace,
) -> None:
    await namespace.put(made(one(1)))
    async with following_slices(namespace) as found:
        await found.sees(A)
        await namespace.put(made(one(1), one(2)))
        await found.sees(A, B)
        await namespace.put(made(one(3), name="slice-2"))
        await found.sees(A, B, C)
        await namespace.client.delete(EndpointSlice, "slice-1", namespace=namespace.name)
        await found.sees(C)
        assert found.metric("up") == 1


async def test_an_empty_namespace_is_listed_without_workers(namespace: Namespace) -> None:
    async with following_slices(namespace) as found:
        await found.sees()


async def test_every_slice_that_the_server_accepts_can_be_read(namespace: Namespace) -> None:
    await namespace.put(made(one(1), name="good"))
    await namespace.put(made(name="no-endpoints", endpoints=None))
    await namespace.put(made(one(2), name="no-ports", ports=None))
    await namespace.put(made(one(3, conditions=None), name="no-conditions"))
    await namespace.put(made(endpoint("10.0.0.4", None), name="no-pod"))
    await namespace.put(made(endpoint("fd00::5", "pod-5"), name="ipv6", addressType="IPv6"))
    await namespace.put(made(endpoint("w.example", "pod-6"), name="fqdn", addressType="FQDN"))
    await namespace.put(made(one(7), name="other-service", labels={"app": "other"}))
    async with following_slices(namespace, port_name="http", port=9000) as found:
        await found.sees(
            A,
            "http://10.0.0.2:9000",
            C,
            "http://10.0.0.4:8000",
            "http://[fd00::5]:8000",
        )


async def test_a_pod_with_two_families_is_one_worker(namespace: Namespace) -> None:
    await namespace.put(made(endpoint("fd00::1", "pod-1"), name="v6", addressType="IPv6"))
    await namespace.put(made(one(1), name="v4"))
    async with following_slices(namespace) as found:
        await found.sees(A)
        assert len(found.workers) == 1
    async with following_slices(namespace, address_family="v6_only") as found:
        await found.sees("http://[fd00::1]:8000")


async def test_a_terminating_endpoint_drains_until_it_is_gone(namespace: Namespace) -> None:
    await namespace.put(made(one(1), one(2)))
    async with following_slices(namespace) as found:
        await found.sees(A, B)
        await namespace.put(made(one(1, conditions=TERMINATING), one(2)))
        await found.sees(B)
        assert found.draining == {"pod-1:8000"}
        assert Removed("pod-1:8000") not in found.log
        await namespace.put(made(one(2)))
        await eventually(lambda: "pod-1:8000" not in found.workers, "the endpoint is removed")


async def test_an_endpoint_that_is_not_ready_leaves_and_comes_again(namespace: Namespace) -> None:
    await namespace.put(made(one(1), one(2)))
    async with following_slices(namespace) as found:
        await found.sees(A, B)
        await namespace.put(made(one(1, conditions={"ready": False}), one(2)))
        await found.sees(B)
        await eventually(lambda: "pod-1:8000" not in found.workers, "it is removed")
        await namespace.put(made(one(1), one(2)))
        await found.sees(A, B)


@pytest.mark.parametrize("first", ["leaves", "appears"])
async def test_an_endpoint_that_moves_between_slices_is_not_restarted(
    namespace: Namespace, first: str
) -> None:
    await namespace.put(made(one(1), one(2)))
    async with following_slices(namespace) as found:
        await found.sees(A, B)
        if first == "leaves":
            await namespace.put(made(one(1)))
            await namespace.put(made(one(2), name="slice-2"))
        else:
            await namespace.put(made(one(2), name="slice-2"))
            await namespace.put(made(one(1)))
        await namespace.put(made(one(3), name="slice-3"))
        await found.sees(A, B, C)
        # Longer than a worker may be in no slice.
        await asyncio.sleep(3.5)
        await found.sees(A, B, C)
        assert not [event for event in found.log if isinstance(event, Removed)]
        # One that is in no slice for a moment stays in use: the service holds it.
        vanished = [event for event in found.log if isinstance(event, Vanished)]
        assert sum(isinstance(event, Added) for event in found.log) == 3 + len(vanished)


async def test_the_server_evaluates_the_plain_selector(namespace: Namespace) -> None:
    for n, labels in enumerate(({"app": "a"}, {"app": "b"}, {"app": "c"}, {"x": "y"}), 1):
        await namespace.put(made(one(n), name=f"slice-{n}", labels=labels))
    async with following_slices(namespace, label_selector="app in (a, b), !canary") as found:
        await found.sees(A, B)
        # A slice whose labels do not match any more is deleted for this watch.
        await namespace.put(made(one(1), name="slice-1", labels={"app": "a", "canary": "1"}))
        await found.sees(B)


async def test_roles_follow_the_labels_of_the_slices(namespace: Namespace) -> None:
    await namespace.put(made(one(1), labels={"app": "sglang", "role": "prefill"}))
    await namespace.put(made(one(2), name="slice-2", labels={"app": "sglang", "role": "decode"}))
    await namespace.put(made(one(3), name="slice-3", labels={"app": "other"}))
    async with following_slices(
        namespace,
        prefill_selector="role==prefill",
        decode_selector="role notin (prefill), app=sglang",
    ) as found:
        await found.sees(A, B)
        assert found.roles == {A: "prefill", B: "decode"}
        await namespace.put(made(one(1), labels={"app": "sglang", "role": "decode"}))
        await eventually(lambda: found.roles == {A: "decode", B: "decode"}, "the role changes")
        assert found.log[-1] == RoleChanged("pod-1:8000", "decode")


async def test_two_hundred_endpoints_come_and_go_in_twelve_slices(namespace: Namespace) -> None:
    chance = random.Random(7)
    slices: list[list[int]] = [[] for _ in range(12)]
    for n in range(200):
        slices[n % 12].append(n)

    def content(index: int) -> EndpointSlice:
        ends = [endpoint(f"10.1.{n // 250}.{n % 250 + 1}", f"pod-{n}") for n in slices[index]]
        return made(*ends, name=f"slice-{index}")

    def expected() -> set[str]:
        return {f"http://10.1.{n // 250}.{n % 250 + 1}:8000" for one in slices for n in one}

    for index in range(12):
        await namespace.put(content(index))
    async with following_slices(namespace, limits=SHORT) as found:
        await found.sees(*expected())
        fresh = 200
        for _ in range(100):
            index = chance.randrange(12)
            for _ in range(2):
                if slices[index]:
                    slices[index].pop(chance.randrange(len(slices[index])))
                slices[index].append(fresh)
                fresh += 1
            await namespace.put(content(index))
        await found.sees(*expected())
        await eventually(lambda: len(found.workers) == 200, "all that left are removed")
        assert found.metric("up") == 1


async def test_a_crash_of_the_server_loses_nothing_and_keeps_nothing_stale(
    namespace: Namespace,
) -> None:
    await namespace.put(made(one(1), one(2)))
    async with following_slices(namespace) as found:
        await found.sees(A, B)
        namespace.cluster.kill()
        await eventually(lambda: found.metric("up") == 0, "the outage is noticed")
        await eventually(
            lambda: found.metric("errors_total", reason="unreachable") >= 2, "lists fail, too"
        )
        assert found.urls() == {A, B}
        await asyncio.to_thread(namespace.cluster.start)
        await namespace.put(made(one(2), one(3)))
        await found.sees(B, C)
        assert found.metric("up") == 1


async def test_a_version_from_before_a_crash_is_expired(namespace: Namespace) -> None:
    await namespace.put(made(one(1)))
    namespace.cluster.kill()
    await asyncio.to_thread(namespace.cluster.start)
    await namespace.put(made(one(1), one(2)))
    api = KubeApi(open_client(namespace.kubeconfig), EndpointSlice, namespace=namespace.name)
    events = api.watch("1")
    with pytest.raises(ApiTroubleError) as caught:
        await anext(events)
    assert caught.value.reason == "expired"
    await api.close()


async def test_a_server_that_stops_answering_is_noticed(namespace: Namespace) -> None:
    await namespace.put(made(one(1)))
    limits = WatchLimits(silence_seconds=1.0)
    async with following_slices(namespace, limits=limits) as found:
        await found.sees(A)
        with namespace.cluster.frozen():
            await eventually(
                lambda: found.metric("errors_total", reason="timeout") >= 2, "lists time out"
            )
            assert found.metric("up") == 0
            assert found.urls() == {A}
        await namespace.put(made(one(1), one(2)))
        await found.sees(A, B)


async def test_workers_stay_while_the_account_is_forbidden_to_look(namespace: Namespace) -> None:
    await namespace.put(made(one(1)))
    async with following_slices(namespace, limits=SHORT) as found:
        await found.sees(A)
        await namespace.forbid()
        await eventually(
            lambda: found.metric("errors_total", reason="forbidden") >= 2, "it is refused"
        )
        assert found.metric("up") == 0
        assert found.urls() == {A}
        await namespace.put(made(one(2)))
        await namespace.allow()
        await found.sees(B)
        assert found.metric("up") == 1


async def test_a_token_that_is_replaced_is_read_again(namespace: Namespace) -> None:
    await namespace.put(made(one(1)))
    async with following_slices(namespace, limits=SHORT) as found:
        await found.sees(A)
        await namespace.replace_account()
        await namespace.put(made(one(2)))
        await found.sees(B)


async def test_watches_that_the_server_ends_are_followed_by_lists(namespace: Namespace) -> None:
    await namespace.put(made(one(1)))
    clock = SystemClock()
    async with following_slices(namespace, limits=SHORT) as found:
        await found.sees(A)
        end = clock.monotonic() + 4.0
        for n in range(2, 9):
            await namespace.put(made(one(1), one(n)))
            await found.sees(A, f"http://10.0.0.{n}:8000")
        await clock.sleep(max(0.0, end - clock.monotonic()))
        await namespace.put(made(one(1), one(2)))
        await found.sees(A, B)
        errors = [found.metric("errors_total", reason=one) for one in ("timeout", "unreachable")]
        assert errors == [0, 0]
        assert DrainingChanged("pod-1:8000", True) not in found.log
