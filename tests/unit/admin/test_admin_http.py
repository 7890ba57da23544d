"""The admin server over a real socket."""

import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import msgspec
import numpy as np
import pytest
from aiohttp import ClientSession
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

from extproc.admin.http import AdminServer, Questions
from extproc.app import App
from extproc.build import build_kv, build_shared
from extproc.config.models import ModelConfig
from extproc.config.server import ServerConfig
from extproc.config.status import ReloadStatus
from extproc.errors import ConfigError
from extproc.metrics.service import Metrics
from extproc.routing.gateway_watch import GatewayWatch
from extproc.routing.ranks import Ranks
from extproc.workers.engine_tokenizer import EngineTokenizer
from extproc.workers.registry import WorkerRegistry
from extproc.workers.source_health import SourceHealth
from extproc.workers.worker import KvEvents, WorkerSpec
from tests.builders import make_spec, make_worker
from tests.fakes import FakeClock, FakeEngineClient
from tests.unit.configs import config


class Admin:
    """A running server, the state it shows, and a client for it."""

    def __init__(self, session: ClientSession, metrics: CollectorRegistry) -> None:
        self.session = session
        self.workers = WorkerRegistry()
        self.metrics = metrics
        self.ready = False
        self.refused: list[WorkerSpec] = []
        self.reloads: ReloadStatus | None = None
        self.sources = SourceHealth()
        self.gateway = gateway_of(self.workers)
        self.ranks = ranks_of(ModelConfig(id="m", policy="min_ttft", tokenizer_path="-"))

    async def get(self, path: str) -> tuple[int, str, bytes]:
        async with self.session.get(path) as response:
            return response.status, response.headers.get("content-type", ""), await response.read()

    async def page(self) -> dict[str, Any]:
        async with self.session.get("/workers") as response:
            body: dict[str, Any] = await response.json()
        pages = {"discovery", "envoys", "ignored_by_gateway", "refused", "workers"}
        assert body.keys() == pages
        return body

    async def listed(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = (await self.page())["workers"]
        return workers


def gateway_of(workers: WorkerRegistry) -> GatewayWatch:
    return GatewayWatch(FakeClock(), workers, Metrics(CollectorRegistry()), ["m"])


def ranks_of(model: ModelConfig) -> Ranks:
    """Ranks of a service with this model."""
    settings = config(models=[msgspec.to_builtins(model)])
    return build_kv(
        settings,
        build_shared(settings, clock=FakeClock()),
        EngineTokenizer(FakeEngineClient()),
        print,
    ).ranks


@contextmanager
def free_port() -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield port


@asynccontextmanager
async def running(
    metrics: CollectorRegistry | None = None, **settings: Any
) -> AsyncIterator[Admin]:
    with free_port() as port:
        async with ClientSession(f"http://127.0.0.1:{port}") as session:
            admin = Admin(session, metrics or CollectorRegistry())
            server = AdminServer(
                ServerConfig(admin_port=port, **settings),
                metrics=admin.metrics,
                workers=admin.workers,
                ranks=admin.ranks,
                gateway=admin.gateway,
                questions=Questions(
                    is_ready=lambda: admin.ready,
                    models=lambda: ["m"],
                    refused=lambda: admin.refused,
                    reloads=lambda: admin.reloads,
                    discovery=lambda: admin.sources.show(100.0),
                ),
            )
            await server.start()
            try:
                yield admin
            finally:
                await server.stop()
                await admin.ranks.indexer.close()


async def test_healthz_answers_before_the_service_is_ready() -> None:
    async with running() as admin:
        assert (await admin.get("/healthz"))[0::2] == (200, b"")


async def test_readiness_is_evaluated_on_every_probe() -> None:
    async with running() as admin:
        seen = []
        for ready in (False, True, False, True):
            admin.ready = ready
            status, _, body = await admin.get("/readyz")
            assert body == b""
            seen.append(status)
        assert seen == [503, 200, 503, 200]


async def test_the_last_reload_is_shown_with_its_problems() -> None:
    async with running() as admin:
        status, kind, body = await admin.get("/config")
        assert (status, kind.partition(";")[0], body) == (200, "application/json", b"null")
        admin.reloads = ReloadStatus(file="c.yaml", loaded_at=5.0, applied=2)
        admin.reloads.problems = ["models: at least one model is needed"]
        shown = msgspec.json.decode((await admin.get("/config"))[2])
        assert (shown["file"], shown["applied"], shown["refused_at"]) == ("c.yaml", 2, None)
        assert shown["problems"] == ["models: at least one model is needed"]


async def test_a_worker_that_is_not_in_the_file_of_endpoints_is_unknown_to_the_gateway() -> None:
    async with running() as admin:
        for number in (1, 2):
            admin.workers.upsert(make_worker(f"http://10.0.0.{number}:8000", order=number))
        admin.workers.limit_to(frozenset({"10.0.0.2:8000"}))
        shown = [(one["known_to_gateway"], one["ready"]) for one in await admin.listed()]
        assert shown == [(False, False), (True, True)]


async def test_metrics_are_served_before_the_service_is_ready() -> None:
    async with running() as admin:
        Counter("some_total", "Some.", registry=admin.metrics).inc(3)
        status, kind, body = await admin.get("/metrics")
        assert status == 200
        assert kind.startswith("text/plain; version=")
        assert b"\nsome_total 3.0\n" in body


OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def scrape(accept: str | None, encoding: str = "identity") -> tuple[str, str | None, str]:
    """Content type, content encoding and text of the metrics of a whole service."""
    app = App(config(), {})
    metrics = app.metrics
    metrics.requests("/v1/completions", "routed").inc()
    metrics.worker_requests("http://10.0.0.1:8000", "m", "plain", "success").inc()
    metrics.request_body_bytes.observe(2e6)
    async with running(metrics.registry) as admin:
        headers = {"accept-encoding": encoding} | ({"accept": accept} if accept else {})
        async with admin.session.get("/metrics", headers=headers) as response:
            assert response.status == 200
            text = await response.text()
            kind = response.headers["content-type"]
            packed = response.headers.get("content-encoding")
    await app.server.stop()
    await app.ranks.indexer.close()
    return kind, packed, text


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_a_client_that_accepts_openmetrics_gets_it(encoding: str) -> None:
    kind, packed, text = await scrape(OPENMETRICS, encoding)
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    assert packed == (None if encoding == "identity" else encoding)
    assert text.endswith("# EOF\n")
    # The parser is strict: names, types, units, bounds of buckets.
    families = {family.name: family for family in openmetrics(text)}  # type: ignore[no-untyped-call]
    assert families["extproc_requests"].type == "counter"
    assert {"extproc_kv_pages", "extproc_tickets_open", "process_cpu_seconds"} <= families.keys()
    bounds = [
        sample.labels["le"]
        for sample in families["extproc_request_body_bytes"].samples
        if sample.name.endswith("_bucket")
    ]
    assert bounds[-3:] == ["1.6e+07", "6.4e+07", "+Inf"]


@pytest.mark.parametrize("accept", [None, "*/*", "text/plain;version=0.0.4", "text/html"])
async def test_any_other_client_gets_plain_text(accept: str | None) -> None:
    kind, packed, text = await scrape(accept)
    assert kind.startswith("text/plain; version=0.0.4")
    assert packed is None
    assert "# EOF" not in text
    families = {family.name: family.type for family in plain_text(text)}
    assert families["extproc_requests"] == "counter"


async def test_both_formats_show_the_same_metrics() -> None:
    _, _, open_text = await scrape(OPENMETRICS)
    _, _, text = await scrape(None)
    named = [
        {(family.name, family.type) for family in parse if family.name.startswith("extproc_")}
        for parse in (
            openmetrics(open_text),  # type: ignore[no-untyped-call]
            plain_text(text),
        )
    ]
    assert named[0] == named[1]


async def test_without_workers_the_list_is_empty() -> None:
    async with running() as admin:
        assert await admin.listed() == []
        assert (await admin.get("/workers"))[1].startswith("application/json")


async def test_workers_are_listed_with_their_state() -> None:
    async with running() as admin:
        worker = make_worker("http://10.0.0.1:8000", in_flight=4, threshold=1)
        worker.breaker.failure(0.0)
        admin.workers.upsert(worker)
        admin.workers.upsert(
            make_worker("https://[::1]", order=1, role="prefill", model_ids=("n", "lora"))
        )
        first, second = await admin.listed()
        contract = {
            *("url", "model", "mode", "breaker", "in_flight", "ready", "known_to_gateway", "kv")
        }
        assert contract <= first.keys() == second.keys()
        assert {key: first[key] for key in contract} == {
            "url": "http://10.0.0.1:8000",
            "model": "m",
            "mode": "plain",
            "breaker": "open",
            "in_flight": 4,
            "ready": False,
            "known_to_gateway": True,
            "kv": {},
        }
        assert (second["url"], second["mode"]) == ("https://[::1]:443", "prefill")
        assert (second["model"], second["breaker"]) == ("n", "closed")


async def test_the_adapters_of_workers_are_shown_in_bounded_number() -> None:
    async with running() as admin:
        admin.workers.upsert(make_worker(adapters=["sql", "chat"]))
        (shown,) = await admin.listed()
        assert (shown["adapters"], shown["adapter_count"]) == (["chat", "sql"], 2)
        admin.workers.upsert(make_worker(adapters=[f"a{n:04}" for n in range(1000)]))
        (shown,) = await admin.listed()
        assert (len(shown["adapters"]), shown["adapter_count"]) == (100, 1000)


async def test_the_unused_addresses_of_a_name_are_shown_with_what_to_do() -> None:
    async with running() as admin:
        worker = make_worker("http://name:8000")
        admin.workers.upsert(worker)
        (shown,) = await admin.listed()
        assert "unused_addresses" not in shown
        assert "fix" not in shown
        worker.unused_addresses = tuple(f"10.0.0.{number}:8000" for number in range(2, 30))
        (shown,) = await admin.listed()
        assert shown["unused_addresses"] == list(worker.unused_addresses[:20])
        assert "discovery.backend: dns" in shown["fix"]


async def test_a_gateway_that_does_not_follow_is_shown() -> None:
    async with running() as admin:
        worker = make_worker()
        admin.workers.upsert(worker)
        assert (await admin.page())["ignored_by_gateway"] == []
        for _ in range(5):
            admin.gateway.passed_over("m", [worker], "10.9.9.9:1")
        page = await admin.page()
        assert page["ignored_by_gateway"] == ["m"]
        assert [one["known_to_gateway"] for one in page["workers"]] == [False]


async def test_refused_workers_are_named() -> None:
    async with running() as admin:
        admin.refused.append(make_spec("http://10.0.0.9:8000", role="decode", model_ids=("m",)))
        assert (await admin.page())["refused"] == [
            {"url": "http://10.0.0.9:8000", "model": "m", "mode": "decode"}
        ]


async def test_the_ranks_of_a_worker_are_shown_with_their_pages() -> None:
    async with running() as admin:
        events = KvEvents(host="127.0.0.1", port=1, block_size=4, dp_size=2)
        worker = make_worker(kv_events=events)
        admin.workers.upsert(worker)
        admin.ranks.joined(worker)
        rank, _ = admin.ranks.of(worker)
        assert rank.pages is not None
        tokens = np.arange(8, dtype=np.uint64)
        admin.ranks.indexer.index.store(rank.pages, [1, 2], None, tokens, 4)
        rank.load.book(500, 0.0)
        (shown,) = await admin.listed()
        assert shown["kv"]["page_size"] == 4
        first, second = shown["kv"]["ranks"]
        assert first == {
            "rank": 0,
            "in_flight": 1,
            "trusted": False,
            "reason": first["reason"],
            "connected": False,
            "pages": 2,
            "pages_by_tier": {"device": 2, "host": 0, "below": 0},
            "last_event_age_seconds": None,
            "gaps": 0,
            "restarts": 0,
            "malformed": 0,
        }
        assert (second["rank"], second["pages"], second["in_flight"]) == (1, 0, 0)


async def test_a_rank_without_kv_events_says_so() -> None:
    async with running() as admin:
        worker = make_worker()
        admin.workers.upsert(worker)
        admin.ranks.joined(worker)
        (shown,) = await admin.listed()
        assert shown["kv"] == {
            "page_size": None,
            "ranks": [{"rank": 0, "in_flight": 0, "trusted": False, "reason": "no_events"}],
        }


@pytest.mark.parametrize(
    ("model_ids", "resolved", "model", "ready"),
    [
        (("m",), True, "m", True),
        ((), True, None, False),
        (("m",), False, "m", False),
        ((), False, None, False),
    ],
)
async def test_a_worker_needs_a_model_and_an_address_to_be_ready(
    model_ids: tuple[str, ...], resolved: bool, model: str | None, ready: bool
) -> None:
    async with running() as admin:
        admin.workers.upsert(make_worker(model_ids=model_ids, resolved=resolved))
        (worker,) = await admin.listed()
        assert (worker["model"], worker["ready"]) == (model, ready)


async def test_a_breaker_with_a_running_probe_is_shown_as_half_open() -> None:
    async with running() as admin:
        worker = make_worker(threshold=1, cool_down_seconds=0.0)
        worker.breaker.failure(0.0)
        worker.breaker.claim(0.0)
        admin.workers.upsert(worker)
        (shown,) = await admin.listed()
        assert shown["breaker"] == "half_open"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/workers/", 404),
        ("POST", "/workers", 405),
        ("DELETE", "/healthz", 405),
        ("HEAD", "/healthz", 200),
    ],
)
async def test_other_paths_and_methods_are_refused(method: str, path: str, status: int) -> None:
    async with running() as admin, admin.session.request(method, path) as response:
        assert response.status == status


