"""Which headers Envoy removes from requests of clients and from responses of workers.

A header that a filter or the router reads is an instruction, so a client must not be able to
send it. All of them are removed before any filter sees the request; this service's reply sets
those it uses again. Ours and Envoy's are removed by name: a prefix would hide a new header from
review. Those that steer engines are removed in every spelling that a server may take for them.
"""

from typing import Any

from extproc.config.schema import Config
from extproc.headers import (
    DEBUG_HEADER,
    DECODE_WORKER_HEADER,
    ENDPOINT_PICKER_HEADERS,
    ENVOY_CONTROL_HEADERS,
    ERROR_CODE_HEADER,
    EXTPROC_HEADERS,
)
from extproc.steering import STEERING_HEADER_PATTERN

__all__ = [
    "own_request_headers",
    "request_header_removals",
    "steering_removal",
    "stripped_request_headers",
    "stripped_response_headers",
    "stripped_worker_headers",
]


def request_header_removals(config: Config) -> list[dict[str, Any]]:
    """The removals from every request before the first filter, as header mutations."""
    return [
        *({"remove": name} for name in stripped_request_headers(config)),
        steering_removal(),
    ]


def steering_removal() -> dict[str, Any]:
    """The header mutation that removes what would steer an engine."""
    steering = {"safe_regex": {"regex": STEERING_HEADER_PATTERN}}
    return {"remove_on_match": {"key_matcher": steering}}


def stripped_request_headers(config: Config) -> list[str]:
    """Names removed from every request before the first filter, sorted.

    `x-extproc-debug` stays only where the operator has switched debug headers on.
    """
    return sorted({*own_request_headers(config), *ENVOY_CONTROL_HEADERS})


def own_request_headers(config: Config) -> list[str]:
    """Those of them that no other part of Envoy uses, sorted."""
    names = {
        *EXTPROC_HEADERS,
        DECODE_WORKER_HEADER,
        *ENDPOINT_PICKER_HEADERS,
        config.envoy.cluster_header,
        config.envoy.model_header,
    }
    if not config.observability.debug_headers:
        names.add(DEBUG_HEADER)
    return sorted(names)


def stripped_response_headers(config: Config) -> list[str]:
    """Names removed from every worker's response, sorted.

    The router removes them when the response arrives, before the filter of this service: debug
    headers that the service adds are kept.
    """
    names = {
        *EXTPROC_HEADERS,
        *ENDPOINT_PICKER_HEADERS,
        config.envoy.cluster_header,
        config.envoy.model_header,
    }
    return sorted(names)


def stripped_worker_headers() -> list[str]:
    """Names removed from a worker's response only, not from that of the second pass.

    The second pass answers some errors itself, and these have the code in a header.
    """
    return [ERROR_CODE_HEADER]
