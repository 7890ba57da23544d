"""Follows a namespace with the real source, as the service does."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Self

from prometheus_client import CollectorRegistry

from extproc.clock import SystemClock
from extproc.config.schema import K8sConfig
from extproc.discovery.endpoint_slices import slice_source
from extproc.discovery.kube_api import WatchLimits
from extproc.metrics.service import Metrics
from extproc.workers.source import (
    Added,
    DrainingChanged,
    Listed,
    Removed,
    RoleChanged,
    WorkerEvent,
    WorkerSource,
)
from extproc.workers.worker import WorkerSpec

from .cluster import Namespace, eventually

__all__ = ["Following", "following_slices"]


class Following:
    """What the events of a source add up to; `log` has all of them."""

    def __init__(self, prometheus: CollectorRegistry, objects: str) -> None:
        self.log: list[WorkerEvent] = []
        self.workers: dict[str, WorkerSpec] = {}
        self.roles: dict[str, str] = {}
        self.draining: set[str] = set()
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
                self.workers[spec.id] = spec
                self.roles[str(spec.url)] = spec.role
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
    if not {"label_selector", "prefill_selector"} & section.keys():
        section["label_selector"] = "app=sglang"
    prometheus = CollectorRegistry()
    source = slice_source(
        K8sConfig(namespace=namespace.name, kubeconfig=namespace.kubeconfig, **section),
        clock=SystemClock(),
        random=Random(1),
        metrics=Metrics(prometheus).discovery,
        limits=limits,
    )
    found = Following(prometheus, "endpointslices")
    task = asyncio.create_task(found.run(source))
    try:
        yield found
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