async def test_the_error_for_a_port_in_use_names_the_key() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ranks = ranks_of(ModelConfig(id="m"))
        server = AdminServer(
            ServerConfig(admin_port=port),
            metrics=CollectorRegistry(),
            workers=WorkerRegistry(),
            ranks=ranks,
            gateway=gateway_of(WorkerRegistry()),
            questions=Questions(
                is_ready=lambda: True, models=lambda: ["m"], refused=list, reloads=lambda: None
            ),
        )
        try:
            with pytest.raises(ConfigError) as caught:
                await server.start()
        finally:
            await server.stop()
            await ranks.indexer.close()
    (problem,) = caught.value.problems
    assert problem.startswith("server.admin_port: ")
    assert str(port) in problem


async def test_the_port_is_closed_after_stop() -> None:
    async with running() as admin:
        url = str(admin.session._base_url)
    async with ClientSession(url) as session:
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get("/healthz")


async def test_workers_that_discovery_does_not_confirm_are_stale() -> None:
    async with running() as admin:
        for worker in (make_worker("http://a:1"), make_worker("http://b:1", order=1)):
            admin.workers.upsert(worker)
        next(iter(admin.workers)).vanished = True
        assert [worker["stale"] for worker in await admin.listed()] == [True, False]
        admin.sources.works("pods")
        page = await admin.page()
        works = {"objects": "pods", "failing_seconds": None, "reason": None}
        assert (page["discovery"], page["workers"][1]["stale"]) == ([works], False)
        admin.sources.fails("pods", "unreachable", 40.0)
        admin.sources.fails("pods", "forbidden", 90.0)
        page = await admin.page()
        fails = {"objects": "pods", "failing_seconds": 60.0, "reason": "forbidden"}
        assert (page["discovery"], page["workers"][1]["stale"]) == ([fails], True)
        admin.sources.forget("pods")
        assert (await admin.page())["discovery"] == []
