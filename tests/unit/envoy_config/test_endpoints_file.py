"""The file of endpoints: what is in it, when it is written, and from when on Envoy knows it."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from extproc.envoy_config.endpoints import Endpoint, endpoints_text, read_endpoints
from extproc.envoy_config.endpoints_file import EndpointsFile, configured_endpoints
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker
from tests.builders import make_worker
from tests.fakes import FakeClock
from tests.unit.configs import config, discovery

A, B = "http://10.0.0.1:8000", "http://10.0.0.2:8000"
ENDPOINTS = [
    Endpoint("10.0.0.1:8000", A),
    Endpoint("10.0.0.2:443", "https://w.example:443"),
    Endpoint("[2001:db8::1]:80", "https://[2001:db8::1]:80"),
]


def addresses(file: Path) -> list[str]:
    groups = json.loads(file.read_text())["resources"][0]["endpoints"]
    found = [entry["endpoint"]["address"]["socket_address"] for entry in groups[0]["lb_endpoints"]]
    return [f"{one['address']}:{one['port_value']}" for one in found]


def test_the_text_is_the_same_in_any_order_and_can_be_read_again() -> None:
    text = endpoints_text("workers", ENDPOINTS)
    assert endpoints_text("workers", reversed(ENDPOINTS)) == text
    assert read_endpoints(text) == frozenset(ENDPOINTS)
    found = json.loads(text)["resources"][0]
    assert found["cluster_name"] == "workers"
    by_name = found["endpoints"][0]["lb_endpoints"][1]
    assert by_name["endpoint"]["hostname"] == "w.example"
    assert by_name["metadata"]["filter_metadata"]["envoy.transport_socket_match"] == {"tls": "tls"}
    assert (
        json.loads(text)["version_info"]
        != json.loads(endpoints_text("workers", []))["version_info"]
    )


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b'{"resources":[{"endpoints":7}]}', b"\xff", b"null"]
)
def test_another_file_has_no_endpoints(text: bytes) -> None:
    assert read_endpoints(text) == frozenset()


def test_two_names_of_one_address_are_one_endpoint() -> None:
    text = endpoints_text(
        "w", [Endpoint("10.0.0.1:1", "http://a:1"), Endpoint("10.0.0.1:1", "http://b:1")]
    )
    assert len(json.loads(text)["resources"][0]["endpoints"][0]["lb_endpoints"]) == 1


def test_configured_workers_with_names_have_to_be_resolved_first() -> None:
    found = configured_endpoints(config(discovery=discovery("http://name:1", "http://10.0.0.1:2")))
    assert found == [Endpoint("10.0.0.1:2", "http://10.0.0.1:2")]


class Setup:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.clock = FakeClock()
        self.registry = WorkerRegistry()
        self.all_named = False
        self.changes = 0
        self.endpoints = EndpointsFile(
            file,
            "workers",
            self.registry,
            self.clock,
            all_named=lambda: self.all_named,
            known_changed=self._note,
        )

    def _note(self) -> None:
        self.changes += 1

    def join(self, url: str, order: int = 0) -> Worker:
        worker = make_worker(url, order=order)
        self.registry.upsert(worker)
        self.endpoints.workers_changed()
        return worker

    def leave(self, worker: Worker) -> None:
        self.registry.remove(worker.id)
        self.endpoints.workers_changed()

    @property
    def pool(self) -> list[str]:
        return [worker.url for worker in self.registry.pool_of("m", "plain")]

    def written(self) -> list[str]:
        return addresses(self.file) if self.file.is_file() else []

    async def until(self, check: Callable[[], bool], step_seconds: float = 0.0) -> None:
        """Files are written in a thread, which the clock of the test does not wait for."""
        async with asyncio.timeout(30):
            while not check():
                await self.clock.advance(step_seconds)
                await asyncio.sleep(0.001)


@asynccontextmanager
async def running(
    file: Path, configured: Sequence[Endpoint] = (), **state: Any
) -> AsyncIterator[Setup]:
    setup = Setup(file)
    for name, value in state.items():
        setattr(setup, name, value)
    task = asyncio.create_task(setup.endpoints.run(configured))
    try:
        yield setup
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def test_a_worker_is_in_a_pool_once_envoy_had_time_to_read_the_file(tmp_path: Path) -> None:
    async with running(tmp_path / "e.json", all_named=True) as setup:
        worker = setup.join(A)
        assert setup.pool == []
        assert not setup.registry.gateway_knows(worker)
        await setup.until(lambda: setup.written() == ["10.0.0.1:8000"], 0.1)
        assert setup.pool == []
        await setup.until(lambda: setup.pool == [A], 0.1)
        assert setup.registry.gateway_knows(worker)
        assert setup.changes == 1
        assert os.listdir(tmp_path) == ["e.json"]


async def test_a_worker_that_leaves_is_taken_out_of_the_file(tmp_path: Path) -> None:
    async with running(tmp_path / "e.json", all_named=True) as setup:
        first = setup.join(A)
        setup.join(B, 1)
        await setup.until(lambda: setup.pool == [A, B], 0.1)
        setup.leave(first)
        await setup.until(lambda: setup.written() == ["10.0.0.2:8000"], 0.1)
        assert setup.pool == [B]
        # It is back at once, but Envoy has to read its address again.
        setup.join(A, 2)
        assert setup.pool == [B]
        await setup.until(lambda: setup.pool == [B, A], 0.1)


async def test_without_a_file_the_configured_workers_are_written_at_once(tmp_path: Path) -> None:
    async with running(tmp_path / "e.json", ENDPOINTS[:1]) as setup:
        await setup.until(lambda: setup.written() == ["10.0.0.1:8000"])


async def test_after_a_restart_the_file_keeps_all_workers_until_discovery_has_named_all(
    tmp_path: Path,
) -> None:
    file = tmp_path / "e.json"
    file.write_bytes(
        endpoints_text("workers", [Endpoint("10.0.0.1:8000", A), Endpoint("10.0.0.2:8000", B)])
    )
    async with running(file) as setup:
        setup.join(A)
        await setup.until(lambda: setup.pool == [A])
        assert setup.written() == ["10.0.0.1:8000", "10.0.0.2:8000"]
        setup.all_named = True
        setup.endpoints.workers_changed()
        await setup.until(lambda: setup.written() == ["10.0.0.1:8000"], 0.1)
        assert setup.pool == [A]


async def test_a_file_that_cannot_be_written_is_said_and_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "e.json"
    with capture_logs() as logs:
        async with running(file, all_named=True) as setup:
            setup.join(A)
            await setup.until(lambda: len(logs) > 1, 0.5)
            assert {entry["event"] for entry in logs} == {"endpoints_not_written"}
            assert setup.pool == []
            file.parent.mkdir()
            await setup.until(lambda: setup.pool == [A], 0.5)


async def test_a_file_that_is_removed_is_written_again(tmp_path: Path) -> None:
    async with running(tmp_path / "e.json", all_named=True) as setup:
        setup.join(A)
        await setup.until(lambda: setup.pool == [A], 0.1)
        setup.file.unlink()
        await setup.until(lambda: setup.written() == ["10.0.0.1:8000"], 0.5)
        # Envoy has not forgotten it.
        assert setup.pool == [A]
