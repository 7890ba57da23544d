"""Workers by DNS: every address of a name is a worker, as in a headless Service."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

import aiohttp
import dns.rcode
import pytest

from extproc.simulator.http import RunningSimulator, start
from extproc.simulator.settings import SimulatorSettings
from extproc.testing.stack import Stack, reserved_ports, wait_until
from tests.dns_server import NameServer, name_server
from tests.e2e.conftest import Fleet, Running

NAME: Final = "workers.test"
ADS: Final = {"endpoints": "ads"}
UP: Final = 'extproc_discovery_up{objects="names"}'


class Named:
    """A fleet at one port of several addresses, and the name server that names them."""

    def __init__(self, running: Running, server: NameServer, hosts: list[str]) -> None:
        self.running = running
        self.server = server
        self.hosts = hosts

    def name(self, *hosts: str) -> None:
        self.server.records = {NAME: {"A": list(hosts)}}

    async def counts(self) -> dict[str, int]:
        """How many requests each worker got."""
        stats = await self.running.fleet.stats()
        return dict(zip(self.hosts, (len(one["requests"]) for one in stats), strict=True))

    async def ready(self) -> set[str]:
        workers = await self.running.stack.workers()
        return {one["address"].partition(":")[0] for one in workers if one["ready"]}

    async def until_ready(self, *hosts: str) -> None:
        async def done() -> bool:
            return await self.ready() == set(hosts)

        await wait_until(done, f"the workers are {hosts}")

    async def ask(self, count: int) -> set[int]:
        async def one() -> int:
            async with self.running.chat(tokens=1) as response:
                await response.read()
                return int(response.status)

        return set(await asyncio.gather(*(one() for _ in range(count))))


@asynccontextmanager
async def named(
    folder: Path,
    hosts: list[str],
    envoy: dict[str, Any],
    edit_bootstrap: Callable[[NameServer, int, dict[str, Any]], None] | None = None,
    **keys: Any,
) -> AsyncIterator[Named]:
    """A worker at each of these hosts, all of them named, and a stack that finds them by name."""
    async with AsyncExitStack() as exits:
        server = await exits.enter_async_context(name_server())
        (port,) = exits.enter_context(reserved_ports(1))
        workers: list[RunningSimulator] = []
        for host in hosts:
            settings = SimulatorSettings(
                model="m", host=host, port=port, decode_milliseconds_per_token=2.0
            )
            workers.append(await start(settings))
            exits.push_async_callback(workers[-1].stop)
        section = {
            "urls": [f"http://{NAME}:{port}"],
            "nameservers": [server.address],
            "ttl_min_secs": 0.1,
            "leave_secs": 1,
        }
        settings_of_stack = {
            "models": [{"id": "m"}],
            "discovery": {"backend": "dns", "dns": section | keys},
            "envoy": envoy,
        }
        server.records = {NAME: {"A": hosts[:2]}}
        edit = None if edit_bootstrap is None else partial(edit_bootstrap, server, port)
        stack = Stack(folder, [], settings_of_stack, edit_bootstrap=edit)
        await exits.enter_async_context(stack)
        await stack.envoy.wait_ready(lambda: stack.answers(f"{stack.envoy_admin_url}/ready"))
        http = await exits.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        yield Named(Running(stack, Fleet(workers), http), server, hosts)


HOSTS: Final = ["127.0.0.21", "127.0.0.22", "127.0.0.23"]


@pytest.mark.parametrize("endpoints", ["ads", "file"])
async def test_every_address_is_a_worker_and_requests_follow_the_records(
    tmp_path: Path, endpoints: str
) -> None:
    first, second, third = HOSTS
    file = str(tmp_path / "endpoints.json")
    envoy = ADS if endpoints == "ads" else {"endpoints_file": file}
    async with named(tmp_path, HOSTS, envoy) as fleet:
        running = fleet.running
        await fleet.until_ready(first, second)
        assert await fleet.ask(30) == {200}
        counts = await fleet.counts()
        assert min(counts[first], counts[second]) > 5
        assert counts[third] == 0

        fleet.name(first, second, third)
        await fleet.until_ready(first, second, third)
        assert await fleet.ask(30) == {200}
        assert (await fleet.counts())[third] > 5

        # One leaves while its stream goes on.
        fleet.name(first)
        await fleet.until_ready(first)
        fleet.name(first, second)
        await fleet.until_ready(first, second)
        before = await fleet.counts()
        streams = [running.chat(tokens=2000, stream=True) for _ in range(2)]
        responses = [await one.__aenter__() for one in streams]
        busy = await fleet.counts()
        assert (busy[first] - before[first], busy[second] - before[second]) == (1, 1)
        fleet.name(first)
        await fleet.until_ready(first)

        async def gone() -> bool:
            return len(await running.stack.workers()) == 1

        await wait_until(gone, "the workers without an address are removed")
        assert await fleet.ask(10) == {200}
        after = await fleet.counts()
        assert {host for host in HOSTS if after[host] > busy[host]} == {first}
        for stream, response in zip(streams, responses, strict=True):
            assert response.status == 200
            assert (await response.read()).endswith(b"data: [DONE]\n\n")
            await stream.__aexit__(None, None, None)
        assert await running.sample("extproc_destination_missed_total") == 0


async def test_workers_stay_while_the_name_server_has_no_good_answer(tmp_path: Path) -> None:
    async with named(tmp_path, HOSTS[:2], ADS, ttl_max_secs=0.5) as fleet:
        server, running = fleet.server, fleet.running
        await fleet.until_ready(*HOSTS[:2])
        good = server.records

        async def errors(reason: str) -> float:
            name = f'extproc_discovery_errors_total{{objects="names",reason="{reason}"}}'
            return (await running.stack.metrics()).get(name, 0)

        async def check(reason: str) -> None:
            async def counted() -> bool:
                return await errors(reason) >= 3

            await wait_until(counted, f"failures are counted as {reason}")
            assert (await running.stack.metrics())[UP] == 0
            assert await fleet.ready() == set(HOSTS[:2])
            assert await fleet.ask(8) == {200}

        async def recovered() -> bool:
            return (await running.stack.metrics())[UP] == 1

        await wait_until(recovered, "all is well")
        server.code = dns.rcode.SERVFAIL
        await check("server_error")
        server.code = None
        await wait_until(recovered, "it has recovered from SERVFAIL")
        server.records = {}
        await check("name_not_found")
        server.records = {NAME: {"TXT": ["nothing"]}}
        await check("no_addresses")
        server.records = good
        await wait_until(recovered, "it has recovered from no name")
        server.code = dns.rcode.REFUSED
        await check("refused")
        counts = await fleet.counts()
        assert min(counts.values()) > 5
        log = running.stack.service.log.read_text()
        assert log.count("discovery_failing") == 4


async def test_the_service_is_not_ready_before_the_name_server_has_answered(tmp_path: Path) -> None:
    async with named(tmp_path, HOSTS[:2], ADS) as fleet:
        stack = fleet.running.stack
        await stack.service.stop()
        fleet.server.code = dns.rcode.SERVFAIL
        await stack.service.start()

        async def trouble() -> bool:
            try:
                return (await fleet.running.sample("extproc_discovery_errors_total")) >= 2
            except aiohttp.ClientError:
                return False

        await wait_until(trouble, "the service has asked")
        assert not await stack.answers(f"{stack.admin_url}/readyz")
        # Envoy sends requests to the same names meanwhile.
        fleet.server.code = None
        await fleet.until_ready(*HOSTS[:2])
        await stack.service.wait_ready(lambda: stack.answers(f"{stack.admin_url}/readyz"))


async def test_without_the_service_envoy_asks_the_same_name_servers(tmp_path: Path) -> None:
    async with named(tmp_path, HOSTS[:2], ADS) as fleet:
        await fleet.until_ready(*HOSTS[:2])
        await fleet.running.stack.service.stop()

        async def answered() -> bool:
            return await fleet.ask(4) == {200}

        await wait_until(answered, "Envoy sends requests to the workers", seconds=15)
        assert await fleet.ask(30) == {200}
        assert min((await fleet.counts()).values()) > 5


def resolve_in_envoy(server: NameServer, port: int, bootstrap: dict[str, Any]) -> None:
    """Envoy looks up the name by itself, as a gateway with a file of its own."""
    clusters = bootstrap["static_resources"]["clusters"]
    (workers,) = (one for one in clusters if one["name"] == "workers")
    del workers["eds_cluster_config"]
    resolver = {
        "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3"
        ".CaresDnsResolverConfig",
        "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": server.port}}],
    }
    address = {"socket_address": {"address": NAME, "port_value": port}}
    workers |= {
        "type": "STRICT_DNS",
        "dns_lookup_family": "V4_PREFERRED",
        "dns_refresh_rate": "0.5s",
        "typed_dns_resolver_config": {
            "name": "envoy.network.dns_resolver.cares",
            "typed_config": resolver,
        },
        "load_assignment": {
            "cluster_name": "workers",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }
    clusters[[one["name"] for one in clusters].index("workers")] = workers


async def test_a_gateway_that_resolves_the_name_by_itself_follows_a_moment_later(
    tmp_path: Path,
) -> None:
    # The file is only there so that Envoy's own can be rendered.
    envoy = {"endpoints_file": str(tmp_path / "endpoints.json")}
    async with named(tmp_path, HOSTS, envoy, resolve_in_envoy) as fleet:
        stack = fleet.running.stack
        del stack.config["envoy"]["endpoints_file"]
        stack.write_config()
        await stack.service.stop()
        await stack.start_service()
        await stack.envoy.wait_ready(stack.envoy_sees_service)
        first, second, third = HOSTS
        await fleet.until_ready(first, second)
        assert await fleet.ask(30) == {200}
        counts = await fleet.counts()
        assert min(counts[first], counts[second]) > 5
        missed = "extproc_destination_missed_total"
        assert await fleet.running.sample(missed) == 0

        fleet.name(first, second, third)
        await fleet.until_ready(first, second, third)
        # Requests for the new address are served by others, until Envoy has it.
        assert await fleet.ask(4) == {200}

        async def followed() -> bool:
            before = await fleet.running.sample(missed)
            assert await fleet.ask(9) == {200}
            return (
                await fleet.running.sample(missed) == before and (await fleet.counts())[third] > 0
            )

        await wait_until(followed, "Envoy has the new address")


async def test_each_role_can_have_a_name(tmp_path: Path) -> None:
    """The engines do not report their roles, as vLLM."""
    hosts = ["127.0.0.31", "127.0.0.32", "127.0.0.33"]
    async with AsyncExitStack() as exits:
        server = await exits.enter_async_context(name_server())
        prefill_port, decode_port = exits.enter_context(reserved_ports(2))
        workers: list[RunningSimulator] = []
        for host, port in zip(hosts, (prefill_port, prefill_port, decode_port), strict=True):
            settings = SimulatorSettings(
                model="m", host=host, port=port, pd_protocol="nixl", no_server_info=True
            )
            workers.append(await start(settings))
            exits.push_async_callback(workers[-1].stop)
        prefill, decode = f"http://p.test:{prefill_port}", f"http://d.test:{decode_port}"
        section = {
            "urls": [prefill, decode],
            "prefill_urls": [prefill],
            "decode_urls": [decode],
            "nameservers": [server.address],
            "ttl_min_secs": 0.1,
        }
        settings_of_stack = {
            "models": [{"id": "m", "pd": {"protocol": "nixl"}}],
            "discovery": {"backend": "dns", "dns": section},
            "envoy": ADS | {"fail_open": False},
        }
        server.records = {"p.test": {"A": hosts[:1]}, "d.test": {"A": hosts[2:]}}
        stack = await exits.enter_async_context(Stack(tmp_path, [], settings_of_stack))
        await stack.envoy.wait_ready(lambda: stack.answers(f"{stack.envoy_admin_url}/ready"))
        http = await exits.enter_async_context(aiohttp.ClientSession())
        fleet = Named(Running(stack, Fleet(workers), http), server, hosts)
        await fleet.until_ready(hosts[0], hosts[2])
        assert await fleet.ask(3) == {200}
        assert list((await fleet.counts()).values()) == [3, 0, 3]

        server.records["p.test"] = {"A": hosts[1:2]}
        await fleet.until_ready(hosts[1], hosts[2])
        assert await fleet.ask(3) == {200}
        assert list((await fleet.counts()).values()) == [3, 3, 6]
        assert {one["mode"] for one in await stack.workers()} == {"prefill", "decode"}


async def test_no_request_fails_while_the_records_change_all_the_time(tmp_path: Path) -> None:
    """A name server that gives a part of the addresses in turn, for example."""
    hosts = [f"127.0.0.{number}" for number in range(41, 47)]
    random = Random(1)
    async with named(tmp_path, hosts, ADS, leave_secs=0.3) as fleet:
        await fleet.until_ready(*hosts[:2])
        statuses: list[int] = []
        ended = asyncio.Event()

        async def ask() -> None:
            while not ended.is_set():
                async with fleet.running.chat(tokens=20, stream=True) as response:
                    text = await response.read()
                    statuses.append(response.status if text.endswith(b"[DONE]\n\n") else 0)

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(ask())
            for _ in range(40):
                # One of them stays, so that there always is one that Envoy knows.
                fleet.name(hosts[0], *random.sample(hosts[1:], random.randint(0, 5)))
                await asyncio.sleep(0.2)
            ended.set()
        assert len(statuses) > 100
        assert set(statuses) == {200}
        assert await fleet.running.sample("extproc_destination_missed_total") == 0
        assert min((await fleet.counts()).values()) > 0
