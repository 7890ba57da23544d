"""A real API server accepts the chart's objects, in a namespace with the level `restricted`.

No controller runs here, so a Deployment makes no pods: a test creates one from its template. The
kinds of operators (KEDA, Prometheus) are those that they publish.
"""

import json
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from helm.generate import CHART
from tests.helm.chart import VALUES_FILES, Release, run_tool
from tests.helm.earlier import unpack_earlier_chart
from tests.helm.start import ROOT, commands_in

from .cluster import Cluster
from .kubectl import Kubectl

EVERY: Final = pytest.mark.parametrize("values", VALUES_FILES, ids=lambda path: path.stem)


class Project(Kubectl):
    """helm and kubectl in a namespace of the API server."""

    def helm(self, command: str, values: Path, *more: str, chart: Path = CHART) -> str:
        where = ("--kubeconfig", self.kubeconfig, "--namespace", self.name)
        arguments = ("router", str(chart), "--values", str(values), *more)
        done = run_tool("helm", *where, command, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def helm_history(self) -> str:
        where = ("--kubeconfig", self.kubeconfig, "--namespace", self.name)
        done = run_tool("helm", *where, "history", "router", "--output", "json")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def pod(self) -> dict[str, Any]:
        """A pod as the Deployment's controller would make it."""
        deployment = json.loads(self.kubectl("get", "deployment", "router-llm-extproc", "-ojson"))
        template = deployment["spec"]["template"]
        metadata = {**template["metadata"], "name": "one"}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.fixture
def project(cluster: Cluster, kinds: None) -> Iterator[Project]:
    found = Project(cluster.admin_kubeconfig(), f"chart-{secrets.token_hex(4)}")
    label = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = {"name": found.name, "labels": label}
    made = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
    found.kubectl("create", "-f", "-", text=json.dumps(made))
    yield found
    # Roles of the whole cluster would meet those of the next test.
    found.kubectl(
        "delete", "clusterrole,clusterrolebinding", "-l", "app.kubernetes.io/name=llm-extproc"
    )


@EVERY
def test_every_object_passes_strict_validation(project: Project, values: Path) -> None:
    text = project.helm("template", values)
    kinds = Release([one for one in yaml.safe_load_all(text) if one]).kinds()
    assert {"Deployment", "Service", "ConfigMap", "ServiceAccount", "Pod"} <= kinds
    project.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", text=text)


@EVERY
def test_a_release_is_installed_and_its_pod_fits_a_restricted_namespace(
    project: Project, values: Path
) -> None:
    assert "What to check next" in project.helm("install", values)
    pod = project.pod()
    arguments = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
    assert "created" in project.kubectl(*arguments, text=json.dumps(pod))
    # The namespace does refuse: the same pod without a seccomp profile of its own.
    del pod["spec"]["securityContext"]["seccompProfile"]
    for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
        del container["securityContext"]["seccompProfile"]
    assert "seccompProfile" in project.refusal(*arguments, text=json.dumps(pod))


def test_the_start_of_the_readme_is_installed(project: Project) -> None:
    _, copy, install, *_ = commands_in("README.md")
    # Without a scheduler no pod becomes ready, so nothing waits for one.
    more = [one for one in install[install.index("-f") + 2 :] if one.startswith(("--set", "image"))]
    assert "What to check next" in project.helm("install", ROOT / copy[1], *more)
    assert project.pod()["spec"]["containers"][0]["image"].startswith("REGISTRY/llm-extproc:")


def test_a_pool_and_its_route_pass_strict_validation(project: Project, tmp_path: Path) -> None:
    page = (CHART / "README.md").read_text()
    (block,) = [
        one for one in re.findall(r"```yaml\n(.*?)```", page, re.S) if "inferencePool" in one
    ]
    values = yaml.safe_load((CHART / "values" / "sglang-behind-a-gateway.yaml").read_text())
    of_page = yaml.safe_load(block)
    values["config"] |= of_page.pop("config")
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump(values | of_page))
    text = project.helm("template", file)
    kinds = Release([one for one in yaml.safe_load_all(text) if one]).kinds()
    assert {"InferencePool", "HTTPRoute"} <= kinds
    project.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", text=text)


