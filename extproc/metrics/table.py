"""Every metric of the service: name, help text, labels and buckets, in one table.

Separate from the code that counts because three readers share it: `metrics.service`, the
collectors of `admin`, and docs/generate.py, which writes the tables of docs/metrics.md from it.
"""

from typing import Final

from extproc.metrics import discovery_table, kv_table
from extproc.metrics.specs import Label, Section

__all__ = ["TABLE"]

# Seconds. Decisions take microseconds to milliseconds.
_DECISION_BOUNDS: Final = (
    0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0,
)  # fmt: skip
# Seconds; from 0.1 on the buckets of SGLang's own time to first token.
_TTFT_BOUNDS: Final = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100,
    200, 400,
)  # fmt: skip
# Seconds from a failure to the moment the error reply is written.
_FAIL_FAST_BOUNDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_BODY_BOUNDS: Final = (1e3, 4e3, 16e3, 64e3, 256e3, 1e6, 4e6, 16e6, 64e6)

_ROLE: Final = Label("role", {"plain": "", "prefill": "", "decode": ""})

_requests = Section("Requests and workers")

BUILD_INFO = _requests.gauge(
    "extproc_build_info", "Version of the service, as a label. The value is always 1.", "version"
)
REQUESTS = _requests.counter(
    "extproc_requests_total",
    "Requests by API path and by what this service did with them. A request whose prefill fails "
    "after it was routed counts under both codes.",
    Label("path", {"unmatched": "any path that is not served"}),
    Label(
        "code",
        {
            "routed": "",
            "answered": "this service answered itself",
        },
        "Or an error code, see [errors.md](errors.md).",
    ),
)
DECISIONS = _requests.counter(
    "extproc_decisions_total",
    "Routing decisions by model, policy and reason.",
    "model",
    "policy",
    Label("reason", note="Reasons are listed in [policies.md](policies.md)."),
)
DECISION_SECONDS = _requests.histogram(
    "extproc_decision_seconds",
    "Time from a complete request body to the routing decision.",
    bounds=_DECISION_BOUNDS,
)
REQUEST_BODY_BYTES = _requests.histogram(
    "extproc_request_body_bytes", "Size of request bodies.", bounds=_BODY_BOUNDS
)
RESPONSE_HEADERS_SECONDS = _requests.histogram(
    "extproc_response_headers_seconds",
    "Time from the routing decision to the response headers. SGLang sends the headers of a "
    "stream with its first token.",
    "model",
    bounds=_TTFT_BOUNDS,
)
WORKER_REQUESTS = _requests.counter(
    "extproc_worker_requests_total",
    "Requests by worker, role and outcome. The outcome is known at the response headers: later "
    "failures are not counted.",
    "worker",
    "model",
    _ROLE,
    Label(
        "outcome",
        {
            "success": "",
            "error": "5xx, refused, broken off or timed out before the response headers",
            "busy": "the worker answered 503 or 429, so it is avoided for a moment",
            "silent": "a patient client left; the worker had answered no request, and others had",
            "cancelled": "the client left first, or the other worker of a pair failed",
        },
    ),
)
DESTINATION_MISSED = _requests.counter(
    "extproc_destination_missed_total",
    "Requests that the gateway sent elsewhere without a try of the chosen worker. Should stay 0.",
    "model",
    Label(
        "reason",
        {
            "other_worker": "the worker that served is another one",
            "unknown_address": "no worker has the address that served",
            "lag": "the chosen worker has been known for less than 5 s",
            "further_attempt": "an attempt after the first one left the list",
        },
    ),
)
GATEWAY_IGNORES = _requests.gauge(
    "extproc_gateway_ignores_destinations",
    "1 while most requests of a model are served elsewhere than decided, else 0.",
    "model",
)
LAST_RESORT = _requests.counter(
    "extproc_last_resort_total",
    "Requests sent to a worker that is to be avoided, since all of its pool are.",
    "worker",
    _ROLE,
)
FALLBACK_SERVED = _requests.counter(
    "extproc_fallback_served_total",
    "Requests that a later entry of the destination list served.",
    "model",
)
STALE_REQUESTS = _requests.counter(
    "extproc_stale_requests_total",
    "Requests that were ended because they exceeded active_load.stale_request_timeout_secs.",
)
REQUESTS_IN_FLIGHT = _requests.gauge(
    "extproc_requests_open",
    "Requests until the end of their responses; see server.max_requests.",
)
BUFFERED_BYTES = _requests.gauge(
    "extproc_buffered_bytes",
    "Bytes of request bodies that wait for a decision; see server.max_buffered_bytes.",
)
OVERLOAD_REFUSALS = _requests.counter(
    "extproc_overload_refusals_total",
    "Requests that were refused because this service had reached a limit.",
    Label(
        "limit",
        {"max_requests": "server.max_requests", "max_buffered_bytes": "server.max_buffered_bytes"},
    ),
)
STREAMS_OPEN = _requests.gauge("extproc_streams_open", "Open ext_proc streams.")
STREAMS = _requests.counter(
    "extproc_streams_total",
    "Ended ext_proc streams by outcome.",
    Label("outcome", {"ok": "", "cancelled": "Envoy ends most streams so", "error": ""}),
)
INTROSPECTIONS = _requests.counter(
    "extproc_introspections_total",
    "Worker introspections by outcome.",
    Label("outcome", {"answered": "", "failed": ""}),
)
GENERATING_CHECKS = _requests.counter(
    "extproc_generating_checks_total",
    "Checks whether an engine generates tokens, by outcome; see discovery.generating_check_secs.",
    Label("outcome", {"passed": "", "failed": ""}),
)
LOAD_POLLS = _requests.counter(
    "extproc_load_polls_total",
    "Questions to vLLM workers for their load, by outcome.",
    Label(
        "outcome",
        {
            "answered": "",
            "failed": "no answer within a second",
            "without_figures": "the page has no numbers of requests; asked less often",
        },
    ),
)
ADAPTERS = _requests.gauge(
    "extproc_adapters",
    "Different LoRA adapters that workers have loaded, by the configured model they belong to.",
    "model",
)
ADAPTER_REQUESTS = _requests.counter(
    "extproc_adapter_requests_total",
    "Requests that name a LoRA adapter which workers list, by the model it belongs to.",
    "model",
)
ADAPTER_POLLS = _requests.counter(
    "extproc_adapter_polls_total",
    "Questions to workers for the adapters they have loaded, by outcome.",
    Label("outcome", {"answered": "", "failed": "no list of models within two seconds"}),
)
WORKERS_REFUSED = _requests.counter(
    "extproc_workers_refused_total",
    "Workers that were refused because plain workers cannot be mixed with prefill and decode "
    "workers in one model.",
)
EVENT_LOOP_LAG_SECONDS = _requests.gauge(
    "extproc_event_loop_lag_seconds", "Delay of the last periodic wake-up of the event loop."
)
ASYNCIO_TASKS = _requests.gauge("extproc_asyncio_tasks_open", "Open asyncio tasks.")
RELOADS = _requests.counter(
    "extproc_reloads_total",
    "Attempts to apply a changed configuration, by outcome.",
    Label(
        "outcome",
        {
            "applied": "",
            "unchanged": "the files say what is in use",
            "refused": "the configuration in use stays; `/config` of the admin server has the "
            "problems",
        },
    ),
)
CONFIG_CURRENT = _requests.gauge(
    "extproc_config_current",
    "Whether the configuration file is in use as it is now: 0 if its last change was refused.",
)
ENVOY_CONFIG_OUTDATED = _requests.gauge(
    "extproc_envoy_config_outdated",
    "Whether extproc envoy-config renders another file now than when this service started.",
)
WORKERS = _requests.gauge(
    "extproc_workers",
    "Registered workers by model and role. The model is empty until a worker has reported one.",
    "model",
    _ROLE,
)
WORKERS_UNKNOWN_TO_GATEWAY = _requests.gauge(
    "extproc_workers_unknown_to_gateway",
    "Workers with an address that get no requests because Envoy does not know them yet.",
)
WORKERS_DRAINING = _requests.gauge(
    "extproc_workers_draining",
    "Workers that get no new requests because discovery says that they are about to leave.",
)
RUNTIME_WORKERS = _requests.gauge(
    "extproc_runtime_workers",
    "Workers in use that were added over the admin port of this replica.",
)
WORKERS_STALE = _requests.gauge(
    "extproc_workers_stale",
    "Workers in use that discovery does not confirm now: it names them no longer, or it cannot be "
    "asked.",
)
WORKERS_VANISHED = _requests.counter(
    "extproc_vanished_workers_total",
    "Workers that discovery named no longer without a sign that they leave, by how that ended.",
    Label(
        "outcome",
        {
            "found": "named again, and never out of use",
            "silent": "removed, since it did not answer its introspection",
            "expired": "removed after discovery.mass_removal_hold_secs",
            "left": "removed: a sign came later, or another worker has its address",
        },
    ),
)
XDS_STREAMS = _requests.gauge(
    "extproc_xds_streams_open",
    "Envoys that receive the workers' endpoints from this replica over ADS.",
)
XDS_REJECTIONS = _requests.counter(
    "extproc_xds_rejections_total",
    "Updates of the workers' endpoints that an Envoy has rejected. Should stay 0.",
)
XDS_STREAMS_REFUSED = _requests.counter(
    "extproc_xds_streams_refused_total",
    "ADS streams that were ended because they went over a limit. Should stay 0.",
)
WORKER_IN_FLIGHT = _requests.gauge(
    "extproc_worker_in_flight", "Requests in flight by worker.", "worker"
)
WORKER_BREAKER_STATE = _requests.gauge(
    "extproc_worker_breaker_state",
    "Circuit breaker by worker: 0 closed, 1 open, 2 half-open, 3 avoided for a moment.",
    "worker",
)
TICKETS_OPEN = _requests.gauge(
    "extproc_tickets_open", "Open load tickets. Each request holds one on each of its workers."
)

