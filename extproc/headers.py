"""Names of headers, metadata keys and clusters that several parts must spell alike.

Envoy, this service, its two passes and the engines talk to each other in headers. The service
reads and writes them, the rendered Envoy configuration forwards, routes by and strips them, and
the configuration rules reserve them. Each name is written here once, so that these cannot drift
apart. Names that only one module uses (`content-type`, `allow`) are not listed. Headers that
steer engines are in `steering`.
"""

from typing import Final

__all__ = [
    "ADS_CLUSTER",
    "ATTEMPTS_NAMESPACE",
    "ATTEMPT_COUNT_HEADER",
    "ATTEMPT_PASS",
    "AUTHORIZATION_HEADER",
    "CONTENT_ENCODING_HEADER",
    "CONTENT_LENGTH_HEADER",
    "CONTENT_TYPE_HEADER",
    "DEBUG_HEADER",
    "DECISION_NAMESPACE",
    "DECODE_CLUSTER",
    "DECODE_ORDER_HEADER",
    "DECODE_PASS",
    "DECODE_PASS_HEADERS",
    "DECODE_WORKER_HEADER",
    "DEFAULT_CLUSTER_HEADER",
    "DEFAULT_MODEL_HEADER",
    "DESTINATION_HEADER",
    "DESTINATION_NAMESPACE",
    "DESTINATION_SERVED_HEADER",
    "DESTINATION_SUBSET_HEADER",
    "DESTINATION_SUBSET_NAMESPACE",
    "ENDPOINT_PICKER_HEADERS",
    "ENVOY_CONTROL_HEADERS",
    "ERROR_CODE_HEADER",
    "EXTPROC_CLUSTER",
    "EXTPROC_FILTER",
    "EXTPROC_HEADERS",
    "FIRST_BYTE_TIMEOUT_HEADER",
    "MAX_RETRIES_HEADER",
    "METHOD_HEADER",
    "OVERLAP_HEADER",
    "PASS_KEY",
    "PATH_HEADER",
    "POLICY_HEADER",
    "PREFILL_HEADERS",
    "PREFILL_HEADER_PREFIXES",
    "REASON_HEADER",
    "REQUEST_ID_HEADER",
    "REQUEST_TIMEOUT_HEADER",
    "RESPONSE_HEADERS",
    "RETRIABLE_STATUS_HEADER",
    "RETRY_AFTER_HEADER",
    "RETRY_HEADER",
    "RETRY_ON_HEADER",
    "ROUTE_PASS",
    "ROUTE_PASS_HEADERS",
    "STATUS_HEADER",
    "WORKER_HEADER",
]

# -- plain HTTP

METHOD_HEADER: Final = ":method"
PATH_HEADER: Final = ":path"
STATUS_HEADER: Final = ":status"
AUTHORIZATION_HEADER: Final = "authorization"
CONTENT_ENCODING_HEADER: Final = "content-encoding"
CONTENT_LENGTH_HEADER: Final = "content-length"
CONTENT_TYPE_HEADER: Final = "content-type"
REQUEST_ID_HEADER: Final = "x-request-id"
RETRY_AFTER_HEADER: Final = "retry-after"

# -- this service

# Request headers that name the cluster and the model, unless the configuration says otherwise.
DEFAULT_CLUSTER_HEADER: Final = "x-extproc-cluster"
DEFAULT_MODEL_HEADER: Final = "x-extproc-model"
# A client that sends "true" gets the debug headers, where the operator allows it.
DEBUG_HEADER: Final = "x-extproc-debug"
# Debug headers of a response: the chosen worker, and why it was chosen.
WORKER_HEADER: Final = "x-extproc-worker"
DECODE_WORKER_HEADER: Final = "x-extproc-decode-worker"
POLICY_HEADER: Final = "x-extproc-policy"
REASON_HEADER: Final = "x-extproc-reason"
OVERLAP_HEADER: Final = "x-extproc-overlap"
# Carries a DecodeOrder from the first pass to the second.
DECODE_ORDER_HEADER: Final = "x-extproc-decode-order"
# On an answer of the second pass after which Envoy may make the next attempt.
RETRY_HEADER: Final = "x-extproc-retry"
# On every error that this service or Envoy answers itself.
ERROR_CODE_HEADER: Final = "x-router-error-code"
# Initial metadata of the gRPC stream: which pass its filter belongs to.
PASS_KEY: Final = "x-extproc-pass"  # noqa: S105 (not a password)
ROUTE_PASS: Final = "route"  # noqa: S105
DECODE_PASS: Final = "decode"  # noqa: S105
# The filter of the workers' cluster, which reports a busy answer of an attempt.
ATTEMPT_PASS: Final = "attempt"  # noqa: S105
# Dynamic metadata with the busy answers of a request, for the first pass.
ATTEMPTS_NAMESPACE: Final = "extproc.attempts"
# Dynamic metadata with the decision, for access logs.
DECISION_NAMESPACE: Final = "extproc"
# The cluster of this service, and the one that leads to the second pass.
EXTPROC_CLUSTER: Final = "extproc"
ADS_CLUSTER: Final = "extproc-ads"
DECODE_CLUSTER: Final = "decode_pass"

