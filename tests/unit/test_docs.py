"""The pages about the code agree with the code."""

import ast
import contextlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import yaml
from prometheus_client import CollectorRegistry, Metric

from extproc.app import App
from extproc.config.models import ModelConfig
from extproc.engines.engine import EngineName, engine_named
from extproc.envoy_config import local_replies
from extproc.envoy_config.local_replies import LocalError
from extproc.envoy_config.routes import FAIL_OPEN_PATHS
from extproc.metrics.table import TABLE
from extproc.routing.engine_prompts import ENGINE_TOKENS_LATE
from extproc.routing.placement import TOKENS_DIFFER
from extproc.routing.request import (
    DETOKENIZE_PATH,
    ENDPOINT_PATHS,
    MODELS_PATH,
    TOKENIZE_PATH,
    find_endpoint,
)
from extproc.tokenization import reasons
from extproc.workers.worker import Role
from tests.unit.configs import config
from tests.unit.error_factories import error_factories

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def generator() -> ModuleType:
    """docs/generate.py, which is not part of a package."""
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    return generate


@pytest.mark.parametrize("page", ["configuration.md", "metrics.md", "schema.json"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    render = generator().PAGES[page]
    assert (DOCS / page).read_text() == render(), "run `make docs`"


async def test_the_metrics_page_names_what_a_service_exposes() -> None:
    exposed = {}
    async with built_service() as registry:
        for metric in registry.collect():
            name = metric.name + ("_total" if metric.type == "counter" else "")
            if name.startswith("extproc_"):
                exposed[name] = (metric.type, sorted(label_names(metric)), metric.documentation)
    page = (DOCS / "metrics.md").read_text()
    rows = re.findall(r"^\| `(extproc_\w+)` \| (\w+) \| (.*) \| (.*) \|$", page, re.M)
    documented = {
        name: (kind, sorted(re.findall(r"`(\w+)`", labels)), meaning)
        for name, kind, labels, meaning in rows
    }
    assert documented.keys() == exposed.keys()
    for name, (kind, labels, text) in exposed.items():
        assert documented[name][:2] == (kind, labels), name
        assert documented[name][2].replace("`", "").startswith(text), name


@contextlib.asynccontextmanager
async def built_service() -> AsyncIterator[CollectorRegistry]:
    """The metrics of a service with every part, which does not run."""
    app = App(config(), {})
    yield app.metrics.registry
    await app.server.stop()
    await app.ranks.indexer.close()


def label_names(metric: Metric) -> set[str]:
    """The labels of its samples; without a sample, those it was declared with."""
    found = {name for sample in metric.samples for name in sample.labels} - {"le"}
    return found or set(getattr(metric, "_labelnames", ()))


def test_reasons_in_the_metrics_page_are_those_of_the_code() -> None:
    documented = {
        spec.name: {label.name: set(label.values) for label in spec.labels}
        for section in TABLE
        for spec in section.specs
    }
    without_tokens = documented["extproc_prompts_without_tokens_total"]["reason"]
    assert without_tokens == {
        *reasons.REASONS,
        "body_not_visible",
        ENGINE_TOKENS_LATE,
        TOKENS_DIFFER,
    }
    assert documented["extproc_workers"]["role"] == set(get_args(Role))


def test_the_engines_page_says_what_the_code_knows_of_each_engine() -> None:
    page = (DOCS / "engines.md").read_text()
    rows = {row[0]: row[1:] for row in re.findall(r"^\| (.+) \| (.+) \| (.+) \|$", page, re.M)}
    for at, name in enumerate(get_args(EngineName)):
        engine = engine_named(name)
        since = ".".join(map(str, engine.since))
        assert rows["name in `models[].engine`"][at] == f"`{name}`"
        assert rows["versions read"][at] == f"{since} to {engine.read_until}"
        in_header = rows["data-parallel rank, where"][at].startswith("header")
        assert in_header is engine.ranks_in_header
        with_model = rows["LoRA adapter, name"][at] == "`model:adapter`"
        assert with_model is engine.adapters_with_model
        assert rows["load"][at].startswith("`/metrics`") is engine.load_from_metrics
    keys = set(re.findall(r"models\[\]\.(\w+)", page))
    assert keys <= set(ModelConfig.__struct_fields__)
    without = page.partition("## What has no tokens")[2]
    named = set(re.findall(r"^\| .+ \| .+ \| `([a-z_]+)` \|$", without, re.M))
    assert named
    assert named <= set(reasons.REASONS)


def test_the_errors_page_names_every_code_its_status_and_its_source() -> None:
    sent: dict[str, set[tuple[int, str]]] = defaultdict(set)
    for error in (make() for make in error_factories()):
        sent[error.code].add((error.status, "engine" if error.body else "service"))
    for local in vars(local_replies).values():
        if isinstance(local, LocalError):
            sent[local.code].add((local.status, "Envoy"))
    page = (DOCS / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .* \| ([\w, ]+) \|$", page, re.M)
    assert {code for code, _, _ in rows} == sent.keys()
    for code, status, sources in rows:
        assert {source for _, source in sent[code]} == set(sources.split(", ")), code
        assert {shown_status(number, status) for number, _ in sent[code]} == {status}, code


def shown_status(status: int, documented: str) -> str:
    return f"{status // 100}xx" if documented.endswith("xx") else str(status)


def test_messages_of_errors_are_made_in_one_module_only() -> None:
    for path in (ROOT / "extproc").rglob("*.py"):
        made = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("RouterError")
        ]
        assert not made or path.name == "errors.py", f"{path}: {made}"


def test_the_paths_that_fail_open_are_the_routed_paths() -> None:
    routed = set()
    for path in FAIL_OPEN_PATHS:
        method = "GET" if path == MODELS_PATH else "POST"
        routed.add(find_endpoint(method, path).path)
    # Only this service counts tokens.
    ours = {TOKENIZE_PATH, DETOKENIZE_PATH}
    assert routed == set(FAIL_OPEN_PATHS) == set(ENDPOINT_PATHS) - ours


@pytest.mark.parametrize(("file", "count"), [("plain.yaml", 4), ("prefill-and-decode.yaml", 5)])
def test_autoscalers_read_metrics_that_exist_and_combine_replicas_rightly(
    file: str, count: int
) -> None:
    kinds = {spec.name: spec.kind for section in TABLE for spec in section.specs}
    text = (DOCS / "scaling" / file).read_text()
    triggers = [trigger for one in yaml.safe_load_all(text) for trigger in one["spec"]["triggers"]]
    assert len(triggers) == count
    for trigger in triggers:
        query = trigger["metadata"]["query"]
        names = re.findall(r"extproc_\w+", query)
        assert names
        for name in names:
            # Every replica estimates the whole pool, and counts its own share of the requests.
            how = {"gauge": "max(avg_over_time(", "counter": "sum(rate("}[kinds[name]]
            assert how + name in query
        ratio = kinds[names[0]] == "gauge"
        assert trigger["metricType"] == ("Value" if ratio else "AverageValue")


def test_autoscalers_of_plain_workers_ask_about_plain_workers() -> None:
    text = (DOCS / "scaling" / "plain.yaml").read_text()
    assert set(re.findall(r'role="(\w+)"', text)) == {"plain"}


def test_the_page_on_scaling_names_the_kinds_that_check_its_objects() -> None:
    kinds = (ROOT / "tests" / "kubernetes" / "servers" / "crds.sh").read_text()
    (version,) = re.findall(r"kedacore/keda/v2@v([\d.]+) ", kinds)
    assert f"the kinds of KEDA {version}," in (DOCS / "scaling.md").read_text()


def test_links_between_pages_have_a_target() -> None:
    for page in (*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / "envoy").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