_queue = Section("Requests that wait while all workers are full", "See `models[].queue`.")

QUEUE_WAITING = _queue.gauge("extproc_queue_requests_open", "Requests that wait now.", "model")
QUEUE_OUTCOMES = _queue.counter(
    "extproc_queue_outcomes_total",
    "Requests that found all workers full, by how their wait ended.",
    "model",
    Label("priority", note="The classes are those of models[].queue.priority_classes."),
    Label(
        "outcome",
        {
            "served": "a worker had capacity",
            "refused": "the queue was full",
            "displaced": "the queue was full, and another request was entitled to its place",
            "timed_out": "models[].queue.max_wait_secs",
            "left": "the client left",
        },
    ),
)
QUEUE_SECONDS = _queue.histogram(
    "extproc_queue_seconds", "Waits that ended with a worker.", "model", bounds=_TTFT_BOUNDS
)

_pools = Section(
    "How busy the pools of workers are",
    "A pool is all workers of one model and role. These are signals for autoscalers; see "
    "[scaling.md](scaling.md).",
)

POOL_EXPECTED_WAIT_SECONDS = _pools.gauge(
    "extproc_pool_expected_wait_seconds",
    "How long a new request would wait before a worker of the pool begins with it, at most 300. "
    "It is 300 as well if the pool has no usable worker and a client has asked for the model in "
    "the last 2 minutes.",
    "model",
    _ROLE,
)
POOL_OCCUPANCY_RATIO = _pools.gauge(
    "extproc_pool_occupancy_ratio",
    "How full the pool is, from 0 to 1: KV cache or running requests, whichever is fuller, as the "
    "engines report it. Without series if they do not.",
    "model",
    _ROLE,
)

