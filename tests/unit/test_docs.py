"""The pages that describe the code say what the code says."""

import importlib.util
import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from extproc import errors
from extproc.admin.collector import WorkerCollector
from extproc.admin.kv_collector import EncoderCollector, KvCollector
from extproc.envoy_config.routes import FAIL_OPEN_PATHS
from extproc.metrics.service import Metrics
from extproc.routing.ranks import Ranks
from extproc.routing.request import (
    DETOKENIZE_PATH,
    ENDPOINT_PATHS,
    MODELS_PATH,
    TOKENIZE_PATH,
    find_endpoint,
)
from extproc.workers.registry import WorkerRegistry
from extproc.workers.tickets import Tickets
from tests.fakes import FakeClock

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_the_configuration_page_is_what_the_structs_render_to() -> None:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert (DOCS / "configuration.md").read_text() == generate.render(), "run `make docs`"


async def test_every_metric_is_documented_and_nothing_else() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    load = Tickets(FakeClock(), 1.0, metrics.stale_requests)
    registry.register(WorkerCollector(WorkerRegistry(), load))
    ranks = Ranks(FakeClock(), max_pages=1000)
    registry.register(KvCollector(ranks, FakeClock()))
    registry.register(EncoderCollector({}))
    names = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in registry.collect()
    }
    await ranks.indexer.close()
    rows = re.findall(r"^\| (`extproc_[^|]*)\|", (DOCS / "metrics.md").read_text(), re.M)
    documented = {name for row in rows for name in re.findall(r"`(extproc_\w+)`", row)}
    assert documented == names


def test_every_error_code_of_the_service_is_documented() -> None:
    page = (DOCS / "errors.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", page, re.M))
    made = [
        errors.bad_request("x"),
        errors.body_required(),
        errors.model_not_found("m"),
        errors.not_found(),
        errors.method_not_allowed("POST"),
        errors.payload_too_large(1),
        errors.request_timeout(),
        errors.no_healthy_workers(),
        errors.routing_timeout(),
        errors.service_overloaded(),
        errors.unsupported_body_mode(),
        errors.stale_request_expired(),
        errors.internal_error(),
    ]
    for error in made:
        assert documented[error.code] == str(error.status)


def test_the_paths_that_fail_open_are_those_that_are_routed() -> None:
    routed = set()
    for path in FAIL_OPEN_PATHS:
        method = "GET" if path == MODELS_PATH else "POST"
        routed.add(find_endpoint(method, path).path)
    # Tokens are counted by this service and nobody else.
    ours = {TOKENIZE_PATH, DETOKENIZE_PATH}
    assert routed == set(FAIL_OPEN_PATHS) == set(ENDPOINT_PATHS) - ours


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *DOCS.glob("*.md"), *(ROOT / "envoy").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
