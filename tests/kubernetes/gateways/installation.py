"""Envoy Gateway, the Envoy that it configures, and our recipe with two replicas of the service."""

import json
import signal
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml

from extproc.testing.stack import find_envoy

from ..cluster import Cluster
from ..kubectl import Kubectl
from .kubelet import NODE, Kubelet, RunningPod, with_files

T = TypeVar("T")

__all__ = ["ADMIN_TOKEN", "ENVOY_ADMIN_URL", "URL", "Installation", "answers", "wait_for"]

RECIPE: Final = Path(__file__).parents[3] / "envoy" / "envoy-gateway"
# Envoy listens 10 000 above the ports of a Gateway that need rights.
URL: Final = "http://127.0.0.1:10080"
ENVOY_ADMIN_URL: Final = "http://127.0.0.1:19000"
ADMIN_TOKEN: Final = "token-of-the-admin-port"
_SYSTEM: Final = "envoy-gateway-system"
_PROGRAM: Final = "envoy-gateway"
_OWNER: Final = "gateway.envoyproxy.io/owning-gateway-name=llm"
_WAIT_SECONDS: Final = 60.0
_POLL_SECONDS: Final = 0.05
# Of the service's replicas. They share one network, so each listens at its own address.
_ADDRESSES: Final = ("10.244.0.11", "10.244.0.12")
_ANY: Final = "host: 0.0.0.0"

_CONTROLLER: Final = {
    "apiVersion": "gateway.envoyproxy.io/v1alpha1",
    "kind": "EnvoyGateway",
    "gateway": {"controllerName": "gateway.envoyproxy.io/gatewayclass-controller"},
    "provider": {
        "type": "Kubernetes",
        "kubernetes": {
            "leaderElection": {"disable": True},
            "proxyTopologyInjector": {"disabled": True},
        },
    },
    "extensionApis": {"enableEnvoyPatchPolicy": True},
    # Envoy has the default ports, at the same address.
    "admin": {"address": {"host": "127.0.0.1", "port": 19100}},
    "telemetry": {"metrics": {"prometheus": {"disable": True}}},
}


def wait_for(find: Callable[[], T], what: str) -> T:
    """What `find` returns, as soon as it is true."""
    end = time.monotonic() + _WAIT_SECONDS
    while True:
        if found := find():
            return found
        assert time.monotonic() < end, f"not within {_WAIT_SECONDS:g} s: {what}"
        time.sleep(_POLL_SECONDS)


