"""Discovery from pods against a real API server; the tests write what a kubelet would."""

from typing import Any

import pytest

from extproc.discovery.kube_api import WatchLimits
from extproc.workers.source import Added, Removed, RoleChanged

from .cluster import Namespace, eventually
from .following import following_pods
from .pods import end_pod, run_pod, set_labels, set_status

A, B, C = (f"http://10.0.0.{n}:8000" for n in (1, 2, 3))
SHORT = WatchLimits(seconds=1)


async def test_pods_join_when_they_are_ready_and_leave_when_they_are_not(
    namespace: Namespace,
) -> None:
    await run_pod(namespace, 1)
    await run_pod(namespace, 2, ready=False)
    await run_pod(namespace, 3, {"app": "other"})
    async with following_pods(namespace) as found:
        await found.sees(A)
        await set_status(namespace, 2, ready=True)
        await found.sees(A, B)
        await set_status(namespace, 1, ready=False)
        await found.sees(B)


async def test_a_deleted_pod_drains_until_it_is_gone(namespace: Namespace) -> None:
    worker = await run_pod(namespace, 1)
    await run_pod(namespace, 2)
    async with following_pods(namespace) as found:
        await found.sees(A, B)
        await end_pod(namespace, 1, grace_seconds=60)
        await found.sees(B)
        assert found.draining == {worker}
        # Its probe fails while it stops; its streams still run.
        await set_status(namespace, 1, ready=False)
        await run_pod(namespace, 3)
        await found.sees(B, C)
        assert found.draining == {worker}
        await end_pod(namespace, 1, grace_seconds=0)
        await eventually(lambda: worker not in found.workers, "the pod is gone")


async def test_a_pod_that_is_reborn_at_its_address_is_another_worker(namespace: Namespace) -> None:
    before = await run_pod(namespace, 1)
    async with following_pods(namespace) as found:
        await found.sees(A)
        await end_pod(namespace, 1, grace_seconds=0)
        after = await run_pod(namespace, 1)
        await eventually(lambda: set(found.workers) == {after}, "the new pod is there alone")
        assert found.log.index(Removed(before)) < len(found.log) - 1
        await found.sees(A)


async def test_a_label_flips_the_role_of_a_pod(namespace: Namespace) -> None:
    worker = await run_pod(
        namespace, 1, {"role": "prefill"}, annotations={"sglang.ai/bootstrap-port": "8998"}
    )
    await run_pod(namespace, 2, {"role": "decode"})
    section: dict[str, Any] = {
        "label_selector": "app in (sglang)",
        "prefill_selector": "role in (prefill)",
        "decode_selector": "role notin (prefill, idle)",
    }
    async with following_pods(namespace, **section) as found:
        await found.sees(A, B)
        assert found.roles == {A: "prefill", B: "decode"}
        assert found.workers[worker].bootstrap_port == 8998
        await set_labels(namespace, 2, role="prefill")
        await eventually(lambda: found.roles[B] == "prefill", "the role changes")
        assert isinstance(found.log[-1], RoleChanged)
        await set_labels(namespace, 2, role="idle")
        await found.sees(A)


async def test_only_leaders_of_groups_are_workers(namespace: Namespace) -> None:
    index = "leaderworkerset.sigs.k8s.io/worker-index"
    for n in (1, 2, 3):
        await run_pod(namespace, n, {index: str(n - 1)})
    async with following_pods(namespace) as found:
        await found.sees(A)


@pytest.mark.parametrize("family", ["v4_preferred", "v6_preferred"])
async def test_a_pod_with_two_families_is_one_worker(namespace: Namespace, family: str) -> None:
    await run_pod(namespace, 1, more_ips=("fd00::1",))
    async with following_pods(namespace, address_family=family) as found:
        await found.sees(A if family == "v4_preferred" else "http://[fd00::1]:8000")
        assert len([event for event in found.log if isinstance(event, Added)]) == 1


async def test_pods_stay_while_the_server_is_down(namespace: Namespace) -> None:
    await run_pod(namespace, 1)
    async with following_pods(namespace, limits=SHORT) as found:
        await found.sees(A)
        namespace.cluster.kill()
        await eventually(lambda: found.metric("up") == 0, "the outage is noticed")
        assert found.urls() == {A}
        namespace.cluster.start()
        await run_pod(namespace, 2)
        await end_pod(namespace, 1, grace_seconds=0)
        await found.sees(B)
