"""`extproc simulate` in a process of its own, as scripts use it."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest

import extproc
from extproc.simulator.http import start
from extproc.simulator.settings import SimulatorSettings
from tests.unit.simulator.clients import broken_off, events

Spawn = Callable[..., Awaitable[asyncio.subprocess.Process]]

_SOURCE = Path(extproc.__file__).parents[1]


@pytest.fixture
async def spawn() -> AsyncIterator[Spawn]:
    """Starts the command with the given options; what still runs after the test is killed."""
    processes: list[asyncio.subprocess.Process] = []

    async def spawn(*options: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-W", "error", "-m", "extproc.simulator", *options),
            cwd=_SOURCE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        processes.append(process)
        return process

    yield spawn
    for process in processes:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_prints_a_line_when_it_listens_and_stops_on_a_signal(
    spawn: Spawn, number: signal.Signals
) -> None:
    process = await spawn("--model", "m", "--log-requests")
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    assert line.startswith("simulator ready url=http://127.0.0.1:")
    assert line.endswith(" model=m\n")
    url = line.split("url=")[1].split()[0]
    body = {"prompt": "secret prompt", "stream": True, "max_tokens": 100_000}
    async with aiohttp.ClientSession(url) as session:
        await (await session.post("/v1/completions", json=body | {"max_tokens": 1})).read()
        async with session.post("/v1/completions", json=body):
            process.send_signal(number)
            out, err = await process.communicate()
    assert (process.returncode, out) == (0, b"")
    assert b"outcome=completed" in err
    assert b"secret" not in err
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("fault", "tokens"),
    [("die-before-headers, reset", 0), ("die-after-tokens=3, reset", 3), ("die-after-tokens=3", 3)],
)
async def test_connections_die_on_its_own_event_loop_too(
    spawn: Spawn, fault: str, tokens: int
) -> None:
    process = await spawn("--decode-milliseconds-per-token", "0")
    assert process.stdout is not None
    url = (await process.stdout.readline()).decode().split("url=")[1].split()[0]
    got = b""
    async with aiohttp.ClientSession(url, headers={"x-simulator-fault": fault}) as session:
        with contextlib.suppress(aiohttp.ClientOSError):
            async with session.post("/v1/completions", json={"prompt": "a", "stream": True}) as r:
                got, error = await broken_off(r)
                assert isinstance(error, aiohttp.ClientError)
        async with session.get("/simulator/stats") as response:
            stats = await response.json()
    assert len(events(got)) == tokens
    assert (stats["failed"], stats["aborted"], stats["running"]) == (1, 0, 0)
    process.terminate()
    _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


async def test_a_file_without_a_tokenizer_names_the_setting(spawn: Spawn) -> None:
    process = await spawn("--tokenizer-path", "/nowhere/tokenizer.json")
    out, err = await process.communicate()
    assert (process.returncode, out) == (2, b"")
    assert err.startswith(b"tokenizer_path:")


async def test_it_prints_its_kv_event_ports(spawn: Spawn) -> None:
    options = ("--kv-events-port", "0", "--wire-format", "array", "--host-cache-tokens", "640")
    process = await spawn(*options)
    assert process.stdout is not None
    fields = dict(
        item.split("=") for item in (await process.stdout.readline()).decode().split()[2:]
    )
    async with aiohttp.ClientSession(fields["url"]) as session:
        await (await session.post("/v1/completions", json={"prompt": "x" * 200})).read()
        async with session.post("/simulator/restart") as response:
            assert response.status == 200
        async with session.get("/server_info") as response:
            info = (await response.json())["kv_events"]
    assert fields["kv_events_port"] == str(info["endpoint_port_base"])
    assert fields["kv_replay_port"] == str(info["replay_endpoint_port_base"])
    assert fields["kv_load_port"] == str(info["load_endpoint_port_base"])
    process.terminate()
    _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


async def test_several_workers_in_one_process(spawn: Spawn) -> None:
    options = ("--workers", "3", "--kv-events-port", "0", "--no-replay", "--model", "m")
    process = await spawn(*options, "--decode-milliseconds-per-token", "0")
    assert process.stdout is not None
    found = []
    for _ in range(3):
        line = (await process.stdout.readline()).decode()
        assert line.startswith("simulator ready url=")
        found.append(dict(item.split("=") for item in line.split()[2:]))
    ports = [fields["kv_events_port"] for fields in found]
    assert len({*ports, *(fields["kv_load_port"] for fields in found)}) == 6
    for fields in found:
        async with aiohttp.ClientSession(fields["url"]) as session:
            for cached in (0, 64):
                body = {"prompt": "x" * 70, "max_tokens": 1}
                async with session.post("/v1/completions", json=body) as response:
                    usage = (await response.json())["usage"]
                assert usage["prompt_tokens_details"]["cached_tokens"] == cached
    process.terminate()
    _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (
            ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", "0"),
            "disaggregation_bootstrap_port",
        ),
        (("--pd-protocol", "nixl"), "nixl_side_channel_port"),
    ],
)
async def test_it_prints_its_transfer_port(
    spawn: Spawn, options: tuple[str, ...], name: str
) -> None:
    process = await spawn("--workers", "2", "--bootstrap-timeout-seconds", "1.5", *options)
    assert process.stdout is not None
    ports = set()
    for _ in range(2):
        line = (await process.stdout.readline()).decode()
        ports.add(dict(item.split("=") for item in line.split()[2:])[name])
    assert len(ports - {"0"}) == 2
    for port in ports:
        _, writer = await asyncio.open_connection("127.0.0.1", int(port))
        writer.close()
        await writer.wait_closed()
    process.terminate()
    _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


async def test_a_taken_bootstrap_port_is_named(spawn: Spawn) -> None:
    settings = SimulatorSettings(disaggregation_mode="prefill", disaggregation_bootstrap_port=0)
    async with await start(settings) as simulator:
        port = str(simulator.bootstrap_port)
        options = ("--disaggregation-mode", "prefill", "--disaggregation-bootstrap-port", port)
        process = await spawn(*options)
        _, err = await process.communicate()
    assert process.returncode == 1
    assert b"disaggregation_bootstrap_port: 127.0.0.1:" + port.encode() in err


async def test_a_killed_worker_is_replaced_at_once(spawn: Spawn) -> None:
    process = await spawn("--kv-events-port", "0")
    assert process.stdout is not None
    line = (await process.stdout.readline()).decode()
    fields = dict(item.split("=") for item in line.split()[2:])
    port = fields["url"].rpartition(":")[2]
    kv_ports = [item for name, value in fields.items() if "port" in name for item in (name, value)]
    options = [item.replace("_", "-") for item in kv_ports]
    options = [f"--{item}" if item.startswith("kv") else item for item in options]
    async with aiohttp.ClientSession(fields["url"]) as session:
        body = {"prompt": "a", "stream": True, "max_tokens": 100_000}
        async with session.post("/v1/completions", json=body) as response:
            process.kill()
            again = await spawn("--port", port, *options)
            assert again.stdout is not None
            assert (await again.stdout.readline()).decode() == line
            _, error = await broken_off(response)
            assert isinstance(error, aiohttp.ClientError)
        async with session.get("/health") as healthy:
            assert healthy.status == 200


async def test_a_taken_port_names_the_port(spawn: Spawn) -> None:
    async with await start(SimulatorSettings()) as simulator:
        process = await spawn("--port", str(simulator.port))
        _, err = await process.communicate()
    assert process.returncode == 1
    assert str(simulator.port).encode() in err
