"""An upgrade of the chart replaces the pods under traffic, behind the real Envoy."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import yaml

from extproc.config.loading import load_config
from extproc.envoy_config import render_yaml
from extproc.headers import EXTPROC_CLUSTER
from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import ManagedProcess, find_envoy, reserved_ports, wait_until
from helm.generate import CHART
from tests.e2e.kubelet import Deployment
from tests.helm.chart import Release, render
from tests.helm.earlier import unpack_earlier_chart

CLIENTS: Final = 6


class Traffic:
    """Clients that ask one thing after the other, and what became of their requests."""

    def __init__(self, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = url
        self._stopping = False

    async def ask(self, http: aiohttp.ClientSession, *, stream: bool, tokens: int) -> None:
        body = {
            "model": "m",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": tokens,
            "stream": stream,
        }
        try:
            async with http.post(self._url, json=body) as answer:
                text = await answer.text()
                whole = text.rstrip().endswith("[DONE]") if stream else "choices" in text
                outcome = "good" if answer.status == 200 and whole else f"{answer.status}: {text}"
        except aiohttp.ClientError as error:
            outcome = repr(error)
        self.outcomes[outcome] += 1

    async def run(self, http: aiohttp.ClientSession) -> None:
        async def client(number: int) -> None:
            while not self._stopping:
                # Two of them have answers that take longer than a pod has to drain.
                tokens = 4000 if number < 2 else 20
                await self.ask(http, stream=number % 2 == 0, tokens=tokens)

        await asyncio.gather(*[client(number) for number in range(CLIENTS)])

    def stop(self) -> None:
        self._stopping = True


class Installation:
    """A gateway, its workers, and pods of releases that come one after the other."""

    def __init__(
        self, deployment: Deployment, url: str, admin_url: str, values: dict[str, Any]
    ) -> None:
        self.deployment = deployment
        self.url = url
        self.admin_url = admin_url
        self._values = values

    async def stats(self, http: aiohttp.ClientSession) -> dict[str, int]:
        """What Envoy counts of its streams to the service."""
        async with http.get(f"{self.admin_url}/stats?filter=ext_proc|cluster.extproc") as answer:
            lines = [line.rpartition(": ") for line in (await answer.text()).splitlines()]
        return {name: int(value) for name, _, value in lines if value.isdigit()}

    def release(self, chart: Path = CHART, **more: Any) -> Release:
        """The objects of the chart; `more` are values with `__` for dots."""
        named = {name.replace("__", "."): value for name, value in more.items()}
        found, errors = render(
            chart / "values" / "list-of-workers.yaml", self._values | named, chart=chart
        )
        assert found.objects, errors
        return found


@asynccontextmanager
async def installation(folder: Path) -> AsyncIterator[Installation]:
    async with AsyncExitStack() as exits:
        *ports, first, second = exits.enter_context(reserved_ports(6))
        urls = []
        for port in (first, second):
            worker = await start(
                SimulatorSettings(model="m", port=port, decode_milliseconds_per_token=5.0)
            )
            exits.push_async_callback(worker.stop)
            urls.append(worker.url)
        names = ("server.port", "server.admin_port", "envoy.port", "envoy.admin_port")
        values: dict[str, Any] = {
            f"config.{name}": port for name, port in zip(names, ports, strict=True)
        }
        values |= {
            "autoscaling.hpa.enabled": False,
            "workerApiKey": None,
            "config.load": {},
            "config.models": [{"id": "m"}],
            "config.discovery.static_urls.urls": urls,
            "config.envoy.hang_timeout_secs": 10,
            # A request that the service does not answer fails.
            "config.envoy.fail_open": False,
        }
        deployment = Deployment(folder, EXTPROC_CLUSTER, ports[0])
        exits.push_async_callback(deployment.close)
        url, admin_url = (f"http://127.0.0.1:{port}" for port in ports[2:])
        found = Installation(deployment, url, admin_url, values)
        file = write_envoy_file(folder, found)
        envoy = ManagedProcess(
            "envoy",
            [find_envoy(), "-c", str(file), "--use-dynamic-base-id", "--log-level", "warning"],
            folder / "envoy.log",
        )
        exits.push_async_callback(envoy.stop)
        await envoy.start()
        yield found


def write_envoy_file(folder: Path, found: Installation) -> Path:
    """The gateway: it learns from its control plane which pods of the service there are."""
    config_file = folder / "gateway.yaml"
    config_file.write_text(yaml.safe_dump(found.release().config))
    bootstrap = yaml.safe_load(render_yaml(load_config(config_file)))
    clusters = bootstrap["static_resources"]["clusters"]
    (cluster,) = [one for one in clusters if one["name"] == EXTPROC_CLUSTER]
    del cluster["load_assignment"]
    cluster["type"] = "EDS"
    source = {"path": str(found.deployment.endpoints_file)}
    cluster["eds_cluster_config"] = {
        "eds_config": {"path_config_source": source, "resource_api_version": "V3"}
    }
    file = folder / "envoy.yaml"
    file.write_text(yaml.safe_dump(bootstrap))
    return file


async def test_no_request_fails_while_a_release_is_upgraded(tmp_path: Path) -> None:
    """From the first chart to this one, and then to another value that needs new pods."""
    earlier = unpack_earlier_chart(tmp_path)
    async with (
        installation(tmp_path) as found,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as http,
    ):
        await found.deployment.apply(found.release(earlier))
        first = Traffic(f"{found.url}/v1/chat/completions")

        async def answered() -> bool:
            before = first.outcomes["good"]
            await first.ask(http, stream=False, tokens=1)
            return first.outcomes["good"] > before

        await wait_until(answered, "the gateway knows the pods")
        traffic = Traffic(f"{found.url}/v1/chat/completions")
        running = asyncio.create_task(traffic.run(http))
        await found.deployment.apply(found.release())
        await found.deployment.apply(found.release(config__server__max_body_bytes=1_000_000))
        traffic.stop()
        await running
        assert traffic.outcomes.keys() == {"good"}, traffic.outcomes
        assert traffic.outcomes["good"] > 300
        stats = await found.stats(http)
        assert stats["http.ingress.ext_proc.streams_started"] >= traffic.outcomes["good"]
        # Other gateways have no such retries.
        assert stats["cluster.extproc.upstream_rq_retry"] == 0
        assert stats["http.ingress.ext_proc.streams_failed"] == 0
        pods = found.deployment.every
        assert len(pods) == 6
        assert not any(pod.killed for pod in pods)
        assert [pod.process.returncode for pod in pods] == [0, 0, 0, 0, None, None]
