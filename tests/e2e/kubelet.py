"""Runs a Deployment of the chart as processes: what a kubelet and two controllers do with it.

Each pod has an address of loopback and a folder in place of its network and its volumes. Commands,
configuration, probes, `preStop`, grace and the strategy of the roll-out are those of the rendered
objects. A gateway gets the addresses of ready pods in a file, some time after they have changed.
"""

import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import grpc.aio
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.testing.stack import ManagedProcess
from tests.helm.chart import Release

__all__ = ["Deployment", "Pod"]

_CONFIG_FOLDER: Final = "/etc/extproc"
_ANY_ADDRESS: Final = "0.0.0.0"
_SERVING: Final = 1
# A kubelet's default.
_PROBE_TIMEOUT_SECONDS: Final = 1
# How long a change of a pod is on its way to the gateway: the API server, the controller of the
# slices, the gateway's control plane.
_GATEWAY_LAG_SECONDS: Final = 1.0


class Pod:
    """One pod of a release in `mode: service`."""

    def __init__(self, release: Release, ip: str, folder: Path) -> None:
        folder.mkdir()
        self.ip = ip
        self.ready = False
        self.terminating = False
        self.killed = False
        self._container = release.container
        self._grace_seconds: int = release.pod["spec"]["terminationGracePeriodSeconds"]
        text = yaml.safe_dump(release.config).replace(_ANY_ADDRESS, ip)
        (folder / "extproc.yaml").write_text(text)
        arguments = [part.replace(_CONFIG_FOLDER, str(folder)) for part in self._container["args"]]
        command = [sys.executable, "-m", "extproc", *arguments]
        self.process = ManagedProcess(f"pod {ip}", command, folder / "service.log")

    async def start(self) -> None:
        """Start it; returns when it is ready. Fails if the startup probe gives up."""
        await self.process.start()
        probe = self._container["startupProbe"]
        for _ in range(probe["failureThreshold"]):
            if await self._passes(probe):
                break
            await asyncio.sleep(probe["periodSeconds"])
        else:
            raise AssertionError(f"the startup probe has failed:\n{self.process.tail()}")
        probe = self._container["readinessProbe"]
        while not await self._passes(probe):
            assert self.process.returncode is None, self.process.tail()
            await asyncio.sleep(probe["periodSeconds"])
        self.ready = True

    async def terminate(self) -> None:
        """The hook before the end, SIGTERM, and SIGKILL when the grace period is over."""
        ended = asyncio.create_task(self._end_well())
        done, _ = await asyncio.wait([ended], timeout=self._grace_seconds)
        if not done:
            self.killed = True
            ended.cancel()
            await self.process.stop(signal.SIGKILL)

    async def _end_well(self) -> None:
        await asyncio.sleep(self._container["lifecycle"]["preStop"]["sleep"]["seconds"])
        self.process.send(signal.SIGTERM)
        await self.process.ended()

    async def _passes(self, probe: Mapping[str, Any]) -> bool:
        target = f"{self.ip}:{probe['grpc']['port']}"
        request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
        async with grpc.aio.insecure_channel(target) as channel:
            check: Any = health_pb2_grpc.HealthStub(channel).Check
            try:
                timeout = probe.get("timeoutSeconds", _PROBE_TIMEOUT_SECONDS)
                answer = await check(request, timeout=timeout)
            except grpc.aio.AioRpcError:
                return False
        return bool(answer.status == _SERVING)


class Deployment:
    """The pods of one release, and the file by which a gateway knows them."""

    def __init__(self, folder: Path, cluster: str, port: int) -> None:
        self.endpoints_file = folder / "endpoints.json"
        self.pods: list[Pod] = []
        # All that there ever were.
        self.every: list[Pod] = []
        self._folder = folder
        self._cluster = cluster
        self._port = port
        self._background: set[asyncio.Task[None]] = set()
        self._write([])

    async def apply(self, release: Release) -> None:
        """Install or upgrade: returns when all pods are of this release, and others have ended."""
        spec = release.one("Deployment")["spec"]
        wanted: int = spec["replicas"]
        rolling = spec["strategy"]["rollingUpdate"]
        old = list(self.pods)
        most, least = wanted + rolling["maxSurge"], wanted - rolling["maxUnavailable"]
        new: list[Pod] = []
        while len(new) < wanted or old:
            if len(new) < wanted and (len(new) + len(old) < most or not old):
                new.append(self._make(release))
                await new[-1].start()
                self._tell_gateway()
            if old and sum(pod.ready for pod in (*new, *old)) > least:
                self._end(old.pop(0))
        while self._background:
            await asyncio.gather(*self._background)

    async def close(self) -> None:
        """Kill what still runs."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for pod in self.every:
            await pod.process.stop(signal.SIGKILL)

    def _make(self, release: Release) -> Pod:
        number = len(self.every) + 1
        pod = Pod(release, f"127.0.2.{number}", self._folder / f"pod-{number}")
        self.every.append(pod)
        self.pods.append(pod)
        return pod

    def _end(self, pod: Pod) -> None:
        self.pods.remove(pod)
        pod.ready, pod.terminating = False, True
        self._tell_gateway()
        self._start(pod.terminate())

    def _tell_gateway(self) -> None:
        async def later() -> None:
            await asyncio.sleep(_GATEWAY_LAG_SECONDS)
            self._write([pod.ip for pod in self.pods if pod.ready])

        self._start(later())

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _write(self, addresses: list[str]) -> None:
        endpoints = [
            {
                "endpoint": {
                    "address": {"socket_address": {"address": one, "port_value": self._port}}
                }
            }
            for one in addresses
        ]
        resource = {
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": self._cluster,
            "endpoints": [{"lb_endpoints": endpoints}],
        }
        beside = self.endpoints_file.with_suffix(".new")
        beside.write_text(json.dumps({"resources": [resource]}))
        # Envoy watches for files that are moved here.
        beside.replace(self.endpoints_file)
