"""Writes what the EndpointSlice controller works on besides pods: Services and a node."""

from lightkube.core.exceptions import ApiError
from lightkube.models.core_v1 import NodeSpec, ServicePort, ServiceSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Node, Service

from .cluster import Objects

__all__ = ["make_node", "make_service"]


async def make_node(namespace: Objects) -> None:
    """Make the node of all pods, unless it exists: the controller skips pods of unknown nodes."""
    try:
        await namespace.client.create(Node(metadata=ObjectMeta(name="node-1"), spec=NodeSpec()))
    except ApiError as error:
        if error.status.code != 409:
            raise


async def make_service(
    namespace: Objects, name: str, labels: dict[str, str], **selector: str
) -> None:
    """A headless Service, as engines have; the controller copies its labels to the slices."""
    await namespace.client.create(
        Service(
            metadata=ObjectMeta(name=name, namespace=namespace.name, labels=labels),
            spec=ServiceSpec(
                clusterIP="None",
                selector=selector,
                ports=[ServicePort(name="http", port=8000, targetPort="http")],
            ),
        )
    )
