"""A pod of the chart in `mode: gateway`: its containers as processes, in a kubelet's order."""

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from extproc.config.loading import load_config
from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import ManagedProcess, find_envoy, reserved_ports, wait_until
from helm.generate import CHART
from tests.helm.chart import Release, render
from tests.helm.scripts import load_script
from tests.unit.simulator.model_folders import model_folder

RUN = "/run/llm-extproc"


class Pod:
    """The containers of one rendered pod, in a folder instead of its volumes."""

    def __init__(self, release: Release, folder: Path) -> None:
        self.folder = folder
        self.config_file = folder / "extproc.yaml"
        text = yaml.safe_dump(release.config).replace(RUN, str(folder))
        self.config_file.write_text(text)
        self.config = load_config(self.config_file)
        spec = release.pod["spec"]
        *_, files, envoy = spec["initContainers"]
        self.files_command = self._here(files["command"])
        self.pre_stop = self._here(release.container["lifecycle"]["preStop"]["exec"]["command"])
        arguments = [*self._here(envoy["args"]), "--log-level", "warning"]
        self.envoy = ManagedProcess("envoy", [find_envoy(), *arguments], folder / "envoy.log")
        serve = [sys.executable, "-m", "extproc", *self._here(release.container["args"])]
        self.service = ManagedProcess("service", serve, folder / "service.log")
        self.address = f"127.0.0.1:{self.config.envoy.port}"

    def _here(self, command: list[str]) -> list[str]:
        """A command with the paths and the Python of this machine."""
        places = {
            RUN: str(self.folder),
            "/etc/extproc": str(self.folder),
            "/opt/scripts": str(CHART / "files"),
        }
        for place, here in places.items():
            command = [part.replace(place, here) for part in command]
        return [sys.executable if part == "python" else part for part in command]

    async def start(self) -> None:
        assert await self.run(self.files_command) == 0
        await self.envoy.start()
        # The startup probe of the sidecar: before it succeeds, the service is not started.
        await self.envoy.wait_ready(self._listens)
        await self.service.start()
        await self.service.wait_ready(self._is_ready)

    async def run(self, command: list[str]) -> int:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        process = await asyncio.create_subprocess_exec(*command, env={**os.environ, "PATH": path})
        return await process.wait()

    async def stop(self) -> None:
        await self.service.stop()
        await self.envoy.stop()

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.config.envoy.port)
        except OSError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    async def _is_ready(self) -> bool:
        url = f"http://127.0.0.1:{self.config.server.admin_port}/readyz"
        try:
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                return answer.status == 200
        except OSError:
            return False


@asynccontextmanager
async def gateway_pod(
    worker: dict[str, Any] | None = None, values: dict[str, Any] | None = None
) -> AsyncIterator[Pod]:
    """A pod of a release with one worker, and with further values by their dotted names."""
    async with AsyncExitStack() as exits:
        # The path of a Unix socket must be short.
        folder = exits.enter_context(tempfile.TemporaryDirectory(prefix="pod"))
        *ports, worker_port = exits.enter_context(reserved_ports(5))
        simulator = await start(
            SimulatorSettings(
                model="m",
                port=worker_port,
                decode_milliseconds_per_token=20.0,
                **(worker or {}),
            )
        )
        exits.push_async_callback(simulator.stop)
        names = ("server.port", "server.admin_port", "envoy.port", "envoy.admin_port")
        more: dict[str, Any] = {
            f"config.{name}": port for name, port in zip(names, ports, strict=True)
        }
        more |= {
            "mode": "gateway",
            "preStopSecs": 0,
            "workerApiKey": None,
            "config.models": [{"id": "m"}],
            "config.discovery.static_urls.urls": [simulator.url],
            "config.envoy.access_log": f"{folder}/access.log",
            "config.envoy.hang_timeout_secs": 10,
            "config.server.drain_secs": 0,
        }
        release, errors = render(CHART / "values" / "list-of-workers.yaml", more | (values or {}))
        assert release.objects, errors
        found = Pod(release, Path(folder))
        exits.push_async_callback(found.stop)
        await found.start()
        yield found


@pytest.fixture
async def pod() -> AsyncIterator[Pod]:
    async with gateway_pod() as found:
        yield found


@pytest.mark.parametrize("missing", ["", "chat_template.jinja"])
async def test_the_check_of_a_release_sees_missing_files_without_debug_headers(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model_folder(tmp_path)
    worker = {"page_size": 16, "kv_events_port": 0, "tokenizer_path": path}
    served = tmp_path / "served"
    shutil.copytree(path, served)
    if missing:
        (served / missing).unlink()
    model = {"id": "m", "policy": "min_ttft", "tokenizer_path": str(served)}
    mount = {"name": "models", "mountPath": str(tmp_path)}
    values = {"config.models": [model], "extraVolumeMounts": [mount]}
    async with gateway_pod(worker, values) as found:
        check = load_script("check_release").check

        async def answered() -> bool:
            capsys.readouterr()
            await asyncio.to_thread(check, "gateway", found.address, found.config)
            out = capsys.readouterr().out
            return out.startswith("m: no_tokens: ") if missing else out == "m: good\n"

        await wait_until(answered, "the check says what is missing")


async def test_envoy_waits_for_its_responses_before_the_pod_stops(pod: Pod) -> None:
    check = load_script("check_release").check

    async def answered() -> bool:
        good: bool = await asyncio.to_thread(check, "gateway", pod.address, pod.config)
        return good

    await wait_until(answered, "a request is answered")
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 60,
        "stream": True,
    }
    url = f"http://{pod.address}/v1/chat/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        assert answer.status == 200
        stopping = asyncio.create_task(pod.run(pod.pre_stop))
        text = await answer.text()
        was_waiting = not stopping.done()
        assert await stopping == 0
    assert was_waiting
    assert text.rstrip().endswith("data: [DONE]")
    assert await pod.service.stop() == 0
    await pod.envoy.stop()


@pytest.mark.parametrize("name", ["vllm-with-envoy", "prefill-and-decode"])
async def test_envoy_accepts_the_files_of_an_installation(name: str, tmp_path: Path) -> None:
    release, _ = render(CHART / "values" / f"{name}.yaml")
    found = Pod(release, tmp_path)
    assert await found.run(found.files_command) == 0
    command = [find_envoy(), "--mode", "validate", "-c", str(tmp_path / "envoy.yaml")]
    assert await found.run([*command, "--log-level", "error"]) == 0