@pytest.mark.parametrize(
    ("values", "rights"),
    [
        ("list-of-workers.yaml", []),
        ("vllm-with-envoy.yaml", ["endpointslices.discovery.k8s.io list,watch"]),
        ("large-fleet.yaml", ["endpointslices.discovery.k8s.io list,watch"]),
    ],
)
def test_the_account_may_do_what_discovery_needs_and_nothing_else(
    project: Project, values: str, rights: list[str]
) -> None:
    # Every account of a cluster may ask what it may do.
    before = _rights(project, "default")
    project.helm("install", CHART / "values" / values)
    assert sorted(_rights(project, "router-llm-extproc") - before) == rights
    account = f"system:serviceaccount:{project.name}:router-llm-extproc"
    elsewhere = run_tool(
        "kubectl", "--kubeconfig", project.kubeconfig, "--namespace", "kube-system",
        "auth", "can-i", "list", "endpointslices.discovery.k8s.io", "--as", account,
    )  # fmt: skip
    assert elsewhere.stdout.strip() == ("yes" if values == "large-fleet.yaml" else "no")


def _rights(project: Project, account: str) -> set[str]:
    """The resources with their verbs that a service account of the namespace may use."""
    name = f"system:serviceaccount:{project.name}:{account}"
    lines = project.kubectl("auth", "can-i", "--list", "--no-headers", "--as", name).splitlines()
    return {
        f"{line.split()[0]} {','.join(line.rpartition('[')[2].rstrip(']').split())}"
        for line in lines
        if line and not line.startswith(" ")
    }


@EVERY
def test_a_release_of_the_first_chart_can_be_upgraded(
    project: Project, values: Path, tmp_path: Path
) -> None:
    """The API server refuses changes of what is fixed, such as the selector of the pods."""
    earlier = unpack_earlier_chart(tmp_path)
    project.helm("install", earlier / "values" / values.name, chart=earlier)
    before = project.pod()
    assert "What to check next" in project.helm("upgrade", values)
    history = json.loads(project.helm_history())
    assert [one["status"] for one in history] == ["superseded", "deployed"]
    labels = project.pod()["metadata"]["labels"]
    for label in ("app.kubernetes.io/name", "app.kubernetes.io/instance"):
        assert labels[label] == before["metadata"]["labels"][label]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("envoy-gateway", ()),
        ("envoy-gateway", ("patch=true", "failOpen=false")),
        ("istio", ()),
        ("istio", ("failOpen=false",)),
    ],
)
def test_objects_of_gateways_come_and_go_with_their_value(
    project: Project, kind: str, more: tuple[str, ...]
) -> None:
    values = CHART / "values" / "list-of-workers.yaml"
    chosen = (f"kind={kind}", "hostnames={chat.acme.org}", "gateway.name=main", *more)
    chosen += ("workers.service=sglang",)
    sets = [f"--set=gatewayObjects.filter.{one}" for one in chosen]
    text = project.helm("template", values, *sets)
    project.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", text=text)
    project.helm("install", values, *sets)
    label = ("-l", "app.kubernetes.io/instance=router", "-oname")
    expected = {
        "envoy-gateway": "httproutes,envoyextensionpolicies,backendtrafficpolicies",
        "istio": "virtualservices,destinationrules,envoyfilters",
    }[kind]
    made = project.kubectl("get", expected, *label).split()
    assert {one.split(".")[0] for one in made} == {
        "envoy-gateway": {"httproute", "envoyextensionpolicy", "backendtrafficpolicy"},
        "istio": {"virtualservice", "destinationrule", "envoyfilter"},
    }[kind]
    project.helm("upgrade", values)
    assert project.kubectl("get", expected, *label) == ""


def test_an_upgrade_with_a_live_key_leaves_the_pods_alone(project: Project) -> None:
    values = CHART / "values" / "sglang-behind-a-gateway.yaml"
    project.helm("install", values)
    before = project.pod()
    project.helm("upgrade", values, "--set=config.proxy.fallback_workers=1")
    assert project.pod() == before
    assert "fallback_workers: 1" in project.kubectl(
        "get", "configmap", "router-llm-extproc", "-oyaml"
    )
    project.helm("upgrade", values, "--set=config.server.port=9003")
    assert project.pod() != before
