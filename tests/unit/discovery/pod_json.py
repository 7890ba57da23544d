"""Pods as the API server sends them."""

from typing import Any, Final

__all__ = ["pod_json"]

_READY: Final = [
    {"type": "PodScheduled", "status": "True"},
    {"type": "Ready", "status": "True"},
]


def pod_json(
    labels: dict[str, str] | None = None, *, spec: Any = None, **fields: Any
) -> dict[str, Any]:
    """A ready pod; `fields` are those of its status, or metadata where they are known there."""
    status = {
        "phase": "Running",
        "podIP": "10.0.0.1",
        "podIPs": [{"ip": "10.0.0.1"}],
        "conditions": _READY,
    }
    metadata: dict[str, Any] = {"name": "pod-1", "namespace": "ns", "uid": "u1", "labels": labels}
    for name, value in fields.items():
        known = metadata if name in ("annotations", "deletionTimestamp", "uid") else status
        known[name] = value
    if spec is None:
        spec = {
            "containers": [{"name": "engine", "ports": [{"name": "http", "containerPort": 8000}]}]
        }
    return {"kind": "Pod", "metadata": metadata, "spec": spec, "status": status}
