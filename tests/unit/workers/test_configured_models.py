"""What the configuration adds to a worker, by the models that the worker serves."""

import pytest

from extproc.config.models import CircuitBreakerConfig, KvEventsConfig, ModelConfig
from extproc.workers.configured_models import ConfiguredModels
from extproc.workers.introspection import Introspection
from extproc.workers.worker import KvEvents
from tests.builders import make_spec

MODELS = ConfiguredModels(
    [
        ModelConfig(id="plain"),
        ModelConfig(id="careful", circuit_breaker=CircuitBreakerConfig(threshold=7)),
        ModelConfig(id="kv", policy="min_ttft"),
        ModelConfig(
            id="placed",
            policy="min_ttft",
            kv_events=[KvEventsConfig(endpoint="tcp://*:5001", block_size=16)],
        ),
    ]
)
DEFAULT_THRESHOLD = CircuitBreakerConfig().threshold


@pytest.mark.parametrize(
    ("served", "threshold"),
    [
        (("careful", "plain"), 7),
        (("plain", "careful"), DEFAULT_THRESHOLD),
        (("unknown", "careful"), 7),
        (("unknown",), DEFAULT_THRESHOLD),
        ((), DEFAULT_THRESHOLD),
    ],
)
def test_the_breaker_is_that_of_the_first_configured_model(
    served: tuple[str, ...], threshold: int
) -> None:
    assert MODELS.breaker_of(make_spec(model_ids=served)).threshold == threshold


@pytest.mark.parametrize(
    ("served", "missing"),
    [(("plain",), None), (("plain", "kv"), "kv"), (("placed",), None), (("unknown",), None)],
)
def test_kv_events_are_missing_where_a_policy_needs_them(
    served: tuple[str, ...], missing: str | None
) -> None:
    spec = MODELS.complete(make_spec(), Introspection(model_ids=served))
    assert MODELS.model_without_kv_events(spec) == missing


def test_configured_kv_events_fill_in_for_the_workers_own() -> None:
    spec = MODELS.complete(make_spec(), Introspection(model_ids=("placed",)))
    assert spec.kv_events is not None
    assert spec.kv_events.port == 5001
    own = KvEvents(host="10.0.0.1", port=6000, block_size=64)
    spec = MODELS.complete(spec, Introspection(model_ids=("placed",), kv_events=own))
    assert spec.kv_events == own


def test_configured_kv_events_go_with_their_model() -> None:
    spec = MODELS.complete(make_spec(), Introspection(model_ids=("placed",)))
    spec = MODELS.complete(spec, Introspection(model_ids=("plain",)))
    assert spec.kv_events is None
