"""Two replicas and two Envoys: each Envoy has its endpoints from one replica, and asks both."""

import asyncio
import contextlib
import copy
import signal
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from extproc.testing.stack import ManagedProcess, find_envoy, reserved_ports, wait_until
from tests.e2e.conftest import Launch, Running
from tests.e2e.test_replicas import two_replicas

_ROUNDS = 10


def crossed(bootstrap: dict[str, Any], replica: int, port: int, admin_port: int) -> dict[str, Any]:
    """The file of an Envoy that has its endpoints from this replica alone."""
    made = copy.deepcopy(bootstrap)
    resources = made["static_resources"]
    made["admin"]["address"]["socket_address"]["port_value"] = admin_port
    resources["listeners"][0]["address"]["socket_address"]["port_value"] = port
    clusters = {one["name"]: one for one in resources["clusters"]}
    both = clusters["extproc"]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    ads = clusters["extproc-ads"]["load_assignment"]["endpoints"][0]
    ads["lb_endpoints"] = [both[replica]]
    return made


@contextlib.asynccontextmanager
async def two_envoys(running: Running, folder: Path) -> AsyncIterator[list[str]]:
    """Gives their URLs."""
    bootstrap = yaml.safe_load((running.stack.folder / "envoy.yaml").read_text())
    async with contextlib.AsyncExitStack() as exits:
        ports = exits.enter_context(reserved_ports(4))
        for replica in range(2):
            file = folder / f"envoy-{replica}.yaml"
            made = crossed(bootstrap, replica, ports[2 * replica], ports[2 * replica + 1])
            file.write_text(yaml.safe_dump(made))
            argv = [find_envoy(), "-c", str(file), "--concurrency", "1", "--use-dynamic-base-id"]
            envoy = ManagedProcess(file.stem, [*argv, "--log-level", "warning"], folder / file.stem)
            await envoy.start()
            exits.push_async_callback(envoy.stop)
        yield [f"http://127.0.0.1:{port}" for port in ports[::2]]


async def samples(running: Running, admin: str, name: str) -> float:
    async with running.http.get(f"{admin}/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


async def test_no_worker_is_chosen_that_an_envoy_does_not_know(
    launch: Launch, tmp_path: Path
) -> None:
    statuses: list[int] = []
    ended = asyncio.Event()

    async def ask(running: Running, url: str) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        while not ended.is_set():
            async with running.http.post(f"{url}/v1/chat/completions", json=body) as response:
                await response.read()
                statuses.append(response.status)

    async with two_replicas(launch, tmp_path, endpoints="ads") as (running, second):
        stack = running.stack
        await stack.envoy.stop()
        file = tmp_path / "second.yaml"
        config = yaml.safe_load(file.read_text())
        admins = [stack.admin_url, f"http://127.0.0.1:{config['server']['admin_port']}"]
        urls = [one.url for one in running.fleet.workers]

        async def reload(wanted: list[str]) -> None:
            stack.config["discovery"]["static_urls"]["urls"] = wanted
            config["discovery"]["static_urls"]["urls"] = wanted
            stack.write_config()
            beside = file.with_suffix(".new")
            beside.write_text(yaml.safe_dump(config))
            beside.replace(file)
            second.send(signal.SIGHUP)
            stack.service.send(signal.SIGHUP)

        async def both_choose(wanted: list[str]) -> bool:
            for admin in admins:
                async with running.http.get(f"{admin}/workers") as response:
                    shown = (await response.json())["workers"]
                if {one["url"] for one in shown if one["ready"]} != set(wanted):
                    return False
            return True

        async with two_envoys(running, tmp_path) as envoys:

            async def all_connected() -> bool:
                for admin, envoy in zip(admins, envoys, strict=True):
                    if await samples(running, admin, "extproc_xds_streams_open") != 1:
                        return False
                    with contextlib.suppress(aiohttp.ClientError):
                        async with running.http.get(f"{envoy}/v1/models") as response:
                            if response.status == 200:
                                continue
                    return False
                return True

            await wait_until(all_connected, "each Envoy has its endpoints from one replica")
            asking = [asyncio.create_task(ask(running, url)) for url in envoys * 3]
            for turn in range(_ROUNDS):
                wanted = urls[:1] if turn % 2 == 0 else urls
                await reload(wanted)
                await wait_until(partial(both_choose, wanted), "both have changed")
                count = len(statuses)

                async def more(count: int = count) -> bool:
                    return len(statuses) > count + 100

                await wait_until(more, "further requests")
            ended.set()
            await asyncio.gather(*asking)
        missed = [
            await samples(running, admin, "extproc_destination_missed_total") for admin in admins
        ]
    assert set(statuses) == {200}
    assert sum(missed) == 0
