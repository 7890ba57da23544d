"""Header names that steer Envoy, this service or an engine.

What a client may not say, and what of it a worker may not tell.

A request header is an instruction once a filter or the router reads it. All of these are
removed by name before any filter sees the request; the ones we use are set again by our own
reply. By name, because a prefix would hide a new header of ours from review.
"""

from typing import Final

from extproc.config.schema import Config
from extproc.routing.pd.decode_order import (
    DECODE_ORDER_HEADER,
    DECODE_WORKER_HEADER,
    RETRY_HEADER,
)

__all__ = [
    "DEBUG_HEADER",
    "DESTINATION",
    "WHICH_FILTER_KEY",
    "removed_from",
    "stripped_response_headers",
]

# The endpoint picker protocol's name, of the header as well as of the metadata key.
DESTINATION: Final = "x-gateway-destination-endpoint"
DEBUG_HEADER: Final = "x-extproc-debug"
# Initial metadata of our gRPC stream; as a request header it has no meaning, and shall not
# get one by accident.
WHICH_FILTER_KEY: Final = "x-extproc-pass"

_OURS: Final = (
    "x-extproc-cluster",
    DECODE_ORDER_HEADER,
    "x-extproc-model",
    "x-extproc-overlap",
    WHICH_FILTER_KEY,
    "x-extproc-policy",
    "x-extproc-reason",
    RETRY_HEADER,
    "x-extproc-worker",
)
_ENDPOINT_PICKER: Final = (DESTINATION, f"{DESTINATION}-served", f"{DESTINATION}-subset")
# Headers by which SGLang takes a rank, a prefill partner or a priority in place of the body's.
_ENGINE: Final = (
    "x-data-parallel-rank",
    "x-override-bootstrap-host",
    "x-override-bootstrap-port",
    "x-override-bootstrap-room",
    "x-override-disagg-prefill-dp-rank",
    "x-override-priority",
    "x-override-rid",
    "x-override-routed-dp-rank",
)
# Headers by which Envoy's router, retries, tracing or original-destination clusters take
# orders. Envoy drops some of them itself from clients it calls external; which clients are
# external is a setting of the deployment, so nothing is left to it.
_ENVOY: Final = (
    "x-envoy-attempt-count",
    "x-envoy-decorator-operation",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-force-trace",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-internal",
    "x-envoy-ip-tags",
    "x-envoy-is-timeout-retry",
    "x-envoy-max-retries",
    "x-envoy-original-dst-host",
    "x-envoy-original-method",
    "x-envoy-original-path",
    "x-envoy-original-url",
    "x-envoy-retriable-header-names",
    "x-envoy-retriable-status-codes",
    "x-envoy-retry-grpc-on",
    "x-envoy-retry-on",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-stream-duration-ms",
)


def removed_from(config: Config) -> list[str]:
    """Names removed from every request before the first filter, sorted.

    `x-extproc-debug` stays only where the operator has switched debug headers on.
    """
    names = {*_OURS, DECODE_WORKER_HEADER, *_ENDPOINT_PICKER, *_ENGINE, *_ENVOY}
    names |= {config.envoy.cluster_header, config.envoy.model_header}
    if not config.observability.debug_headers:
        names.add(DEBUG_HEADER)
    return sorted(names)


def stripped_response_headers(config: Config) -> list[str]:
    """Names removed from every worker's response, sorted.

    The router drops them as the response arrives, before our filter: what we add ourselves
    on the response (debug headers) is kept.
    """
    names = {*_OURS, *_ENDPOINT_PICKER, config.envoy.cluster_header, config.envoy.model_header}
    return sorted(names)
