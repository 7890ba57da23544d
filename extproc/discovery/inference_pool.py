"""Discovery from an InferencePool: the pods that it selects, at each of its target ports.

The gateway routes to what the pool says, so this service must know the same. The pool is followed,
and with each change of its selector or its ports the pods are followed anew.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final, TypeVar

from lightkube.core.async_client import AsyncClient
from lightkube.core.resource import ApiInfo, NamespacedResourceG, ResourceDef
from lightkube.models.meta_v1 import ObjectMeta
from msgspec import Struct, field

from extproc.config.schema import InferencePoolConfig
from extproc.discovery.cluster_objects import ClusterObjects
from extproc.discovery.cluster_source import SourceParts, roles_by_label
from extproc.discovery.kube_api import KubeApi, WatchEvent, open_client
from extproc.discovery.list_watch import ListWatch, Snapshot
from extproc.discovery.pods import PodReader, WorkerPod
from extproc.discovery.worker_union import WorkerUnion
from extproc.workers.source import Listed, WorkerEvent

__all__ = ["InferencePool", "PoolSource", "pool_source"]

_KindT = TypeVar("_KindT", bound=NamespacedResourceG)

_POOLS: Final = "inferencepools"
_PODS: Final = "pods"


class _Selector(Struct):
    labels: dict[str, str] | None = field(name="matchLabels", default=None)


class _TargetPort(Struct):
    number: int


class _Spec(Struct):
    selector: _Selector | None = None
    target_ports: list[_TargetPort] | None = field(name="targetPorts", default=None)


class InferencePool(NamespacedResourceG, Struct):
    """The fields of a pool that say which pods serve it, and where."""

    _api_info = ApiInfo(
        resource=ResourceDef("inference.networking.k8s.io", "v1", "InferencePool"),
        plural="inferencepools",
        verbs=["list", "watch"],
    )

    metadata: ObjectMeta | None = None
    spec: _Spec | None = None


class _Members(Struct, frozen=True):
    """What a pool selects: a selector of pods, and ports of each."""

    selector: str
    ports: tuple[int, ...]


class PoolSource:
    """A WorkerSource of one pool. Without the pool there are no workers."""

    def __init__(
        self, config: InferencePoolConfig, client: AsyncClient, parts: SourceParts
    ) -> None:
        self._config = config
        self._client = client
        self._parts = parts
        self._union = WorkerUnion()
        self._members: _Members | None = None
        self._pods: AsyncGenerator[WorkerEvent, None] | None = None
        self._coming: asyncio.Future[WorkerEvent] | None = None

    async def events(self) -> AsyncGenerator[WorkerEvent, None]:
        listed = False
        async with aclosing(self._list_watch(InferencePool, _POOLS).follow()) as pools:
            step = asyncio.ensure_future(anext(pools))
            try:
                while True:
                    waits: list[asyncio.Future[Any]] = [step]
                    if self._coming is not None:
                        waits.append(self._coming)
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                    if step.done():
                        result = step.result()
                        await self._use(_members(result))
                        step = asyncio.ensure_future(anext(pools))
                        if self._pods is not None:
                            continue
                        # A list without the pool may be a mistake; a deletion is not.
                        left = not isinstance(result, Snapshot) or bool(result.objects)
                        found = [*self._union.replace({}, others_left=left), Listed()]
                    elif self._pods is not None and self._coming is not None:
                        found = [self._coming.result()]
                        self._coming = asyncio.ensure_future(anext(self._pods))
                    for event in found:
                        if event == Listed():
                            if listed:
                                continue
                            listed = True
                        yield event
            finally:
                step.cancel()
                await asyncio.gather(step, return_exceptions=True)
                await self._use(None)
                await self._client.close()

    async def _use(self, members: _Members | None) -> None:
        """Follow these pods, and no others; workers that stay the same are not added again."""
        if members == self._members:
            return
        self._members = members
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.gather(self._coming, return_exceptions=True)
            self._coming = None
        if self._pods is not None:
            await self._pods.aclose()
            self._pods = None
        if members is not None:
            reader = PodReader(
                roles=roles_by_label(self._config),
                family=self._config.address_family,
                bootstrap_port_annotation=self._config.bootstrap_port_annotation,
                ports=members.ports,
            )
            self._pods = ClusterObjects(
                self._list_watch(WorkerPod, _PODS, members.selector),
                reader.read,
                _PODS,
                self._parts.clock,
                self._union,
            ).events()
            self._coming = asyncio.ensure_future(anext(self._pods))

    def _list_watch(
        self, kind: type[_KindT], what: str, selector: str | None = None
    ) -> ListWatch[_KindT]:
        api = KubeApi(
            self._client,
            kind,
            namespace=self._config.namespace,
            selector=selector,
            name=self._config.name if what == _POOLS else None,
            limits=self._parts.limits,
            owns_client=False,
        )
        return self._parts.list_watch(api, what)


def pool_source(config: InferencePoolConfig, parts: SourceParts) -> PoolSource:
    """A WorkerSource of the configured pool; raises ConfigError."""
    return PoolSource(config, open_client(config.kubeconfig), parts)


def _members(step: Snapshot[InferencePool] | WatchEvent[InferencePool]) -> _Members | None:
    """What the pool selects after this step; None if there is no pool that selects anything."""
    if isinstance(step, Snapshot):
        pool = step.objects[0] if step.objects else None
    else:
        pool = None if step.type == "DELETED" else step.object
    spec = pool.spec if pool is not None else None
    if spec is None or spec.selector is None or not spec.selector.labels:
        return None
    terms = [f"{key}={value}" for key, value in sorted(spec.selector.labels.items())]
    return _Members(",".join(terms), tuple([port.number for port in spec.target_ports or ()]))
