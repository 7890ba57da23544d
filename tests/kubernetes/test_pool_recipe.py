"""The recipe of an InferencePool on a real API server: its account, its pool and its configuration.

The gateway is the real Envoy, as Envoy AI Gateway sets it up for a pool. It finds no endpoints by
itself, so each request goes where the service says.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import trustme
import yaml

from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import Stack, reserved_ports
from tests.e2e.test_endpoint_picker import DESTINATION, Gateway

from .cluster import Cluster, Namespace
from .installation import Installation, until_not
from .pods import end_pod, run_pod
from .test_chart import Project

RECIPE: Final = Path(__file__).parents[2] / "envoy" / "inference-pool"
HOSTS: Final = ("127.0.0.2", "127.0.0.3")
BODY: Final = {"model": "my-model", "prompt": "hello", "max_tokens": 2}

pytestmark = pytest.mark.usefixtures("kinds")


class PoolStack(Stack):
    """The service with the recipe's configuration, and the Envoy of a gateway."""

    def render_bootstrap(self) -> None:
        server, envoy = self.config["server"], self.config["envoy"]
        service = {"endpoint": {"address": _address(server["port"])}}
        bootstrap: dict[str, Any] = {
            "admin": {"address": _address(envoy["admin_port"])},
            "overload_manager": {},
            "bootstrap_extensions": [],
            "static_resources": {
                "listeners": [{"address": _address(envoy["port"])}],
                "clusters": [
                    {"load_assignment": {}},
                    {"load_assignment": {"endpoints": [{"lb_endpoints": [service]}]}},
                ],
            },
        }
        Gateway("ai-gateway").edit(bootstrap)
        self._bootstrap_file.write_text(yaml.safe_dump(bootstrap, sort_keys=False))


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def objects(name: str, namespace: str) -> dict[str, dict[str, Any]]:
    """The objects of a file of the recipe by their kind, in another namespace."""
    text = (RECIPE / name).read_text().replace("namespace: llm\n", f"namespace: {namespace}\n")
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


def configuration(made: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The service's configuration of the recipe, without the addresses of its pod."""
    config: dict[str, Any] = yaml.safe_load(made["ConfigMap"]["data"]["extproc.yaml"])
    certificate = trustme.CA().issue_cert("extproc.llm.svc")
    certificate.private_key_pem.write_to_path(folder / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(folder / "tls.crt")
    for name in ("host", "port", "admin_host", "admin_port", "admin_token_env"):
        del config["server"][name]
    text = json.dumps(config).replace("/etc/extproc-tls", str(folder))
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture
async def installed(
    cluster: Cluster, namespace: Namespace, tmp_path: Path
) -> AsyncIterator[Installation]:
    project = Project(cluster.admin_kubeconfig(), namespace.name)
    made = objects("extproc.yaml", namespace.name)
    (pool,) = objects("pool.yaml", namespace.name).values()
    async with AsyncExitStack() as exits:
        (port,) = exits.enter_context(reserved_ports(1))
        pool["spec"]["targetPorts"] = [{"number": port}]
        for one in (made["ServiceAccount"], made["Role"], made["RoleBinding"], pool):
            project.kubectl("create", "--validate=strict", "-f", "-", text=json.dumps(one))
        token = project.kubectl(
            "create", "token", "extproc", "--audience=https://kubernetes.test"
        ).strip()
        settings = configuration(made, tmp_path)
        discovery = settings.pop("discovery")
        discovery["inference_pool"]["kubeconfig"] = cluster.kubeconfig(
            tmp_path / "extproc.kubeconfig", {"token": token}
        )
        stack = PoolStack(tmp_path, [], settings)
        stack.config["discovery"] = discovery
        session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        found = Installation(stack, await exits.enter_async_context(session), exits)
        for n, host in enumerate(HOSTS, 1):
            worker = await start(SimulatorSettings(host=host, port=port, model="my-model"))
            exits.push_async_callback(worker.stop)
            found.workers.append(worker)
            await run_pod(namespace, n, ip=host, port=port)
        yield found


async def serve(installed: Installation, times: int) -> list[int]:
    """Statuses of requests one after the other; a client's destination is sent with each."""
    statuses = []
    for _ in range(times):
        url = f"{installed.stack.url}/v1/completions"
        headers = {DESTINATION: "127.0.0.1:1"}
        async with installed.http.post(url, json=BODY, headers=headers) as answer:
            await answer.read()
            statuses.append(answer.status)
    return statuses


async def test_the_recipe_serves_the_pods_of_its_pool(
    namespace: Namespace, installed: Installation
) -> None:
    async with installed.stack:

        async def waiting() -> Any:
            shown = await installed.listed()
            return None if [one["ready"] for one in shown.values()] == [True, True] else shown

        await until_not(waiting)
        assert await serve(installed, 10) == [200] * 10
        counts = await asyncio.gather(*map(installed.served_by, installed.workers))
        assert sum(counts) == 10
        assert min(counts) > 0
        await end_pod(namespace, 1, grace_seconds=60)

        async def left() -> Any:
            shown = (await installed.listed()).get(installed.workers[0].url)
            return None if shown is None or shown["draining"] else shown

        await until_not(left)
        before = await installed.served_by(installed.workers[0])
        assert await serve(installed, 6) == [200] * 6
        assert await installed.served_by(installed.workers[0]) == before
