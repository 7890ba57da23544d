"""The table of metrics: names, units, and series that vanish with their worker."""

from prometheus_client import CollectorRegistry

from extproc import __version__
from extproc.metrics.service import Metrics

_UNITS = ("_seconds", "_bytes", "_total", "_info", "_open", "_tokens")
# 0 or 1, without a unit.
_FLAGS = ("extproc_config_current", "extproc_discovery_up", "extproc_envoy_config_outdated")


def test_every_metric_name_has_the_prefix_and_its_unit() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    for family in registry.collect():
        assert family.name.startswith("extproc_")
        name = family.name + ("_total" if family.type == "counter" else "")
        assert name.endswith(_UNITS) or name in _FLAGS, name
        assert family.documentation.endswith(".")


def test_the_version_is_shown() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    assert registry.get_sample_value("extproc_build_info", {"version": __version__}) == 1


def test_two_services_in_one_process_do_not_share_numbers() -> None:
    registries = [CollectorRegistry(), CollectorRegistry()]
    first, _ = (Metrics(registry) for registry in registries)
    first.missed("m", "lag").inc()
    values = [
        registry.get_sample_value(
            "extproc_destination_missed_total", {"model": "m", "reason": "lag"}
        )
        for registry in registries
    ]
    assert values == [1, None]


def test_the_same_labels_give_the_same_series() -> None:
    metrics = Metrics(CollectorRegistry())
    assert metrics.decisions("m", "p", "r") is metrics.decisions("m", "p", "r")
    assert metrics.decisions("m", "p", "r") is not metrics.decisions("n", "p", "r")


def test_only_the_series_of_a_forgotten_worker_vanish() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for worker in ("http://a:1", "http://b:1"):
        for outcome in ("success", "error"):
            metrics.worker_requests(worker, "m", "plain", outcome).inc()
    metrics.forget_worker("http://a:1")
    left = {
        sample.labels["worker"]
        for family in registry.collect()
        if family.name == "extproc_worker_requests"
        for sample in family.samples
    }
    assert left == {"http://b:1"}
    metrics.forget_worker("http://never:1")


def test_series_of_what_is_not_kept_vanish_also_when_they_come_late() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    models, workers = {"gone", "kept"}, {"http://gone:1", "http://kept:1"}
    metrics.keep_only(models=lambda: models, workers=lambda: workers)

    def requests() -> None:
        for name in ("gone", "kept"):
            metrics.response_seconds(name).observe(1.0)
            for model in ("gone", "kept"):
                metrics.worker_requests(f"http://{name}:1", model, "plain", "success").inc()

    def shown(label: str) -> set[str]:
        return {
            sample.labels[label]
            for family in registry.collect()
            for sample in family.samples
            if label in sample.labels
        }

    requests()
    assert (shown("model"), shown("worker")) == (models, workers)
    models.remove("gone")
    workers.remove("http://gone:1")
    # The last responses of those that were removed.
    requests()
    assert (shown("model"), shown("worker")) == (models, workers)
    sample = {"worker": "http://kept:1", "model": "kept", "role": "plain", "outcome": "success"}
    assert registry.get_sample_value("extproc_worker_requests_total", sample) == 2
