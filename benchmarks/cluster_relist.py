"""Measures how long the event loop is held while discovery lists a cluster again.

    python -m benchmarks.cluster_relist [--endpoints 1000] [--slices 12]

The parts of the service from the API server's answer to Envoy's endpoints follow slices, with an
API server and engines that answer from memory. A task that does nothing but yield measures how long
each turn of the event loop takes, in CPU time: other processes of the machine do not count.
"""

import argparse
import asyncio
import gc
import json
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import httpx2
import structlog
import uvloop
from lightkube.resources.discovery_v1 import EndpointSlice

from extproc.build import build_manager, build_shared
from extproc.config.models import ModelConfig
from extproc.config.schema import Config, DiscoveryConfig, K8sConfig
from extproc.discovery.cluster_objects import ClusterObjects
from extproc.discovery.endpoint_slices import SliceReader
from extproc.discovery.kube_api import KubeApi, open_client
from extproc.discovery.list_watch import ListWatch
from extproc.worker_url import WorkerUrl
from extproc.workers.engine_calls import EngineAnswer, EngineUnreachableError
from extproc.xds.publisher import Publisher

# As in the service: see app.serve.
_GC_THRESHOLDS: Final = (20_000, 50, 100)
_ENGINE_SECONDS: Final = 0.2
_PHASE_SECONDS: Final = 5.0
_KUBECONFIG: Final = {
    "current-context": "c",
    "clusters": [{"name": "c", "cluster": {"server": "https://api.test"}}],
    "users": [{"name": "u", "user": {"token": "t"}}],
    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
}


class _Watch(httpx2.AsyncByteStream):
    """Sends nothing until its end."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        await self.ended.wait()
        return
        yield b""


class _ApiServer(httpx2.AsyncBaseTransport):
    """Answers lists with `page`; `end_watches` makes its client list again."""

    def __init__(self, page: bytes) -> None:
        self.page = page
        self._watches: list[_Watch] = []

    def end_watches(self) -> None:
        for watch in self._watches:
            watch.ended.set()
        self._watches.clear()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.params.get("watch") == "true":
            self._watches.append(_Watch())
            return httpx2.Response(200, stream=self._watches[-1])
        return httpx2.Response(200, content=self.page)


class _Engines:
    """All of one generation serve the model "m"; they answer after some time."""

    def __init__(self) -> None:
        self.generation = 0

    async def get(self, url: WorkerUrl, path: str, timeout_seconds: float) -> EngineAnswer:
        await asyncio.sleep(random.random() * _ENGINE_SECONDS)
        if url.host.split(".")[1] != str(self.generation):
            raise EngineUnreachableError("the pod is gone")
        return EngineAnswer(200, b'{"served_model_name": "m"}')


class _LongestTurn:
    """The longest turn of the event loop, in seconds of CPU time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def watch(self) -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.seconds, before = max(self.seconds, now - before), now


def _endpoint(n: int, generation: int) -> dict[str, Any]:
    return {
        "addresses": [f"10.{generation}.{n // 256}.{n % 256}"],
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": f"node-{n % 50}",
        "zone": "zone-a",
        "targetRef": {
            "kind": "Pod",
            "namespace": "n",
            "name": f"w-{n}",
            "uid": f"{generation}-{n}",
        },
    }


def _page(endpoints: int, slices: int, generation: int) -> bytes:
    """A list of all slices, as the API server answers it."""
    items = [
        {
            "metadata": {"name": f"s-{one}", "namespace": "n", "uid": f"s-{one}"},
            "addressType": "IPv4",
            "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
            "endpoints": [_endpoint(n, generation) for n in range(one, endpoints, slices)],
        }
        for one in range(slices)
    ]
    return json.dumps({"metadata": {"resourceVersion": "1"}, "items": items}).encode()


def _source(server: _ApiServer, shared: Any, folder: Path) -> ClusterObjects[EndpointSlice]:
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(json.dumps(_KUBECONFIG))
    api = KubeApi(open_client(str(kubeconfig), server), EndpointSlice, namespace="n")
    list_watch = ListWatch(
        api,
        "endpointslices",
        clock=shared.clock,
        random=shared.random,
        metrics=shared.metrics.discovery,
        health=shared.sources,
    )
    reader = SliceReader(roles=[], port_name="http", port=None, family="v4_preferred")
    return ClusterObjects(list_watch, reader.read, "endpointslices", shared.clock)


async def _measure(endpoints: int, slices: int, folder: Path) -> None:
    config = Config(
        models=[ModelConfig(id="m")],
        discovery=DiscoveryConfig(backend="k8s", k8s=K8sConfig(namespace="n", label_selector="a")),
    )
    shared, server = build_shared(config), _ApiServer(_page(endpoints, slices, 0))
    engines = _Engines()
    manager = build_manager(config, shared, engines, _source(server, shared, folder))
    publisher = Publisher(
        config,
        shared.registry,
        shared.clock,
        shared.metrics,
        all_named=lambda: manager.first_round_done,
    )
    manager.observe(publisher)
    turn = _LongestTurn()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    running = [asyncio.create_task(one) for one in (manager.run(), publisher.run(), turn.watch())]
    print(f"{endpoints} endpoints in {slices} slices, {len(server.page)} bytes\n")
    print(f"{'':36} longest turn")
    for name, generation in (
        ("first list", 0),
        ("list again, nothing has changed", 0),
        ("list again, nothing has changed", 0),
        ("list again, all pods are others", 1),
        ("list again, all pods are others", 2),
    ):
        server.page = _page(endpoints, slices, generation)
        engines.generation = generation
        turn.seconds = 0.0
        server.end_watches()
        await asyncio.sleep(_PHASE_SECONDS)
        assert len(shared.registry.pool_of("m", "plain")) == endpoints
        print(f"{name:36} {turn.seconds * 1e3:9.1f} ms")
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoints", type=int, default=1000)
    parser.add_argument("--slices", type=int, default=12)
    given = parser.parse_args()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    with (
        TemporaryDirectory() as folder,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(_measure(given.endpoints, given.slices, Path(folder)))


if __name__ == "__main__":
    main()
