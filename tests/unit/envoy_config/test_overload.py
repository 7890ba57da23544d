"""What Envoy does when its memory fills up or too many clients connect."""

from typing import Any

from extproc.config.envoy import EnvoyConfig
from extproc.envoy_config.overload import CUT_PRESSURE, REFUSE_PRESSURE, overload_manager

HEAP = "envoy.resource_monitors.fixed_heap"
CONNECTIONS = "envoy.resource_monitors.global_downstream_max_connections"


def monitors(rendered: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["name"]: one["typed_config"] for one in rendered["resource_monitors"]}


def triggers(rendered: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The only trigger of each action and load-shed point, by the last word of its name."""
    found = {}
    for one in (*rendered["actions"], *rendered["loadshed_points"]):
        (found[one["name"].rpartition(".")[2]],) = one["triggers"]
    return found


def test_both_limits_are_the_configured_ones() -> None:
    found = monitors(overload_manager(EnvoyConfig(max_heap_mb=100, max_connections=7)))
    assert set(found) == {HEAP, CONNECTIONS}
    assert found[HEAP]["max_heap_size_bytes"] == 100 * 1024 * 1024
    assert found[CONNECTIONS]["max_active_downstream_connections"] == 7


def test_without_a_limit_of_the_heap_only_connections_are_limited() -> None:
    rendered = overload_manager(EnvoyConfig(max_heap_mb=None))
    assert set(rendered) == {"resource_monitors"}
    assert set(monitors(rendered)) == {CONNECTIONS}


def test_requests_are_refused_before_any_is_cut_off() -> None:
    rendered = overload_manager(EnvoyConfig())
    found = triggers(rendered)
    assert {trigger["name"] for trigger in found.values()} == {HEAP}
    assert found["stop_accepting_requests"]["threshold"] == {"value": REFUSE_PRESSURE}
    assert found["http1_server_abort_dispatch"]["threshold"] == {"value": CUT_PRESSURE}
    reset = found["reset_high_memory_stream"]["scaled"]
    assert reset["scaling_threshold"] == CUT_PRESSURE
    assert REFUSE_PRESSURE < CUT_PRESSURE < reset["saturation_threshold"] < 1
    # Without it no stream is tracked, and no stream is reset.
    assert rendered["buffer_factory_config"]["minimum_account_to_track_power_of_two"] >= 20


def test_no_action_lets_clients_wait() -> None:
    # A client of a listener that does not accept waits in the kernel's queue.
    assert "stop_accepting_connections" not in triggers(overload_manager(EnvoyConfig()))
