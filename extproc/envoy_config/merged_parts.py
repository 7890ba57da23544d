"""Renders what an existing Envoy configuration needs for this service, part by part.

All filters are off unless a route switches them on, so requests of other routes do not reach this
service. Their names begin with `llm-extproc`, so that they do not clash with filters of the same
kind. Two settings are of a whole listener, because Envoy has no narrower place for them: the
removal of this service's own header names before a route is chosen, and the windows of HTTP/2.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any, Final

from extproc.config.schema import Config
from extproc.envoy_config.decompressors import decompressors
from extproc.envoy_config.listener import buffer_bytes, early_removals, ext_proc_filter
from extproc.envoy_config.local_replies import local_replies
from extproc.envoy_config.plain_data import list_in, mapping_in
from extproc.envoy_config.routes import (
    FAIL_OPEN_PATHS,
    decided_action,
    decode_pass_action,
)
from extproc.envoy_config.stripped_headers import (
    own_request_headers,
    steering_removal,
    stripped_response_headers,
    stripped_worker_headers,
)
from extproc.envoy_config.wire_form import typed
from extproc.headers import DECODE_CLUSTER, ENVOY_CONTROL_HEADERS, PATH_HEADER

__all__ = [
    "REWRITES",
    "early_mutation",
    "has_decode_pass",
    "off_filters",
    "replies_of_routes",
    "split_route",
    "widen_windows",
]

_PREFIX: Final = "llm-extproc"
_FILTER_CONFIG: Final = "config.route.v3.FilterConfig"

# This service sees the path of the client, and a path that the router rewrites would not be one
# that it knows.
REWRITES: Final = ("prefix_rewrite", "regex_rewrite", "path_rewrite", "path_rewrite_policy")

# What the action of an existing route says about its cluster, its attempts and its length. For
# requests with a decision, that is said by this service.
_REPLACED: Final = frozenset(
    {
        "cluster",
        "cluster_header",
        "cluster_not_found_response_code",
        "cluster_specifier_plugin",
        "hedge_policy",
        "idle_timeout",
        "inline_cluster_specifier_plugin",
        "max_grpc_timeout",
        "max_stream_duration",
        "metadata_match",
        "retry_policy",
        "retry_policy_typed_config",
        "timeout",
        "weighted_clusters",
    }
)


def has_decode_pass(config: Config) -> bool:
    """True if a request may go through the second pass: roles are learnt at run time."""
    return config.pd.decode == "two_pass"


def off_filters(config: Config) -> list[dict[str, Any]]:
    """The filters in their order. They go directly before the router, after all others."""
    removal = {
        "name": f"{_PREFIX}.strip",
        "typed_config": typed(
            "extensions.filters.http.header_mutation.v3.HeaderMutation",
            mutations={
                "request_mutations": [
                    *({"remove": name} for name in ENVOY_CONTROL_HEADERS),
                    steering_removal(),
                ]
            },
        ),
    }
    asking = {**ext_proc_filter(config), "name": _PREFIX}
    renamed = [
        {**one, "name": one["name"].replace("envoy.filters.http", _PREFIX)}
        for one in decompressors()
    ]
    return [{**one, "disabled": True} for one in (removal, *renamed, asking)]


def _switched_on(config: Config) -> dict[str, Any]:
    return {one["name"]: typed(_FILTER_CONFIG, config={}) for one in off_filters(config)}


def early_mutation(config: Config) -> dict[str, Any]:
    """Removes the names that only this service uses, before Envoy chooses a route.

    Otherwise a client could choose the route of requests with a decision.
    """
    return early_removals([{"remove": name} for name in own_request_headers(config)])


def widen_windows(config: Config, manager: dict[str, Any]) -> None:
    """Let a body of full size fit into the windows of HTTP/2, where they are smaller."""
    options = mapping_in(manager, "http2_protocol_options")
    for name in ("initial_stream_window_size", "initial_connection_window_size"):
        options[name] = _at_least(options.get(name), buffer_bytes(config))


def _at_least(given: object, size: int) -> int:
    return max(given, size) if isinstance(given, int) else size


def replies_of_routes(config: Config, names: Sequence[str]) -> list[dict[str, Any]]:
    """The mappers for Envoy's own errors, for the routes that `split_route` makes of these."""
    made = [name for route in names for name in _names(config, route)]
    mappers: list[dict[str, Any]] = local_replies(routes=made)["mappers"]
    return mappers


def _names(config: Config, route: str) -> list[str]:
    names = [f"{route}-decode-pass"] if has_decode_pass(config) else []
    return [*names, f"{route}-fail-open", route] if config.fails_open else [*names, route]


def split_route(config: Config, route: dict[str, Any]) -> list[dict[str, Any]]:
    """The routes in place of `route`, which leads to the workers.

    All match what the route has matched and keep its other settings, such as those of
    authentication. The last one has the name of the route. Without a decision it has no cluster,
    so Envoy answers 503.
    """
    header = config.envoy.cluster_header
    found = []
    if has_decode_pass(config):
        decoding = _with(config, route, decode_pass_action(config), stripped_response_headers)
        to_pass = {"name": header, "string_match": {"exact": DECODE_CLUSTER}}
        found.append(_matching(decoding, f"{route['name']}-decode-pass", to_pass))
    if config.fails_open:
        paths = "|".join(re.escape(path) for path in FAIL_OPEN_PATHS)
        found.append(
            _matching(
                _with(config, route, None, _of_workers),
                f"{route['name']}-fail-open",
                {"name": header, "present_match": True, "invert_match": True},
                {
                    "name": PATH_HEADER,
                    "string_match": {"safe_regex": {"regex": rf"(?:{paths})(?:\?.*)?"}},
                },
            )
        )
    return [*found, _with(config, route, decided_action(config), _of_workers)]


def _of_workers(config: Config) -> list[str]:
    return [*stripped_response_headers(config), *stripped_worker_headers()]


def _with(
    config: Config, route: dict[str, Any], action: dict[str, Any] | None, stripped: Any
) -> dict[str, Any]:
    """A copy of the route that asks this service, with `action` where one is given."""
    made = copy.deepcopy(route)
    if action is not None:
        kept = {name: value for name, value in made["route"].items() if name not in _REPLACED}
        made["route"] = {**kept, **action}
    given = made.get("request_body_buffer_limit")
    made["request_body_buffer_limit"] = _at_least(given, buffer_bytes(config))
    made.pop("per_request_buffer_limit_bytes", None)
    removed = list_in(made, "response_headers_to_remove")
    removed += [name for name in stripped(config) if name not in removed]
    mapping_in(made, "typed_per_filter_config").update(_switched_on(config))
    return made


def _matching(route: dict[str, Any], name: str, *headers: dict[str, Any]) -> dict[str, Any]:
    match = {**route["match"]}
    match["headers"] = [*list_in(match, "headers"), *headers]
    return {**route, "name": name, "match": match}
