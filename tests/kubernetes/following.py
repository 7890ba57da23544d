"""Follows a namespace with the real source, as the service does."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Any, Self

from prometheus_client import CollectorRegistry

from extproc.clock import SystemClock
from extproc.config.schema import InferencePoolConfig, K8sConfig, K8sPodsConfig
from extproc.discovery.cluster_source import SourceParts
from extproc.discovery.endpoint_slices import slice_source
from extproc.discovery.inference_pool import pool_source
from extproc.discovery.kube_api import WatchLimits
from extproc.discovery.pods import pod_source
from extproc.metrics.service import Metrics
from extproc.workers.source import (
    Added,
    DrainingChanged,
    Listed,
    Removed,
    RoleChanged,
    Vanished,
    WorkerEvent,
    WorkerSource,
)
from extproc.workers.worker import WorkerSpec

from .cluster import Namespace, eventually

__all__ = ["Following", "following_pods", "following_pool", "following_slices"]


class Following:
    """What the events of a source add up to; `log` has all of them."""

    def __init__(self, prometheus: CollectorRegistry, objects: str) -> None:
        self.log: list[WorkerEvent] = []
        self.workers: dict[str, WorkerSpec] = {}
        self.roles: dict[str, str] = {}
        self.draining: set[str] = set()
        self.vanished: set[str] = set()
        self.listed = False
        self._prometheus = prometheus
        self._objects = objects

    async def run(self, source: WorkerSource) -> None:
        async for event in source.events():
            self._take(event)

    def _take(self, event: WorkerEvent) -> None:
        self.log.append(event)
        match event:
            case Added(spec):
                assert spec.id not in self.workers
                self.vanished.discard(spec.id)
                self.workers[spec.id] = spec
                self.roles[str(spec.url)] = spec.role
            case Removed(worker_id) if worker_id in self.vanished:
                self.vanished.discard(worker_id)
            case Vanished(spec):
                del self.workers[spec.id]
                self.roles.pop(str(spec.url), None)
                self.vanished.add(spec.id)
            case Removed(worker_id):
                self.roles.pop(str(self.workers.pop(worker_id).url), None)
                self.draining.discard(worker_id)
            case RoleChanged(worker_id, role):
                self.roles[str(self.workers[worker_id].url)] = role
            case DrainingChanged(worker_id, draining):
                (self.draining.add if draining else self.draining.discard)(worker_id)
            case Listed():
                assert not self.listed
                self.listed = True

    def urls(self) -> set[str]:
        """The workers that get requests."""
        return {
            str(spec.url) for worker, spec in self.workers.items() if worker not in self.draining
        }

    def metric(self, name: str, **labels: str) -> float:
        labels |= {"objects": self._objects}
        return self._prometheus.get_sample_value(f"extproc_discovery_{name}", labels) or 0.0

    async def sees(self, *urls: str) -> Self:
        """Wait until these workers get requests, and no others."""
        await eventually(
            lambda: self.listed and self.urls() == set(urls), f"{self.urls()} is {set(urls)}"
        )
        return self


@asynccontextmanager
async def following_slices(
    namespace: Namespace, *, limits: WatchLimits | None = None, **section: Any
) -> AsyncIterator[Following]:
    """Follow slices with the account of the namespace; by default those labelled app=sglang."""
    settings = K8sConfig(**_section(namespace, section))
    async with _following(partial(slice_source, settings), "endpointslices", limits) as found:
        yield found


@asynccontextmanager
async def following_pods(
    namespace: Namespace, *, limits: WatchLimits | None = None, **section: Any
) -> AsyncIterator[Following]:
    """The same for pods."""
    settings = K8sPodsConfig(**_section(namespace, section))
    async with _following(partial(pod_source, settings), "pods", limits) as found:
        yield found


@asynccontextmanager
async def following_pool(namespace: Namespace, **section: Any) -> AsyncIterator[Following]:
    """Follow the InferencePool `pool`."""
    settings = InferencePoolConfig(
        **{"namespace": namespace.name, "kubeconfig": namespace.kubeconfig, "name": "pool"}
        | section
    )
    async with _following(partial(pool_source, settings), "inferencepools", None) as found:
        yield found


def _section(namespace: Namespace, section: dict[str, Any]) -> dict[str, Any]:
    if not {"label_selector", "prefill_selector"} & section.keys():
        section["label_selector"] = "app=sglang"
    return {"namespace": namespace.name, "kubeconfig": namespace.kubeconfig} | section


@asynccontextmanager
async def _following(
    make: Callable[[SourceParts], WorkerSource], objects: str, limits: WatchLimits | None
) -> AsyncIterator[Following]:
    prometheus = CollectorRegistry()
    source = make(
        SourceParts(
            clock=SystemClock(),
            random=Random(1),
            metrics=Metrics(prometheus).discovery,
            limits=limits,
        )
    )
    found = Following(prometheus, objects)
    task = asyncio.create_task(found.run(source))
    try:
        yield found
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
