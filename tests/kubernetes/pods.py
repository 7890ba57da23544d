"""Writes pods and what a kubelet would say about them."""

import msgspec
from lightkube.models.core_v1 import (
    Container,
    ContainerPort,
    PodCondition,
    PodIP,
    PodSpec,
    PodStatus,
)
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Pod
from lightkube.resources.core_v1 import PodStatus as PodStatusOf
from lightkube.types import PatchType

from .cluster import Objects

__all__ = ["end_pod", "run_pod", "set_labels", "set_status"]


async def run_pod(
    namespace: Objects,
    n: int,
    labels: dict[str, str] | None = None,
    *,
    ready: bool = True,
    annotations: dict[str, str] | None = None,
    more_ips: tuple[str, ...] = (),
    ip: str | None = None,
    port: int = 8000,
) -> str:
    """A pod that runs, at 10.0.0.n without another `ip`; returns its id as a worker."""
    name = f"pod-{n}"
    ports = [ContainerPort(containerPort=port, name="http")]
    made = await namespace.client.create(
        Pod(
            metadata=ObjectMeta(
                name=name,
                namespace=namespace.name,
                labels={"app": "sglang"} | (labels or {}),
                annotations=annotations,
            ),
            spec=PodSpec(
                nodeName="node-1",
                containers=[Container(name="engine", image="engine", ports=ports)],
            ),
        )
    )
    await set_status(namespace, n, ready=ready, ips=(ip or f"10.0.0.{n}", *more_ips))
    assert made.metadata is not None
    return f"{made.metadata.uid}:{port}"


async def set_status(
    namespace: Objects, n: int, *, ready: bool, ips: tuple[str, ...] | None = None
) -> None:
    """Write what the kubelet says about the pod."""
    ips = ips or (f"10.0.0.{n}",)
    status = PodStatus(
        phase="Running",
        podIP=ips[0],
        podIPs=[PodIP(ip=ip) for ip in ips],
        conditions=[PodCondition(type="Ready", status="True" if ready else "False")],
    )
    await namespace.client.patch(
        PodStatusOf,
        f"pod-{n}",
        {"status": msgspec.to_builtins(status)},
        namespace=namespace.name,
        patch_type=PatchType.MERGE,
    )


async def set_labels(namespace: Objects, n: int, **labels: str) -> None:
    """Give the pod these labels besides its others."""
    await namespace.client.patch(
        Pod,
        f"pod-{n}",
        {"metadata": {"labels": labels}},
        namespace=namespace.name,
        patch_type=PatchType.MERGE,
    )


async def end_pod(namespace: Objects, n: int, *, grace_seconds: int) -> None:
    """With a time of grace the pod stays, since no kubelet ends it."""
    await namespace.client.delete(
        Pod, f"pod-{n}", namespace=namespace.name, grace_period=grace_seconds
    )
