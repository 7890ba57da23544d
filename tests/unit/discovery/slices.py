"""EndpointSlices as the API server sends them."""

import json
from typing import Any

import msgspec
from lightkube.resources.discovery_v1 import EndpointSlice

__all__ = ["endpoint", "slice_json", "slice_of"]

_ABSENT: Any = object()


def endpoint(
    address: str = "10.0.0.1",
    uid: str | None = "pod-1",
    *,
    conditions: dict[str, bool | None] | None = _ABSENT,
) -> dict[str, Any]:
    """An endpoint that is ready unless `conditions` says something else."""
    if conditions is _ABSENT:
        conditions = {"ready": True, "serving": True, "terminating": False}
    reference = {"kind": "Pod", "namespace": "ns", "name": f"name-of-{uid}", "uid": uid}
    return {
        "addresses": [address],
        "conditions": conditions,
        "targetRef": None if uid is None else reference,
    }


def slice_json(*endpoints: dict[str, Any], name: str = "slice-1", **fields: Any) -> dict[str, Any]:
    """A slice as JSON; `labels` are those of its metadata."""
    labels = fields.pop("labels", {"app": "sglang"})
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "ns",
            "uid": f"uid-of-{name}",
            "resourceVersion": "7",
            "labels": labels,
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
        "endpoints": list(endpoints),
    } | fields


def slice_of(*endpoints: dict[str, Any], name: str = "slice-1", **fields: Any) -> EndpointSlice:
    """The same, decoded as lightkube does."""
    return msgspec.json.decode(
        json.dumps(slice_json(*endpoints, name=name, **fields)), type=EndpointSlice
    )
