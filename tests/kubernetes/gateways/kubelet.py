"""Runs containers of Deployments as processes, with the arguments, variables and files of a pod.

No kubelet and no controller of Deployments run here. All pods share one network, so a pod's
address is one of this machine, at which only its own servers listen.
"""

import base64
import json
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from ..cluster import Cluster
from ..kubectl import Kubectl
from ..programs import Programs

__all__ = ["NODE", "Kubelet", "RunningPod", "with_files"]

# Of all pods; the EndpointSlice controller skips those of unknown nodes.
NODE: Final = "node-1"
_TOKEN_FOLDER: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
# Mounts pairs of a folder and the path at which the program sees it, then becomes the program.
_MOUNT: Final = (
    'while [ "$1" != -- ]; do mkdir -p "$2"; mount --bind "$1" "$2"; shift 2; done;'
    ' shift; exec "$@"'
)


def with_files(command: Sequence[str], folders: Mapping[str, Path]) -> list[str]:
    """The command, which alone sees these folders at these paths."""
    pairs = [text for path, folder in folders.items() for text in (str(folder), path)]
    return ["unshare", "--mount", "sh", "-c", _MOUNT, "sh", *pairs, "--", *command]


class RunningPod:
    """One container of a pod as a process."""

    def __init__(self, programs: Programs, name: str, ip: str, command: list[str]) -> None:
        self.name = name
        self.ip = ip
        self._programs = programs
        self._command = command

    def start(self) -> None:
        """Start the container, perhaps again."""
        self._programs.start(self.name, self._command)

    def kill(self) -> None:
        """End the process as a crash does."""
        self._programs.signal(self.name, signal.SIGKILL)

    def stop(self) -> None:
        """End the process as a kubelet does."""
        self._programs.stop(self.name)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The process keeps its connections and does nothing."""
        self._programs.signal(self.name, signal.SIGSTOP)
        try:
            yield
        finally:
            self._programs.signal(self.name, signal.SIGCONT)

    def log(self) -> str:
        return self._programs.log(self.name)


class Kubelet:
    """`images` has the command in place of an image's entry point, by the name of the container."""

    def __init__(self, cluster: Cluster, folder: Path, images: Mapping[str, Sequence[str]]) -> None:
        self._cluster = cluster
        self._folder = folder
        self._images = images

    def run(
        self, namespace: str, deployment: str, ip: str, *, edit: tuple[str, str] = ("\0", "")
    ) -> RunningPod:
        """Make a pod of the Deployment and run it; its status says from then on if it is ready.

        In its files the first text of `edit` is replaced by the second: a server that listens at
        all addresses would meet that of another pod.
        """
        api = Kubectl(self._cluster.admin_kubeconfig(), namespace)
        template = json.loads(api.kubectl("get", "deployment", deployment, "-ojson"))["spec"][
            "template"
        ]
        name = f"{deployment}-{ip.replace('.', '-')}"
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": template["metadata"] | {"name": name, "namespace": namespace},
            "spec": template["spec"] | {"nodeName": NODE},
        }
        api.kubectl("create", "--validate=strict", "-f", "-", text=json.dumps(pod))
        (container,) = (c for c in pod["spec"]["containers"] if c["name"] in self._images)
        variables = {one["name"]: self._value(api, pod, one) for one in container.get("env", [])}
        where = self._cluster.url.removeprefix("https://").split(":")
        address = dict(zip(("HOST", "PORT"), where, strict=True))
        variables |= {f"KUBERNETES_SERVICE_{key}": value for key, value in address.items()}
        arguments = [
            re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], one)
            for one in container["args"]
        ]
        command = [
            "env",
            *(f"{key}={value}" for key, value in variables.items()),
            *self._images[container["name"]],
            *arguments,
        ]
        command = with_files(command, self._files(api, pod, container, edit))
        running = RunningPod(self._cluster.programs, name, ip, command)
        running.start()
        prober = [sys.executable, str(Path(__file__).with_name("prober.py"))]
        prober += ["--kubeconfig", api.kubeconfig, "--namespace", namespace, "--pod", name]
        prober += ["--ip", ip, "--probe", _probe(container, ip)]
        self._cluster.programs.start(f"prober-{name}", prober)
        return running

    def write_secret(self, api: Kubectl, name: str, folder: Path) -> None:
        """Write a Secret into a new folder."""
        _write(folder, self._data(api, "secret", name))

    def _value(self, api: Kubectl, pod: dict[str, Any], variable: dict[str, Any]) -> str:
        if "value" in variable:
            return str(variable["value"])
        source = variable.get("valueFrom", {})
        if field := source.get("fieldRef", {}).get("fieldPath"):
            found = re.fullmatch(r"metadata\.(name|namespace)", field)
            return str(pod["metadata"][found[1]]) if found else ""
        if secret := source.get("secretKeyRef"):
            return self._data(api, "secret", secret["name"])[secret["key"]].decode()
        return ""

    def _data(self, api: Kubectl, kind: str, name: str) -> dict[str, bytes]:
        found = json.loads(api.kubectl("get", kind, name, "-ojson"))["data"]
        decode = base64.b64decode if kind == "secret" else str.encode
        return {key: decode(value) for key, value in found.items()}

    def _files(
        self, api: Kubectl, pod: dict[str, Any], container: dict[str, Any], edit: tuple[str, str]
    ) -> dict[str, Path]:
        """The folders of the container's volumes, and that of its service account."""
        volumes = {one["name"]: one for one in pod["spec"].get("volumes", [])}
        found: dict[str, Path] = {}
        for mount in container.get("volumeMounts", []):
            volume = volumes[mount["name"]]
            if "configMap" in volume:
                data = self._data(api, "configmap", volume["configMap"]["name"])
            elif "secret" in volume:
                data = self._data(api, "secret", volume["secret"]["secretName"])
            else:
                continue
            before, after = (text.encode() for text in edit)
            data = {key: value.replace(before, after) for key, value in data.items()}
            found[mount["mountPath"]] = self._folder_of(pod, mount["name"], data)
        if account := pod["spec"].get("serviceAccountName"):
            token = api.kubectl("create", "token", account).strip()
            authority = self._cluster.ca_file.read_bytes()
            name = pod["metadata"]["namespace"]
            data = {"token": token.encode(), "ca.crt": authority, "namespace": name.encode()}
            found[_TOKEN_FOLDER] = self._folder_of(pod, "account", data)
        return found

    def _folder_of(self, pod: dict[str, Any], name: str, data: Mapping[str, bytes]) -> Path:
        folder = self._folder / str(pod["metadata"]["name"]) / name
        _write(folder, data)
        return folder


def _probe(container: dict[str, Any], ip: str) -> str:
    """The URL of the readiness probe."""
    get = container["readinessProbe"]["httpGet"]
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    return f"http://{ip}:{ports.get(get['port'], get['port'])}{get['path']}"


def _write(folder: Path, data: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True)
    for key, value in data.items():
        (folder / key).write_bytes(value)
