"""The values of the objects by which a gateway asks the service, and the recipes they come from.

Separate from the other sections because each recipe of envoy/ becomes a file of the chart. So the
chart and the recipes cannot differ but in names.
"""

from pathlib import Path
from typing import Annotated, Any, Final, Literal

import yaml
from msgspec import Meta, field

from helm.sections import Name, Port, Section, Strings

__all__ = ["RECIPES", "GatewayObjectsValues", "render_recipe"]

_ENVOY: Final = Path(__file__).resolve().parents[1] / "envoy"
# The chart's file, and the recipe's files that it is made of.
RECIPES: Final = {
    "envoy-gateway": ("envoy-gateway/route.yaml", "envoy-gateway/policies.yaml"),
    "envoy-gateway-fail-closed": (
        "envoy-gateway/route.yaml",
        "envoy-gateway/policies.yaml",
        "envoy-gateway/route-fail-closed.yaml",
    ),
    "envoy-gateway-patch": ("envoy-gateway/patch.yaml",),
    "istio": ("istio/envoyfilter.yaml", "istio/route.yaml"),
    "istio-fail-closed": (
        "istio/envoyfilter.yaml",
        "istio/route.yaml",
        "istio/route-fail-closed.yaml",
    ),
}
# A gateway exists.
_LEFT_OUT: Final = {"Gateway"}


class GatewayReference(Section, frozen=True, kw_only=True):
    name: Annotated[str, Meta(description="Name of the Gateway.")] = ""
    namespace: Annotated[str, Meta(description="Its namespace; empty for that of the release.")] = (
        ""
    )
    listener: Annotated[
        str, Meta(description="Name of its listener, for `patch` with Envoy Gateway.")
    ] = "http"
    port: Annotated[Port, Meta(description="Port of its listener, for Istio.")] = 80
    labels: Annotated[Strings, Meta(description="Labels of its pods, for Istio.")] = field(
        default_factory=lambda: {"istio": "ingressgateway"}
    )


class WorkersReference(Section, frozen=True, kw_only=True):
    service: Annotated[
        str,
        Meta(
            description="Name of the Service of the workers; of the decode workers, if prefill "
            "workers have another one."
        ),
    ] = ""
    namespace: Annotated[
        str,
        Meta(
            description="Its namespace; empty for that of the release. Envoy Gateway needs a "
            "ReferenceGrant in another one."
        ),
    ] = ""
    port: Annotated[Port, Meta(description="Port of the Service.")] = 8000


class FilterValues(Section, frozen=True, kw_only=True):
    kind: Annotated[
        Literal["none", "envoy-gateway", "istio"],
        Meta(
            description="Makes the objects of this recipe of envoy/, for a Gateway that exists: "
            "`envoy-gateway` an HTTPRoute and policies, `istio` a VirtualService, a "
            "DestinationRule and EnvoyFilters. Only with `mode: service`."
        ),
    ] = "none"
    hostnames: Annotated[
        list[str], Meta(description="Hosts of the route; exactly one with Istio.")
    ] = field(default_factory=list)
    gateway: Annotated[GatewayReference, Meta(description="The gateway.")] = field(
        default_factory=GatewayReference
    )
    workers: Annotated[WorkersReference, Meta(description="Where requests go.")] = field(
        default_factory=WorkersReference
    )
    whole_gateway: Annotated[
        bool,
        Meta(
            description="Also makes what applies to all routes of the gateway: limits of buffers, "
            "and removal of the service's headers from clients. Without it, do the same "
            "yourself, or clients can choose workers."
        ),
    ] = True
    patch: Annotated[
        bool,
        Meta(
            description="Also makes the EnvoyPatchPolicy. Only with `envoy-gateway`, which must "
            "allow such policies."
        ),
    ] = False
    fail_open: Annotated[
        bool | None,
        Meta(
            description="Whether requests are served without the service. null: true for one "
            "model whose workers are all alike, else false."
        ),
    ] = None
    cluster_domain: Annotated[str, Meta(description="Domain of the cluster, for Istio.")] = (
        "cluster.local"
    )


class PoolValues(Section, frozen=True, kw_only=True):
    enabled: Annotated[
        bool,
        Meta(
            description="An InferencePool, of the name and namespace in "
            "`config.discovery.inference_pool`, whose endpoint picker is this service."
        ),
    ] = False
    match_labels: Annotated[Strings, Meta(description="Labels of the workers' pods.")] = field(
        default_factory=dict
    )
    target_ports: Annotated[
        Annotated[list[Port], Meta(min_length=1, max_length=8)],
        Meta(description="Ports of each pod; each is a worker of its own."),
    ] = field(default_factory=lambda: [30000])
    failure_mode: Annotated[
        Literal["FailClose", "FailOpen"],
        Meta(description="What the gateway does with requests while no pod is ready."),
    ] = "FailClose"


class RouteValues(Section, frozen=True, kw_only=True):
    enabled: Annotated[bool, Meta(description="An HTTPRoute to the InferencePool.")] = False
    parent_refs: Annotated[
        list[dict[str, Any]], Meta(description="The Gateways, as in an HTTPRoute.")
    ] = field(default_factory=list)
    hostnames: Annotated[list[Name], Meta(description="Host names; empty for all.")] = field(
        default_factory=list
    )
    paths: Annotated[
        Annotated[
            list[Annotated[str, Meta(pattern="^/")]],
            Meta(min_length=1, max_length=64),
        ],
        Meta(description="Exact paths. An engine accepts more than clients should reach."),
    ] = field(default_factory=lambda: ["/v1/chat/completions", "/v1/completions", "/v1/models"])


class GatewayObjectsValues(Section, frozen=True, kw_only=True):
    filter: Annotated[
        FilterValues, Meta(description="For a gateway that asks with an ext_proc filter.")
    ] = field(default_factory=FilterValues)
    inference_pool: Annotated[PoolValues, Meta(description="The pool.")] = field(
        default_factory=PoolValues
    )
    http_route: Annotated[RouteValues, Meta(description="The route to the pool.")] = field(
        default_factory=RouteValues
    )


def render_recipe(name: str) -> str:
    """A file of the chart: the objects of a recipe, with the recipe's names."""
    # An object of a later file replaces the one with its name.
    objects: dict[tuple[str, str], dict[str, Any]] = {}
    for path in RECIPES[name]:
        for one in yaml.safe_load_all((_ENVOY / path).read_text(encoding="utf-8")):
            if one["kind"] not in _LEFT_OUT:
                objects[one["kind"], one["metadata"]["name"]] = one
    head = f"# Generated from envoy/{', envoy/'.join(RECIPES[name])} with `make docs`.\n"
    return head + yaml.safe_dump({"objects": [*objects.values()]}, sort_keys=False, width=100)
