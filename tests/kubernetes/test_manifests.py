"""A real API server accepts every manifest of the recipes and of the pages.

Kinds of gateways are those that they publish, so unknown fields, wrong values and rules in CEL are
refused as in a cluster. A namespace has the level `restricted`: the pod of a Deployment must fit.
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from .cluster import Cluster
from .kubectl import Kubectl

ROOT: Final = Path(__file__).parents[2]
_YAML_BLOCKS: Final = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def objects(text: str) -> list[dict[str, Any]]:
    """The objects of a cluster in these YAML documents; others are parts, or Envoy's files."""
    documents = [one for one in yaml.safe_load_all(text) if isinstance(one, dict)]
    return [one for one in documents if {"apiVersion", "kind"} <= one.keys()]


def found() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Name of a file, and the objects in it."""
    for path in sorted([*(ROOT / "envoy").rglob("*.yaml"), *(ROOT / "docs").rglob("*.yaml")]):
        yield str(path.relative_to(ROOT)), objects(path.read_text())
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    pages += [*(ROOT / "envoy").rglob("*.md"), *(ROOT / "helm").rglob("*.md")]
    for path in sorted(pages):
        blocks = _YAML_BLOCKS.findall(path.read_text())
        yield str(path.relative_to(ROOT)), [one for block in blocks for one in objects(block)]


EVERY: Final = pytest.mark.parametrize(
    "manifest",
    [
        pytest.param(one, id=f"{name}-{one['kind']}-{one['metadata']['name']}")
        for name, many in found()
        for one in many
    ],
)


def namespace_of(manifest: dict[str, Any]) -> str:
    name: str = manifest["metadata"].get("namespace", "default")
    return name


def try_to_create(cluster: Cluster, manifest: dict[str, Any]) -> None:
    """Has the API server check the object as if it were created."""
    project = Kubectl(cluster.admin_kubeconfig(), namespace_of(manifest))
    # A namespace of the manifests is there already, for the other objects.
    verb = ["create"]
    if manifest["kind"] == "Namespace":
        verb = ["apply", "--server-side", "--force-conflicts"]
    text = json.dumps(manifest)
    project.kubectl(*verb, "--dry-run=server", "--validate=strict", "-f", "-", text=text)


@pytest.fixture(scope="module")
def restricted(cluster: Cluster, kinds: None) -> Cluster:
    """The namespaces of all manifests, in which only pods without rights may run."""
    admin = Kubectl(cluster.admin_kubeconfig(), "default")
    every = itertools.chain.from_iterable(many for _, many in found())
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    for name in sorted({namespace_of(one) for one in every}):
        metadata = {"name": name, "labels": label}
        made = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
        arguments = ("apply", "--server-side", "--force-conflicts", "-f", "-")
        admin.kubectl(*arguments, text=json.dumps(made))
    return cluster


@EVERY
def test_a_manifest_passes_strict_validation(restricted: Cluster, manifest: dict[str, Any]) -> None:
    try_to_create(restricted, manifest)


@pytest.mark.parametrize(
    "manifest",
    [
        pytest.param(one, id=f"{name}-{one['metadata']['name']}")
        for name, many in found()
        for one in many
        if one["kind"] in {"Deployment", "StatefulSet"}
    ],
)
def test_a_pod_fits_a_restricted_namespace(restricted: Cluster, manifest: dict[str, Any]) -> None:
    template = manifest["spec"]["template"]
    metadata = template["metadata"] | {"name": "one", "namespace": namespace_of(manifest)}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    try_to_create(restricted, pod)


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("envoy-gateway/policies.yaml", {"extProc": [{"failOpn": True}]}, "failOpn"),
        (
            "envoy-gateway/policies.yaml",
            {"extProc": [{"backendRefs": [{"name": "extproc", "kind": "Pod"}]}]},
            "BackendRefs only supports",
        ),
        ("istio/route.yaml", {"http": [{"timeout": "0s"}]}, "greater than 1ms"),
    ],
)
def test_what_is_wrong_is_refused(
    restricted: Cluster, file: str, change: dict[str, Any], complaint: str
) -> None:
    manifest = objects((ROOT / "envoy" / file).read_text())[0]
    manifest["spec"] |= change
    with pytest.raises(AssertionError, match=complaint):
        try_to_create(restricted, manifest)
