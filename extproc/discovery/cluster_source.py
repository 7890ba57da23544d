"""Puts a source of workers together from the kind of object, and what the configuration says."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TypeVar

from lightkube.core.resource import NamespacedResource
from msgspec import Struct, field

from extproc.clock import Clock
from extproc.config.schema import ClusterSection, SelectedSection
from extproc.discovery.cluster_objects import ClusterObjects
from extproc.discovery.kube_api import KubeApi, ObjectApi, WatchLimits, open_client
from extproc.discovery.list_watch import ListWatch
from extproc.discovery.worker_union import Reading
from extproc.label_selectors import LabelSelector, parse_selector
from extproc.metrics.service import DiscoveryMetrics
from extproc.workers.source_health import SourceHealth
from extproc.workers.worker import Role

__all__ = ["SourceParts", "cluster_source", "role_of", "roles_by_label"]

_KindT = TypeVar("_KindT", bound=NamespacedResource)


class SourceParts(Struct, frozen=True, kw_only=True):
    """What every source needs. `limits` are those of its watches."""

    clock: Clock
    random: Random
    metrics: DiscoveryMetrics
    limits: WatchLimits | None = None
    health: SourceHealth = field(default_factory=SourceHealth)

    def list_watch(self, api: ObjectApi[_KindT], what: str) -> ListWatch[_KindT]:
        """Follows the objects of an API; logs and metrics call them `what`."""
        return ListWatch(
            api,
            what,
            clock=self.clock,
            random=self.random,
            metrics=self.metrics,
            health=self.health,
        )


def cluster_source(
    kind: type[_KindT],
    what: str,
    read: Callable[[_KindT], Reading],
    section: SelectedSection,
    parts: SourceParts,
) -> ClusterObjects[_KindT]:
    """A WorkerSource of objects of one kind, which logs and metrics call `what`.

    Raises ConfigError if the cluster's address and credentials cannot be read.
    """
    api = KubeApi(
        open_client(section.kubeconfig),
        kind,
        namespace=section.namespace,
        selector=section.label_selector,
        limits=parts.limits,
    )
    return ClusterObjects(parts.list_watch(api, what), read, what, parts.clock)


def roles_by_label(section: ClusterSection) -> list[tuple[Role, LabelSelector]]:
    """The selectors of prefill and decode workers, in the order in which they are tried.

    Empty for plain workers.
    """
    if section.prefill_selector is None or section.decode_selector is None:
        return []
    return [
        ("prefill", parse_selector(section.prefill_selector)),
        ("decode", parse_selector(section.decode_selector)),
    ]


def role_of(
    labels: Mapping[str, str] | None, roles: Sequence[tuple[Role, LabelSelector]]
) -> Role | None:
    """The role of workers with these labels, None if they are no workers; see roles_by_label."""
    if not roles:
        return "plain"
    return next((role for role, selector in roles if selector.matches(labels)), None)