_pd = Section("Prefill and decode apart", "")


PD_PAIRS = _pd.counter(
    "extproc_pd_pairs_total",
    "Requests that had a prefill and a decode worker, by outcome.",
    "model",
    Label(
        "outcome",
        {
            "ok": "the decode worker has begun a good response; a later failure is not counted",
            "prefill_failed": "",
            "prefill_refused": "the engine answered 4xx",
            "decode_failed": "",
            "cancelled": "the client left",
            "abandoned": "a worker changed its role, or this service stopped",
        },
    ),
)
PD_PREFILL_SECONDS = _pd.histogram(
    "extproc_pd_prefill_seconds",
    "Time from the routing decision to a successful answer of the prefill worker.",
    "model",
    bounds=_TTFT_BOUNDS,
)
PD_PREFILL_FAILURES = _pd.counter(
    "extproc_pd_prefill_failures_total",
    "Failed requests to prefill workers by reason.",
    "model",
    Label(
        "reason",
        {
            "connect": "another prefill worker was tried",
            "status_4xx": "",
            "status_5xx": "or any other status that is neither 2xx nor 4xx",
            "broken": "the connection broke",
            "timeout": "",
            "silent": "the decode worker stopped waiting first",
            "no_kv": "the answer held no handle of the KV cache",
        },
    ),
)
PD_FAIL_FAST_SECONDS = _pd.histogram(
    "extproc_pd_fail_fast_seconds",
    "Time from the failure of a prefill to the error reply to the client.",
    bounds=_FAIL_FAST_BOUNDS,
)
PD_DECODE_CHOICES = _pd.counter(
    "extproc_pd_decode_choices_total",
    "Chosen decode workers by reason.",
    "model",
    Label(
        "reason",
        {
            "same_host": "",
            "peer_busy": "the prefill worker's host has a decode worker, but it is too busy",
            "no_peer": "the prefill worker's host has no decode worker",
        },
    ),
)
PD_DECODE_RETRIES = _pd.counter(
    "extproc_pd_decode_retries_total",
    "Further attempts after a decode worker could not be reached.",
    "model",
)
PD_DECODE_ALONE = _pd.counter(
    "extproc_pd_decode_alone_total",
    "Requests that a decode worker served without a prefill worker: it lacked little of the "
    "prompt, or vLLM cannot hand over the cache of a batch or of several answers to one prompt.",
    "model",
)
WORKER_ROLE_CHANGES = _pd.counter(
    "extproc_worker_role_changes_total",
    "Role changes of registered workers.",
    Label("from", _ROLE.values),
    Label("to", _ROLE.values),
)

TABLE: Final = (_requests, _queue, _pools, discovery_table.SECTION, _pd, *kv_table.SECTIONS)