EXTPROC_HEADERS: Final = (
    DEFAULT_CLUSTER_HEADER,
    DECODE_ORDER_HEADER,
    DEFAULT_MODEL_HEADER,
    OVERLAP_HEADER,
    PASS_KEY,
    POLICY_HEADER,
    REASON_HEADER,
    RETRY_HEADER,
    WORKER_HEADER,
)

# -- Gateway API inference extension (endpoint picker protocol)

# The chosen endpoints: a header, and a key of the metadata namespace.
DESTINATION_HEADER: Final = "x-gateway-destination-endpoint"
DESTINATION_SERVED_HEADER: Final = "x-gateway-destination-endpoint-served"
DESTINATION_SUBSET_HEADER: Final = "x-gateway-destination-endpoint-subset"
DESTINATION_NAMESPACE: Final = "envoy.lb"
DESTINATION_SUBSET_NAMESPACE: Final = "envoy.lb.subset_hint"

ENDPOINT_PICKER_HEADERS: Final = (
    DESTINATION_HEADER,
    DESTINATION_SERVED_HEADER,
    DESTINATION_SUBSET_HEADER,
)

# -- Envoy

# The filter's name is also the key of the attributes that it sends.
EXTPROC_FILTER: Final = "envoy.filters.http.ext_proc"
ATTEMPT_COUNT_HEADER: Final = "x-envoy-attempt-count"
MAX_RETRIES_HEADER: Final = "x-envoy-max-retries"
REQUEST_TIMEOUT_HEADER: Final = "x-envoy-upstream-rq-timeout-ms"
# Envoy ignores it once the response has begun, so it limits the time to the first byte.
FIRST_BYTE_TIMEOUT_HEADER: Final = "x-envoy-upstream-rq-per-try-timeout-ms"
RETRIABLE_STATUS_HEADER: Final = "x-envoy-retriable-status-codes"
RETRY_ON_HEADER: Final = "x-envoy-retry-on"

# Headers that control Envoy's router, retries, tracing or original-destination clusters. Envoy
# removes some of them itself from clients that it regards as external. Which clients are
# external depends on the deployment, so this service does not rely on it.
ENVOY_CONTROL_HEADERS: Final = (
    ATTEMPT_COUNT_HEADER,
    "x-envoy-decorator-operation",
    "x-envoy-downstream-service-cluster",
    "x-envoy-downstream-service-node",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-force-trace",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-internal",
    "x-envoy-ip-tags",
    "x-envoy-is-timeout-retry",
    MAX_RETRIES_HEADER,
    "x-envoy-original-dst-host",
    "x-envoy-original-method",
    "x-envoy-original-path",
    "x-envoy-original-url",
    "x-envoy-retriable-header-names",
    RETRIABLE_STATUS_HEADER,
    "x-envoy-retry-grpc-on",
    RETRY_ON_HEADER,
    "x-envoy-upstream-alt-stat-name",
    FIRST_BYTE_TIMEOUT_HEADER,
    "x-envoy-upstream-rq-timeout-alt-response",
    REQUEST_TIMEOUT_HEADER,
    "x-envoy-upstream-stream-duration-ms",
)

# -- lists that the filter forwards and the service reads

# A prefill worker gets these headers of the client besides the request id: credentials, tracing,
# and what is addressed to the engine. The list is that of sgl-router.
PREFILL_HEADERS: Final = (AUTHORIZATION_HEADER, "traceparent", "tracestate", "x-correlation-id")
PREFILL_HEADER_PREFIXES: Final = ("x-request-id-", "x-sgl-")

# What each pass reads of a request, besides the model header in the second one. By its length a
# body that does not fit is refused before Envoy buffers it.
ROUTE_PASS_HEADERS: Final = (
    METHOD_HEADER,
    PATH_HEADER,
    CONTENT_ENCODING_HEADER,
    CONTENT_LENGTH_HEADER,
    DEBUG_HEADER,
    REQUEST_ID_HEADER,
)
DECODE_PASS_HEADERS: Final = (
    DEBUG_HEADER,
    REQUEST_ID_HEADER,
    DECODE_ORDER_HEADER,
    ATTEMPT_COUNT_HEADER,
)
# What both passes read of a response.
RESPONSE_HEADERS: Final = (STATUS_HEADER, CONTENT_TYPE_HEADER, RETRY_AFTER_HEADER)
