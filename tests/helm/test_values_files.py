"""Every values file of a typical installation gives objects that a cluster accepts."""

from pathlib import Path
from typing import Any

import pytest

from extproc.config.loading import parse_config
from extproc.envoy_config import bootstrap_problems
from tests.helm.chart import VALUES_FILES, lint, render, schema_problems

EVERY = pytest.mark.parametrize("values", VALUES_FILES, ids=lambda path: path.stem)
# Objects of operators, for which there are no schemas offline.
OF_OPERATORS = {"ScaledObject", "ServiceMonitor", "PodMonitor", "PrometheusRule"}
# Volumes that the Pod Security level `restricted` accepts.
VOLUMES = {"configMap", "emptyDir", "image", "persistentVolumeClaim", "projected", "secret"}


def test_there_are_files_for_five_installations() -> None:
    assert len(VALUES_FILES) == 5


@EVERY
def test_a_values_file_passes_strict_lint(values: Path) -> None:
    done = lint(values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[WARNING]" not in done.stdout + done.stderr


@EVERY
def test_each_object_passes_the_schema_of_its_kind(values: Path) -> None:
    release, errors = render(values)
    assert release.objects, errors
    problems: dict[str, Any] = {
        f"{one['kind']} {one['metadata']['name']}": schema_problems(one) for one in release
    }
    without_schema = {name.split()[0] for name, found in problems.items() if found is None}
    assert without_schema <= OF_OPERATORS
    assert {name: found for name, found in problems.items() if found} == {}


def test_the_schemas_refuse_a_misspelt_key() -> None:
    release, _ = render(VALUES_FILES[0])
    deployment = release.one("Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    (problem,) = schema_problems(deployment) or []
    assert "readinesProbe" in problem


@EVERY
def test_the_service_accepts_its_configuration(values: Path) -> None:
    release, _ = render(values)
    config = parse_config(release.config)
    if "envoy" in {one["name"] for one in release.pod["spec"].get("initContainers", [])}:
        assert list(bootstrap_problems(config)) == []


@EVERY
def test_all_objects_are_in_the_namespace_of_the_release(values: Path) -> None:
    release, _ = render(values)
    namespaces = {
        one["metadata"].get("namespace")
        for one in release
        if not one["kind"].startswith("ClusterRole")
    }
    assert namespaces == {"llm"}
    names = [(one["kind"], one["metadata"]["name"]) for one in release]
    assert len(names) == len(set(names))


@EVERY
def test_all_pods_fit_a_restricted_namespace(values: Path) -> None:
    release, _ = render(values)
    pods = [release.pod["spec"], release.one("Pod", "-test")["spec"]]
    for pod in pods:
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {key for volume in pod["volumes"] for key in volume} - {"name"} <= VOLUMES
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, container["name"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["runAsNonRoot"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert {"requests", "limits"} <= container["resources"].keys()
            assert "memory" in container["resources"]["limits"]
            assert all("hostPort" not in port for port in container.get("ports", []))


@EVERY
def test_every_mount_has_a_volume_and_every_volume_a_mount(values: Path) -> None:
    release, _ = render(values)
    for pod in (release.pod["spec"], release.one("Pod", "-test")["spec"]):
        containers = [*pod.get("initContainers", []), *pod["containers"]]
        mounts = {mount["name"] for one in containers for mount in one["volumeMounts"]}
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert sorted(mounts) == sorted(volumes)


@EVERY
def test_ports_are_named_where_they_are_used(values: Path) -> None:
    release, _ = render(values)
    pod = release.pod["spec"]
    ports = {
        port["name"]
        for one in [*pod.get("initContainers", []), *pod["containers"]]
        for port in one.get("ports", [])
    }
    services = [one for one in release if one["kind"] == "Service"]
    used = {port["targetPort"] for one in services for port in one["spec"]["ports"]}
    for policy in (one for one in release if one["kind"] == "NetworkPolicy"):
        used |= {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    for monitor in (one for one in release if one["kind"].endswith("Monitor")):
        spec = monitor["spec"]
        used |= {one["port"] for one in spec.get("endpoints", spec.get("podMetricsEndpoints", []))}
    assert used <= ports


@EVERY
def test_the_notes_say_what_to_check_next(values: Path) -> None:
    _, notes = render(values, notes=True)
    assert "What to check next" in notes, notes
    assert "helm -n llm test r" in notes
    assert "rollout status deployment/r-llm-extproc" in notes
