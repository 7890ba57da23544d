"""The real Envoy Gateway accepts the objects that the chart makes for it."""

import json
import secrets
from functools import partial
from typing import Any

import pytest

from helm.generate import CHART

from ..cluster import Cluster
from ..test_chart import Project
from .installation import Installation, wait_for
from .kubelet import NODE

VALUES = CHART / "values" / "list-of-workers.yaml"
POLICIES = ("envoyextensionpolicy", "backendtrafficpolicy", "clienttrafficpolicy")


@pytest.fixture
def project(cluster: Cluster, installed: Installation) -> Project:
    """A namespace with a Gateway and workers."""
    found = Project(cluster.admin_kubeconfig(), f"chart-{secrets.token_hex(4)}")
    found.kubectl("create", "namespace", found.name)
    listener = {"name": "http", "protocol": "HTTP", "port": 8080}
    create(
        found,
        "gateway.networking.k8s.io/v1",
        "Gateway",
        "main",
        spec={"gatewayClassName": "eg", "listeners": [listener]},
    )
    ports = [{"name": "http", "port": 8000}]
    selected = {"selector": {"app": "sglang"}, "ports": ports}
    create(found, "v1", "Service", "sglang", spec=selected)
    container = {"name": "engine", "image": "engine", "ports": [{"containerPort": 8000}]}
    run(found, "worker", "10.244.2.1", {"app": "sglang"}, {"containers": [container]})
    return found


def create(project: Project, version: str, kind: str, name: str, **more: Any) -> None:
    made = {"apiVersion": version, "kind": kind, "metadata": {"name": name}, **more}
    project.kubectl("create", "--validate=strict", "-f", "-", text=json.dumps(made))


def run(project: Project, name: str, ip: str, labels: dict[str, str], spec: dict[str, Any]) -> None:
    """A pod that is ready, as far as the API server knows."""
    metadata = {"name": name, "labels": labels}
    create(project, "v1", "Pod", name, metadata=metadata, spec=spec | {"nodeName": NODE})
    ready = [{"type": "Ready", "status": "True"}]
    status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": ready}
    patch = json.dumps({"status": status})
    project.kubectl("patch", "pod", name, "--subresource=status", "-p", patch)


def conditions(project: Project, kind: str) -> list[dict[str, str]]:
    """What the controller says about each object of this kind, for each Gateway."""
    objects = json.loads(project.kubectl("get", kind, "-ojson"))["items"]
    assert objects, kind
    parents = [
        parent
        for one in objects
        for parent in [
            *one.get("status", {}).get("parents", []),
            *one.get("status", {}).get("ancestors", []),
        ]
    ]
    return [{one["type"]: one["status"] for one in parent["conditions"]} for parent in parents]


@pytest.mark.parametrize("more", [(), ("patch=true", "failOpen=false")], ids=["open", "closed"])
def test_the_controller_accepts_the_objects_of_a_release(
    project: Project, more: tuple[str, ...]
) -> None:
    chosen = ("kind=envoy-gateway", "hostnames={chat.acme.org}", "gateway.name=main", *more)
    chosen += ("workers.service=sglang",)
    project.helm("install", VALUES, *(f"--set=gatewayObjects.filter.{one}" for one in chosen))
    pod = project.pod()
    run(project, "router", "10.244.2.2", pod["metadata"]["labels"], pod["spec"])
    more_of = {"httproute": {"ResolvedRefs"}, "envoypatchpolicy": {"Programmed"}}
    for kind in ("httproute", *POLICIES, *(["envoypatchpolicy"] if more else [])):
        wanted = [dict.fromkeys({"Accepted"} | more_of.get(kind, set()), "True")]
        try:
            wait_for(partial(has, project, kind, wanted), f"{kind} is accepted")
        except AssertionError as error:
            error.add_note(project.kubectl("get", kind, "-oyaml"))
            raise


def has(project: Project, kind: str, wanted: list[dict[str, str]]) -> bool:
    return conditions(project, kind) == wanted
