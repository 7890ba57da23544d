"""Renders the overload manager: what Envoy refuses or cuts off when its memory fills up.

Bodies wait in Envoy for the decision, so clients decide how much memory it needs. New requests
are refused first, while Envoy can still answer them. Requests that still send their body are cut
off later. Responses that have begun are not touched.
"""

from typing import Any, Final

from extproc.config.envoy import EnvoyConfig
from extproc.config.section import MEBIBYTE
from extproc.envoy_config.wire_form import duration, typed

__all__ = ["CUT_PRESSURE", "REFUSE_PRESSURE", "overload_manager"]

# Shares of envoy.max_heap_mb. The heap grows beyond them: a complete body is copied twice on its
# way to the service, and a connection is read until it is empty before the limit is looked at.
REFUSE_PRESSURE: Final = 0.75
# Between the two, requests that were accepted may send the rest of their bodies.
CUT_PRESSURE: Final = 0.85
_ALL_RESET_PRESSURE: Final = 0.95
# A hundred clients fill the default heap in a second.
_REFRESH_SECONDS: Final = 0.1
# Smaller streams are not worth a reset: 1 MiB.
_TRACKED_POWER_OF_TWO: Final = 20

_HEAP: Final = "envoy.resource_monitors.fixed_heap"
_CONNECTIONS: Final = "envoy.resource_monitors.global_downstream_max_connections"
_MONITORS: Final = "extensions.resource_monitors"


def overload_manager(envoy: EnvoyConfig) -> dict[str, Any]:
    """The bootstrap's `overload_manager`; without `envoy.max_heap_mb`, for connections only."""
    connections = {
        "name": _CONNECTIONS,
        "typed_config": typed(
            f"{_MONITORS}.downstream_connections.v3.DownstreamConnectionsConfig",
            max_active_downstream_connections=envoy.max_connections,
        ),
    }
    if envoy.max_heap_mb is None:
        return {"resource_monitors": [connections]}
    heap = {
        "name": _HEAP,
        "typed_config": typed(
            f"{_MONITORS}.fixed_heap.v3.FixedHeapConfig",
            max_heap_size_bytes=envoy.max_heap_mb * MEBIBYTE,
        ),
    }
    return {
        "refresh_interval": duration(_REFRESH_SECONDS),
        "resource_monitors": [heap, connections],
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": _TRACKED_POWER_OF_TWO},
        "actions": [
            # Answered with a 503 at the headers. `stop_accepting_connections` would leave clients
            # waiting in the kernel's queue.
            {
                "name": "envoy.overload_actions.stop_accepting_requests",
                "triggers": [_above(REFUSE_PRESSURE)],
            },
            # Over HTTP/2: those with the largest buffers first, at most 50 at a time. Bodies of
            # HTTP/1 are not in these accounts, so such requests are never reset, which Envoy would
            # do without closing their connection.
            {
                "name": "envoy.overload_actions.reset_high_memory_stream",
                "triggers": [
                    {
                        "name": _HEAP,
                        "scaled": {
                            "scaling_threshold": CUT_PRESSURE,
                            "saturation_threshold": _ALL_RESET_PRESSURE,
                        },
                    }
                ],
            },
        ],
        "loadshed_points": [
            # Over HTTP/1: each connection on which something arrives is closed.
            {
                "name": "envoy.load_shed_points.http1_server_abort_dispatch",
                "triggers": [_above(CUT_PRESSURE)],
            }
        ],
    }


def _above(pressure: float) -> dict[str, Any]:
    return {"name": _HEAP, "threshold": {"value": pressure}}
