"""Discovery from an InferencePool against a real API server, with the kind's real definition."""

from pathlib import Path
from typing import Any

import pytest
from lightkube.generic_resource import create_namespaced_resource
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.types import PatchType

from extproc.workers.source import Added

from .cluster import Namespace, eventually
from .following import following_pool
from .installation import installation, port_of
from .pods import end_pod, run_pod

_POOL = create_namespaced_resource(
    "inference.networking.k8s.io", "v1", "InferencePool", "inferencepools"
)


pytestmark = pytest.mark.usefixtures("kinds")


def spec(labels: dict[str, str], *ports: int) -> dict[str, Any]:
    return {
        "selector": {"matchLabels": labels},
        "targetPorts": [{"number": port} for port in ports],
        "endpointPickerRef": {"name": "router", "port": {"number": 9002}},
    }


async def make_pool(namespace: Namespace, *ports: int, name: str = "pool", **labels: str) -> None:
    metadata = ObjectMeta(name=name, namespace=namespace.name)
    made = _POOL(metadata=metadata, spec=spec(labels or {"app": "sglang"}, *ports))
    await namespace.client.create(made)


async def change_pool(namespace: Namespace, *ports: int, **labels: str) -> None:
    change = {"spec": spec(labels or {"app": "sglang"}, *ports)}
    await namespace.client.patch(
        _POOL, "pool", change, namespace=namespace.name, patch_type=PatchType.MERGE
    )


def at(*places: tuple[int, int]) -> list[str]:
    return [f"http://10.0.0.{n}:{port}" for n, port in places]


async def test_each_pod_is_a_worker_at_each_target_port(namespace: Namespace) -> None:
    await make_pool(namespace, 8000, 8001, name="pool")
    await make_pool(namespace, 7000, name="other-pool")
    await run_pod(namespace, 1)
    await run_pod(namespace, 2, {"app": "other"})
    await run_pod(namespace, 3, ready=False)
    async with following_pool(namespace) as found:
        await found.sees(*at((1, 8000), (1, 8001)))
        await run_pod(namespace, 4)
        await found.sees(*at((1, 8000), (1, 8001), (4, 8000), (4, 8001)))
        await end_pod(namespace, 1, grace_seconds=60)
        await found.sees(*at((4, 8000), (4, 8001)))
        assert len(found.draining) == 2


async def test_a_change_of_the_pool_is_followed_and_others_stay(namespace: Namespace) -> None:
    await make_pool(namespace, 8000)
    await run_pod(namespace, 1, {"zone": "a"})
    await run_pod(namespace, 2, {"zone": "b"})
    async with following_pool(namespace) as found:
        await found.sees(*at((1, 8000), (2, 8000)))
        await change_pool(namespace, 8000, 8001)
        await found.sees(*at((1, 8000), (2, 8000), (1, 8001), (2, 8001)))
        assert sum(isinstance(event, Added) for event in found.log) == 4
        await change_pool(namespace, 8000, app="sglang", zone="b")
        await found.sees(*at((2, 8000)))
        assert sum(isinstance(event, Added) for event in found.log) == 4
        # The new watch follows the new selector.
        await run_pod(namespace, 3, {"zone": "b"})
        await run_pod(namespace, 4, {"zone": "a"})
        await run_pod(namespace, 5, {"zone": "b"})
        await found.sees(*at((2, 8000), (3, 8000), (5, 8000)))


async def test_without_the_pool_there_are_no_workers_at_once(namespace: Namespace) -> None:
    await run_pod(namespace, 1)
    async with following_pool(namespace) as found:
        await found.sees()
        await make_pool(namespace, 8000)
        await found.sees(*at((1, 8000)))
        await namespace.client.delete(_POOL, "pool", namespace=namespace.name)
        await eventually(lambda: not found.workers, "all workers are removed")
        await make_pool(namespace, 8001)
        await found.sees(*at((1, 8001)))


async def test_a_pool_of_prefill_and_decode_pods_has_roles(namespace: Namespace) -> None:
    await make_pool(namespace, 8000)
    await run_pod(namespace, 1, {"llm-d.ai/role": "prefill"})
    await run_pod(namespace, 2, {"llm-d.ai/role": "decode"})
    selectors = {
        "prefill_selector": "llm-d.ai/role=prefill",
        "decode_selector": "llm-d.ai/role=decode",
    }
    async with following_pool(namespace, **selectors) as found:
        await found.sees(*at((1, 8000), (2, 8000)))
        assert list(found.roles.values()) == ["prefill", "decode"]


async def test_workers_stay_while_the_server_is_down(namespace: Namespace) -> None:
    await make_pool(namespace, 8000)
    await run_pod(namespace, 1)
    async with following_pool(namespace) as found:
        await found.sees(*at((1, 8000)))
        namespace.cluster.kill()
        await eventually(lambda: found.metric("up") == 0, "the outage is noticed")
        assert found.urls() == set(at((1, 8000)))
        namespace.cluster.start()
        await run_pod(namespace, 2)
        await found.sees(*at((1, 8000), (2, 8000)))


async def test_requests_get_503_while_there_is_no_pool(
    namespace: Namespace, tmp_path: Path
) -> None:
    settings = {"envoy": {"endpoints": "ads"}}
    async with installation(namespace, tmp_path, settings, backend="inference_pool") as installed:
        worker = await installed.start_worker()
        await make_pool(namespace, worker.port)
        await run_pod(namespace, 1, ip="127.0.0.1")

        async def statuses() -> tuple[int, str]:
            async with installed.chat(1) as answer:
                await answer.read()
                return answer.status, answer.headers.get("x-router-error-code", "")

        async with installed.stack:
            await installed.shows(**{port_of(worker): True})
            assert await statuses() == (200, "")
            await namespace.client.delete(_POOL, "pool", namespace=namespace.name)
            await installed.shows()
            assert await statuses() == (503, "no_healthy_workers")
            await make_pool(namespace, worker.port)
            await installed.shows(**{port_of(worker): True})
            assert await statuses() == (200, "")
            assert await installed.served_by(worker) == 2


async def test_a_pod_is_a_worker_at_each_of_eight_ports(namespace: Namespace) -> None:
    ports = range(8000, 8008)
    await make_pool(namespace, *ports)
    await run_pod(namespace, 1)
    async with following_pool(namespace) as found:
        await found.sees(*at(*((1, port) for port in ports)))
