"""Adds this service to an Envoy configuration that exists already, on the routes that are named.

The existing file stays the source: the merged one is made from it again after each change of
either. What cannot be merged without guessing is refused, with the place that has to change.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from extproc.config.loading import read_yaml_file
from extproc.config.schema import Config
from extproc.envoy_config.bootstrap import (
    NODE,
    as_yaml,
    dynamic_resources,
    rendering_problems,
)
from extproc.envoy_config.clusters import service_clusters, worker_cluster
from extproc.envoy_config.decode_pass import (
    decode_pass_cluster,
    decode_pass_listener,
    internal_listener_extension,
)
from extproc.envoy_config.merged_parts import (
    REWRITES,
    early_mutation,
    has_decode_pass,
    off_filters,
    replies_of_routes,
    split_route,
    widen_windows,
)
from extproc.envoy_config.plain_data import dicts_in, list_in, mapping_in, own_copy
from extproc.errors import ConfigError

__all__ = ["merge_bootstrap", "merge_yaml"]

_FILE_MAX_BYTES: Final = 16 * 1024 * 1024
_MANAGER_TYPE: Final = ".HttpConnectionManager"
_ROUTER_TYPE: Final = ".filters.http.router.v3.Router"

_HEADER: Final = """\
# Merged by `extproc envoy-config --merge-into`; change what it is made of, and merge again.
# Needs Envoy 1.38 or later.
"""


class _Place(NamedTuple):
    """A route of an existing configuration, and what it is in."""

    manager: dict[str, Any]
    host: dict[str, Any]
    route: dict[str, Any]


def merge_yaml(config: Config, path: Path, routes: Sequence[str]) -> str:
    """Return the merged configuration as the text of a YAML file.

    `path` is the existing configuration in YAML or JSON. Its comments are lost. Raises ConfigError
    with all problems.
    """
    try:
        existing, problems = read_yaml_file(path, _FILE_MAX_BYTES)
        problems = [f"{path}: {problem}" for problem in problems]
    except ConfigError as error:
        problems = error.problems
    if problems:
        raise ConfigError([f"--merge-into: {problem}" for problem in problems])
    return _HEADER + as_yaml(merge_bootstrap(config, existing, routes))


def merge_bootstrap(config: Config, existing: object, routes: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `existing` with the parts of this service, for the routes of these names.

    Raises ConfigError with everything that prevents it.
    """
    merged = own_copy(existing)
    problems = list(rendering_problems(config))
    if not isinstance(merged, dict) or not isinstance(merged.get("static_resources"), dict):
        problems.append(
            "--merge-into: the file has no static_resources; keys must be written in snake_case"
        )
        raise ConfigError(problems)
    found = {name: _places(merged, name) for name in dict.fromkeys(routes)}
    for name, places in found.items():
        problems += _route_problems(merged, name, places)
    managers = _unique(place.manager for places in found.values() for place in places)
    for manager in managers:
        problems += _manager_problems(config, manager)
    problems += _name_problems(config, merged)
    if problems:
        raise ConfigError(problems)
    for manager in managers:
        _add_to_manager(config, manager, [name for name in found if _has(manager, found[name])])
    for place in (one for places in found.values() for one in places):
        at = place.host["routes"].index(place.route)
        place.host["routes"][at : at + 1] = split_route(config, place.route)
        if has_decode_pass(config):
            place.host["include_request_attempt_count"] = True
    _add_resources(config, merged)
    return merged


