"""Renders what serves requests again that a full worker has refused: its limit, and its reports.

Envoy reports only the last attempt with the response. So a filter in the workers' cluster, which
runs for each attempt, reports each 503 and 429 before the next attempt. Other responses pass it
without a message.
"""

from math import ceil
from typing import Any, Final

from extproc.config.schema import Config
from extproc.envoy_config.wire_form import UNLIMITED, duration, typed
from extproc.headers import (
    ATTEMPT_PASS,
    ATTEMPTS_NAMESPACE,
    EXTPROC_CLUSTER,
    EXTPROC_FILTER,
    PASS_KEY,
    RETRY_AFTER_HEADER,
    STATUS_HEADER,
)

__all__ = ["attempt_filters", "retry_limits"]

_BUSY: Final = ("429", "503")
# An answer that could not be reported in time counts as if no report was sent.
_REPORT_SECONDS: Final = 2.0
_BUDGET_PERCENT: Final = 20
# Retries at a time that are always allowed, however few requests are in flight.
_RETRIES_MIN: Final = 5


def retry_limits(config: Config, workers: int) -> dict[str, Any]:
    """The limits of the workers' cluster: none but the share of retries among the requests in
    flight.

    A dead worker's requests are retried from the same budget, so that it is at least the share of
    one worker.
    """
    limits: dict[str, Any] = {
        "priority": "DEFAULT",
        "max_connections": UNLIMITED,
        "max_pending_requests": UNLIMITED,
        "max_requests": UNLIMITED,
    }
    if config.proxy.retry_busy:
        percent = max(_BUDGET_PERCENT, ceil(100 / max(workers, 2)))
        limits["retry_budget"] = {
            "budget_percent": {"value": percent},
            "min_retry_concurrency": _RETRIES_MIN,
        }
    else:
        limits["max_retries"] = UNLIMITED
    return {"thresholds": [limits]}


def attempt_filters(config: Config) -> list[dict[str, Any]]:
    """The HTTP filters of the workers' cluster; empty where a full worker's answer is final."""
    if not config.proxy.retry_busy:
        return []
    reporter = typed(
        "extensions.filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service={
            "envoy_grpc": {"cluster_name": EXTPROC_CLUSTER, "skip_envoy_headers": True},
            "initial_metadata": [{"key": PASS_KEY, "value": ATTEMPT_PASS}],
        },
        failure_mode_allow=True,
        message_timeout=duration(_REPORT_SECONDS),
        processing_mode={"request_header_mode": "SKIP", "response_header_mode": "SEND"},
        forward_rules={
            "allowed_headers": {
                "patterns": [{"exact": STATUS_HEADER}, {"exact": RETRY_AFTER_HEADER}]
            }
        },
        response_attributes=["upstream.address", "upstream.request_attempt_count"],
        metadata_options={"receiving_namespaces": {"untyped": [ATTEMPTS_NAMESPACE]}},
    )
    return [
        {
            "name": "attempts",
            "typed_config": typed(
                "extensions.common.matching.v3.ExtensionWithMatcher",
                xds_matcher={"matcher_list": {"matchers": [_skipping_other_statuses()]}},
                extension_config={"name": EXTPROC_FILTER, "typed_config": reporter},
            ),
        },
        {
            "name": "envoy.filters.http.upstream_codec",
            "typed_config": typed("extensions.filters.http.upstream_codec.v3.UpstreamCodec"),
        },
    ]


def _skipping_other_statuses() -> dict[str, Any]:
    status = {
        "name": "status",
        "typed_config": typed(
            "type.matcher.v3.HttpResponseHeaderMatchInput", header_name=STATUS_HEADER
        ),
    }
    busy = [{"single_predicate": {"input": status, "value_match": {"exact": one}}} for one in _BUSY]
    return {
        "predicate": {"not_matcher": {"or_matcher": {"predicate": busy}}},
        "on_match": {
            "action": {
                "name": "skip",
                "typed_config": typed("extensions.filters.common.matcher.action.v3.SkipFilter"),
            }
        },
    }
