"""Renders the routes of requests with a decision of this service, and without one.

The filter always fails open: one that fails closed would cut every open response when the service
dies. So it is the routes that decide whether requests without a decision are served.
"""

import re
from typing import Any, Final

from extproc.config.schema import Config
from extproc.envoy_config.clusters import fail_open_name
from extproc.envoy_config.local_replies import (
    ROUTER_UNAVAILABLE,
    anthropic_format,
    envelope_format,
    error_headers,
)
from extproc.envoy_config.stripped_headers import stripped_response_headers, stripped_worker_headers
from extproc.envoy_config.wire_form import duration
from extproc.errors import ANTHROPIC_PATH
from extproc.headers import DECODE_CLUSTER, RETRY_HEADER

__all__ = [
    "FAIL_OPEN_PATHS",
    "decided_action",
    "decode_pass_action",
    "route_config",
    "unavailable",
]

# The paths that clients reach without this service. An engine also accepts cache flushes, weight
# updates and aborts on its port: those stay out of reach however long this service is away.
FAIL_OPEN_PATHS: Final = (
    "/generate",
    "/v1/chat/completions",
    "/v1/classify",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/models",
    "/v1/rerank",
    "/v1/responses",
    "/v1/score",
)

# Only a request that never reached a worker is sent again, since a generation may have begun.
_RETRY_ON: Final = "connect-failure,refused-stream,reset-before-request"


def route_config(config: Config) -> dict[str, Any]:
    routes = [_decode_pass(config), _decided(config)]
    if config.fails_open:
        routes.append(_fail_open(config))
    routes += [_messages_unavailable(), unavailable()]
    by_ads = config.envoy.has_ads and not config.knows_all_workers
    return {
        "name": "llm",
        # The cluster of the route that fails open may be one that Envoy has by ADS.
        **({"validate_clusters": False} if by_ads else {}),
        "response_headers_to_remove": stripped_response_headers(config),
        "virtual_hosts": [
            {
                "name": "llm",
                "domains": ["*"],
                "include_request_attempt_count": True,
                "routes": routes,
            }
        ],
    }


def _decode_pass(config: Config) -> dict[str, Any]:
    """The route to the second pass, with further attempts while its answers allow them."""
    return {
        "name": "decode_pass",
        "match": {
            "prefix": "/",
            "headers": [
                {"name": config.envoy.cluster_header, "string_match": {"exact": DECODE_CLUSTER}}
            ],
        },
        "route": decode_pass_action(config),
    }


def decode_pass_action(config: Config) -> dict[str, Any]:
    """What the route to the second pass does."""
    return {
        "cluster": DECODE_CLUSTER,
        "timeout": "0s",
        "idle_timeout": duration(config.decode_silence_secs),
        "retry_policy": {
            # An engine's own 5xx is not retried: its bootstrap room is used up.
            "retry_on": "retriable-headers",
            "retriable_headers": [{"name": RETRY_HEADER, "present_match": True}],
            "num_retries": 0,
            # Until the response headers.
            "per_try_timeout": duration(config.decode_silence_secs),
            "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
        },
    }


def _decided(config: Config) -> dict[str, Any]:
    header = config.envoy.cluster_header
    return {
        "name": "decided",
        "match": {"prefix": "/", "headers": [{"name": header, "present_match": True}]},
        "response_headers_to_remove": stripped_worker_headers(),
        "route": decided_action(config),
    }


def decided_action(config: Config) -> dict[str, Any]:
    """What the route to the worker does."""
    return {
        "cluster_header": config.envoy.cluster_header,
        **_limits(config),
        # The service raises the number with x-envoy-max-retries to the length of its list
        # of destinations; a single destination is not tried twice.
        "retry_policy": _retry_policy(0),
    }


def _fail_open(config: Config) -> dict[str, Any]:
    paths = "|".join(re.escape(path) for path in FAIL_OPEN_PATHS)
    retry_policy = {
        **_retry_policy(1),
        "retry_host_predicate": [
            {
                "name": "envoy.retry_host_predicates.previous_hosts",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.retry.host.previous_hosts"
                    ".v3.PreviousHostsPredicate"
                },
            }
        ],
        "host_selection_retry_max_attempts": 5,
    }
    return {
        "name": "fail_open",
        "match": {"safe_regex": {"regex": paths}},
        "response_headers_to_remove": stripped_worker_headers(),
        "route": {
            "cluster": fail_open_name(config),
            **_limits(config),
            "retry_policy": retry_policy,
        },
    }


def _messages_unavailable() -> dict[str, Any]:
    """As `unavailable`, for clients of the Anthropic API."""
    route = unavailable()
    route["name"] = "messages_unavailable"
    route["match"] = {"prefix": ANTHROPIC_PATH}
    route["direct_response"]["body_format"] = anthropic_format(ROUTER_UNAVAILABLE)
    return route


def unavailable() -> dict[str, Any]:
    """The last route, for requests without a decision."""
    return {
        "name": "unavailable",
        "match": {"prefix": "/"},
        "direct_response": {
            "status": ROUTER_UNAVAILABLE.status,
            "body_format": envelope_format(ROUTER_UNAVAILABLE),
        },
        "response_headers_to_add": error_headers(ROUTER_UNAVAILABLE),
    }


def _limits(config: Config) -> dict[str, Any]:
    """The length of a response is not limited, only the silence in it."""
    return {
        "timeout": "0s",
        "idle_timeout": duration(config.envoy.stream_idle_timeout_secs),
    }


def _retry_policy(num_retries: int) -> dict[str, Any]:
    return {
        "retry_on": _RETRY_ON,
        "num_retries": num_retries,
        # The next attempt goes to another worker, so waiting gains nothing.
        "retry_back_off": {"base_interval": "0.005s", "max_interval": "0.05s"},
    }