def _managers(bootstrap: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The HTTP connection managers of all listeners."""
    for listener in dicts_in(bootstrap["static_resources"], "listeners"):
        chains = [*dicts_in(listener, "filter_chains"), listener.get("default_filter_chain")]
        for chain in chains:
            for one in dicts_in(chain, "filters"):
                typed_config = one.get("typed_config")
                if isinstance(typed_config, dict) and _is_type(typed_config, _MANAGER_TYPE):
                    yield typed_config


def _is_type(typed_config: object, suffix: str) -> bool:
    return isinstance(typed_config, dict) and str(typed_config.get("@type")).endswith(suffix)


def _routes(bootstrap: dict[str, Any]) -> Iterator[_Place]:
    for manager in _managers(bootstrap):
        for host in dicts_in(manager.get("route_config"), "virtual_hosts"):
            for route in dicts_in(host, "routes"):
                yield _Place(manager, host, route)


def _places(bootstrap: dict[str, Any], name: str) -> list[_Place]:
    return [place for place in _routes(bootstrap) if place.route.get("name") == name]


def _unique(managers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({id(manager): manager for manager in managers}.values())


def _has(manager: dict[str, Any], places: list[_Place]) -> bool:
    return any(place.manager is manager for place in places)


def _route_problems(bootstrap: dict[str, Any], name: str, places: list[_Place]) -> Iterator[str]:
    if not places:
        known = [str(place.route["name"]) for place in _routes(bootstrap) if "name" in place.route]
        among = f"; those with a name are {', '.join(known)}" if known else ""
        yield (
            f"--route {name}: no route has this name{among}. Give the route that leads to the "
            "workers a `name`, in a route_config of a listener: routes from RDS cannot be merged"
        )
    if len(places) > len(_unique(place.manager for place in places)):
        yield f"--route {name}: several routes of one listener have this name, give each its own"
    for place in places:
        action = place.route.get("route")
        if not isinstance(action, dict) or not isinstance(place.route.get("match"), dict):
            yield f"--route {name}: the route needs a `match`, and a `route` to a cluster"
            return
        for rewrite in REWRITES:
            if rewrite in action:
                yield (
                    f"--route {name}: `{rewrite}` is not supported, since this service routes by "
                    "the path of the client; let clients use the engines' paths"
                )


def _manager_problems(config: Config, manager: dict[str, Any]) -> Iterator[str]:
    filters = dicts_in(manager, "http_filters")
    prefix = manager.get("stat_prefix")
    if not filters or not _is_type(filters[-1].get("typed_config"), _ROUTER_TYPE):
        yield (
            f"--merge-into: the last of the http_filters of the listener with stat_prefix {prefix} "
            "is not envoy.filters.http.router; the filters of this service go directly before it"
        )
    ours = {one["name"] for one in off_filters(config)}
    for name in sorted(ours & {str(one.get("name")) for one in filters}):
        yield (
            f"--merge-into: the http_filters of the listener with stat_prefix {prefix} have "
            f"{name} already; merge into the file without the parts of this service"
        )


def _name_problems(config: Config, bootstrap: dict[str, Any]) -> Iterator[str]:
    resources = bootstrap["static_resources"]
    clusters = {str(one.get("name")) for one in dicts_in(resources, "clusters")}
    listeners = {str(one.get("name")) for one in dicts_in(resources, "listeners")}
    new_listeners = [str(one["name"]) for one in _new_listeners(config)]
    if config.envoy.cluster in clusters:
        yield (
            "envoy.cluster: the file to merge into has a cluster of the name "
            f"{config.envoy.cluster!r} already; give the one of the workers another name"
        )
    for kind, taken, names in (
        ("cluster", clusters, [str(one["name"]) for one in _new_clusters(config)]),
        ("listener", listeners, new_listeners),
    ):
        for name in names:
            if name in taken and not (kind == "cluster" and name == config.envoy.cluster):
                yield (
                    f"--merge-into: the file has a {kind} {name!r} already, which is a name of "
                    "this service; rename it"
                )
    dynamic = bootstrap.get("dynamic_resources")
    if config.envoy.has_ads and isinstance(dynamic, dict):
        for key in dynamic.keys() & dynamic_resources().keys():
            yield (
                f"envoy.endpoints: the file to merge into has {key} already, and Envoy has one "
                "only; use envoy.endpoints_file"
            )


def _new_clusters(config: Config) -> list[dict[str, Any]]:
    passes = [decode_pass_cluster()] if has_decode_pass(config) else []
    workers = [] if config.envoy.has_ads else [worker_cluster(config)]
    return [*workers, *passes, *service_clusters(config)]


def _new_listeners(config: Config) -> list[dict[str, Any]]:
    return [decode_pass_listener(config)] if has_decode_pass(config) else []


def _add_to_manager(config: Config, manager: dict[str, Any], names: list[str]) -> None:
    list_in(manager, "early_header_mutation_extensions").append(early_mutation(config))
    widen_windows(config, manager)
    manager["http_filters"][-1:-1] = off_filters(config)
    replies = mapping_in(manager, "local_reply_config")
    # The first mapper that matches is used, and ours match the requests of these routes alone.
    list_in(replies, "mappers")[:0] = replies_of_routes(config, names)


def _add_resources(config: Config, bootstrap: dict[str, Any]) -> None:
    resources = bootstrap["static_resources"]
    list_in(resources, "clusters").extend(_new_clusters(config))
    list_in(resources, "listeners").extend(_new_listeners(config))
    if has_decode_pass(config):
        extension = internal_listener_extension()
        known = [one.get("name") for one in dicts_in(bootstrap, "bootstrap_extensions")]
        if extension["name"] not in known:
            list_in(bootstrap, "bootstrap_extensions").append(extension)
    if config.envoy.endpoints_change:
        # Envoy needs both names to read endpoints, from a file as well.
        bootstrap["node"] = {"id": NODE, "cluster": NODE, **mapping_in(bootstrap, "node")}
    if config.envoy.has_ads:
        mapping_in(bootstrap, "dynamic_resources").update(dynamic_resources())
