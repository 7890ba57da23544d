"""Each problem of a worker is logged once, with a reason and what to change."""

import pytest
from structlog.testing import capture_logs

from extproc.workers.introspection import Introspection, IntrospectionWarning
from extproc.workers.registry import MixedRolesError
from extproc.workers.worker_warnings import WorkerWarnings, shown_models
from tests.builders import make_spec

SPEC = make_spec("http://10.0.0.1:8000")
GOOD = Introspection(model_ids=("m",))


@pytest.mark.parametrize(
    ("answer", "reason", "models"),
    [
        (Introspection(), "no_model_name", ""),
        (Introspection(model_ids=("x", "y")), "model_not_configured", "x,y"),
    ],
)
def test_a_worker_that_cannot_be_used_is_logged_once(
    answer: Introspection, reason: str, models: str
) -> None:
    warnings = WorkerWarnings(["m"])
    with capture_logs() as logs:
        warnings.answered(SPEC, answer)
        warnings.answered(SPEC, answer)
    [line] = logs
    assert (line["event"], line["worker"]) == ("worker_not_usable", "http://10.0.0.1:8000")
    assert (line["reason"], line["models"]) == (reason, models)
    assert line["fix"]


@pytest.mark.parametrize("reason", ["no_bootstrap_port", "unknown_role"])
def test_a_worker_that_should_be_configured_otherwise_is_logged_once(
    reason: IntrospectionWarning,
) -> None:
    warnings = WorkerWarnings(["m"])
    with capture_logs() as logs:
        for _ in range(2):
            warnings.answered(SPEC, Introspection(model_ids=("m",), warning=reason))
    [line] = logs
    assert (line["event"], line["reason"]) == ("worker_misconfigured", reason)
    assert line["fix"]


def test_the_number_of_addresses_is_logged_when_it_changes() -> None:
    warnings = WorkerWarnings(["m"])
    with capture_logs() as logs:
        for addresses in ((), (), ("10.0.0.1:8000",), (), ("10.0.0.1:8000", "10.0.0.2:8000")):
            warnings.addresses(SPEC, addresses)
    assert [(line["event"], line["reason"]) for line in logs] == [
        ("worker_not_usable", "no_address"),
        ("worker_not_usable", "no_address"),
        ("worker_misconfigured", "several_addresses"),
    ]
    assert "discovery.backend: dns" in logs[-1]["fix"]


def test_a_good_answer_makes_the_same_error_news_again() -> None:
    warnings, silent = WorkerWarnings(["m"]), Introspection(problem="connection refused")
    with capture_logs() as logs:
        for answer in (silent, silent, GOOD, silent):
            warnings.answered(SPEC, answer)
    assert [(line["event"], line["error"]) for line in logs] == [
        ("worker_not_answering", "connection refused")
    ] * 2


def test_a_refusal_names_the_model_and_the_role() -> None:
    warnings, error = WorkerWarnings(["m"]), MixedRolesError("m", "decode")
    with capture_logs() as logs:
        spec = make_spec(role="decode")
        assert warnings.refused(spec, error)
        assert not warnings.refused(spec, error)
        warnings.joined(spec)
        assert warnings.refused(spec, error)
    assert [(line["model"], line["role"]) for line in logs] == [("m", "decode")] * 2


def test_a_worker_that_left_is_new_when_it_returns() -> None:
    warnings = WorkerWarnings(["m"])
    with capture_logs() as logs:
        for _ in range(2):
            warnings.addresses(SPEC, ())
            warnings.left(SPEC.id)
    assert len(logs) == 2


def test_long_lists_of_models_are_cut() -> None:
    assert shown_models(["a", "b"]) == "a,b"
    assert len(shown_models(["model" * 10] * 100)) == 201


def test_a_version_whose_rules_were_not_read_is_logged_once_for_all_workers() -> None:
    warnings = WorkerWarnings(["m"])
    other = make_spec("http://10.0.0.2:8000")
    newer = Introspection(model_ids=("m",), engine="vllm", engine_version="0.99.0")
    read = Introspection(model_ids=("m",), engine="vllm", engine_version="0.32.0")
    with capture_logs() as logs:
        for spec in (SPEC, other, SPEC):
            warnings.answered(spec, newer)
            warnings.answered(spec, read)
    [line] = logs
    assert line["event"] == "engine_version_not_read"
    assert (line["engine"], line["version"]) == ("vllm", "0.99.0")
    assert "0.32" in line["read"]