class Installation:
    """Everything is in the namespace of the recipe; `open` starts it all."""

    def __init__(
        self, cluster: Cluster, program: Path, folder: Path, model: dict[str, Any]
    ) -> None:
        """`model` is the one of the service's configuration."""
        self._programs = cluster.programs
        self._program = program
        self._folder = folder
        self._model = model
        self._kubeconfig = cluster.admin_kubeconfig()
        self._system = Kubectl(self._kubeconfig, _SYSTEM)
        self._kubelet = Kubelet(
            cluster,
            folder,
            {
                "envoy": [find_envoy(), "--use-dynamic-base-id"],
                "extproc": [sys.executable, "-m", "extproc"],
            },
        )
        self.api = Kubectl(self._kubeconfig, "default")
        self.envoy: RunningPod
        self.services: list[RunningPod] = []

    def open(self) -> None:
        """Start the controller, apply the recipe, and run the pods of both Deployments."""
        self._apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        self._make_certificates()
        self.start_controller()
        self._apply_recipe()
        for ip in _ADDRESSES:
            edit = (_ANY, f"host: {ip}")
            self.services.append(self._kubelet.run("default", "extproc", ip, edit=edit))
        deployment = wait_for(self._envoys_deployment, "Envoy Gateway makes a Deployment")
        self.envoy = self._kubelet.run(_SYSTEM, deployment, "10.244.0.10")
        wait_for(lambda: answers(f"{ENVOY_ADMIN_URL}/ready"), "Envoy has started")
        for service in self.services:
            self.wait_until_alive(service)

    def wait_until_alive(self, service: RunningPod) -> None:
        """A replica is ready later: when it has workers."""
        try:
            wait_for(lambda: answers(f"http://{service.ip}:9090/healthz"), f"{service.name} runs")
        except AssertionError as error:
            error.add_note(service.log())
            raise

    def start_controller(self) -> None:
        """Start Envoy Gateway, perhaps again, and wait until it is ready."""
        file = self._folder / "envoy-gateway.yaml"
        file.write_text(json.dumps(_CONTROLLER))
        command = with_files(
            self._as_admin("server", "--config-path", str(file)),
            {"/certs": self._folder / "certs"},
        )
        self._programs.start(_PROGRAM, command)
        wait_for(self._controller_is_ready, "Envoy Gateway is ready")

    def kill_controller(self) -> None:
        self._programs.signal(_PROGRAM, signal.SIGKILL)

    def log(self) -> str:
        return self._programs.log(_PROGRAM)

    def accepts_requests(self) -> bool:
        """Envoy's readiness: its listeners are there."""
        return answers("http://127.0.0.1:19003/ready")

    def stats(self, name: str) -> dict[str, int]:
        """Envoy's counters and gauges whose names match."""
        lines = _read(f"{ENVOY_ADMIN_URL}/stats?filter={name}").splitlines()
        pairs = (line.rpartition(": ") for line in lines)
        return {key: int(value) for key, _, value in pairs if value.isdecimal()}

    def state(self) -> str:
        """What the API server, the replicas and the controller say, for a test that fails."""
        parts = [self.api.kubectl("get", "pods,endpointslices", "-owide")]
        for service in self.services:
            parts += [self._programs.log(f"prober-{service.name}"), service.log()]
        return "\n".join([*parts, self.log()])

    def dump(self, kind: str) -> str:
        """Envoy's configuration of this kind, as JSON."""
        return _read(f"{ENVOY_ADMIN_URL}/config_dump?resource=dynamic_{kind}")

    def endpoints(self) -> set[str]:
        """The addresses with ports of all clusters that Envoy Gateway has made.

        Those of pods that are not ready are left out: Envoy has them as draining.
        """
        try:
            lines = _read(f"{ENVOY_ADMIN_URL}/clusters").splitlines()
        except OSError:
            return set()
        fields = (line.split("::") for line in lines if line.endswith("::health_flags::healthy"))
        return {one[1] for one in fields if one[0] not in {"xds_cluster", "prometheus_stats"}}

    def _as_admin(self, *arguments: str) -> list[str]:
        return ["env", f"KUBECONFIG={self._kubeconfig}", str(self._program), *arguments]

    def _make_certificates(self) -> None:
        metadata = {"name": _SYSTEM}
        made = {"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}
        self.api.kubectl("create", "-f", "-", text=json.dumps(made))
        self._programs.start("certgen", self._as_admin("certgen", "--disable-topology-injector"))
        wait_for(lambda: self._programs.ended("certgen") is not None, "certgen ends")
        assert self._programs.ended("certgen") == 0, self._programs.log("certgen")
        self._kubelet.write_secret(self._system, "envoy-gateway", self._folder / "certs")

    def _controller_is_ready(self) -> bool:
        assert self._programs.ended(_PROGRAM) is None, self.log()
        return answers("http://127.0.0.1:8081/readyz")

    def _apply_recipe(self) -> None:
        kind = {"controllerName": "gateway.envoyproxy.io/gatewayclass-controller"}
        self._apply(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "GatewayClass",
                "metadata": {"name": "eg"},
                "spec": kind,
            }
        )
        self._apply(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "extproc-admin"},
                "stringData": {"token": ADMIN_TOKEN},
            }
        )
        for name in ("extproc.yaml", "route.yaml", "policies.yaml"):
            for manifest in yaml.safe_load_all((RECIPE / name).read_text()):
                if manifest["kind"] == "ConfigMap":
                    config = yaml.safe_load(manifest["data"]["extproc.yaml"])
                    config["models"] = [self._model]
                    manifest["data"]["extproc.yaml"] = yaml.safe_dump(config)
                self._apply(manifest)

    def _apply(self, manifest: dict[str, Any]) -> None:
        self.api.kubectl("create", "--validate=strict", "-f", "-", text=json.dumps(manifest))

    def _envoys_deployment(self) -> str:
        assert self._programs.ended(_PROGRAM) is None, self.log()
        arguments = ("get", "deployment", "-l", _OWNER, "-ojsonpath={.items[*].metadata.name}")
        return self._system.kubectl(*arguments)


def answers(url: str) -> bool:
    """True if the answer is 200."""
    try:
        _read(url)
    except OSError:
        return False
    return True


def _read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        text: str = answer.read().decode()
        return text
