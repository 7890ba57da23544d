"""Renders the second pass: an internal listener whose filter asks for the decode worker.

The ingress listener sends a request here once for each attempt, so every attempt gets a worker
that is picked at that moment. The first pass gives the second its facts in headers, which the
ingress listener removes from requests of clients.
"""

from typing import Any, Final

from extproc.config.schema import Config
from extproc.envoy_config.access_log import access_log
from extproc.envoy_config.clusters import no_limits
from extproc.envoy_config.listener import (
    BODY_HEADROOM_BYTES,
    MAX_HEADERS,
    MAX_HEADERS_KIBIBYTES,
    decode_filter,
    router_filter,
)
from extproc.envoy_config.local_replies import local_replies
from extproc.envoy_config.routes import unavailable
from extproc.envoy_config.stripped_headers import stripped_response_headers, stripped_worker_headers
from extproc.envoy_config.wire_form import duration, typed
from extproc.headers import (
    DECODE_CLUSTER,
    DECODE_ORDER_HEADER,
    DECODE_WORKER_HEADER,
    DESTINATION_HEADER,
    RETRY_HEADER,
)

__all__ = ["decode_pass_cluster", "decode_pass_listener", "internal_listener_extension"]

_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
# Idle connections close after this; both ends are in this Envoy.
_IDLE_SECONDS: Final = 60.0
_DELAYED_CLOSE_SECONDS: Final = 0.05


def internal_listener_extension() -> dict[str, Any]:
    return {
        "name": "envoy.bootstrap.internal_listener",
        "typed_config": typed("extensions.bootstrap.internal_listener.v3.InternalListener"),
    }


def decode_pass_cluster() -> dict[str, Any]:
    """The cluster that leads to the listener inside the same Envoy."""
    endpoint = {
        "address": {"envoy_internal_address": {"server_listener_name": DECODE_CLUSTER}},
    }
    return {
        "name": DECODE_CLUSTER,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": DECODE_CLUSTER,
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
        "circuit_breakers": no_limits(),
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: typed(
                "extensions.upstreams.http.v3.HttpProtocolOptions",
                common_http_protocol_options={
                    "idle_timeout": duration(_IDLE_SECONDS),
                    "max_headers_count": MAX_HEADERS,
                },
                explicit_http_config={"http_protocol_options": {}},
            )
        },
    }


def decode_pass_listener(config: Config) -> dict[str, Any]:
    manager = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": typed(
            "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            stat_prefix=DECODE_CLUSTER,
            codec_type="HTTP1",
            # The ingress listener has made the request id already.
            generate_request_id=False,
            preserve_external_request_id=True,
            always_set_request_id_in_response=True,
            max_request_headers_kb=MAX_HEADERS_KIBIBYTES,
            common_http_protocol_options={
                "max_headers_count": MAX_HEADERS,
                "headers_with_underscores_action": "ALLOW",
            },
            stream_idle_timeout=duration(config.envoy.stream_idle_timeout_secs),
            http_filters=[decode_filter(config), router_filter()],
            route_config=_route_config(config),
            local_reply_config=local_replies(retry_header=RETRY_HEADER),
            # The other end is in this process, so there is no slow client to wait for.
            delayed_close_timeout=duration(_DELAYED_CLOSE_SECONDS),
            access_log=access_log(config.envoy.access_log, listener=DECODE_CLUSTER),
        ),
    }
    return {
        "name": DECODE_CLUSTER,
        "internal_listener": {},
        # What the ingress listener has accepted is not refused half-way.
        "bypass_overload_manager": True,
        "per_connection_buffer_limit_bytes": config.server.max_body_bytes + BODY_HEADROOM_BYTES,
        "filter_chains": [{"filters": [manager]}],
    }


def _route_config(config: Config) -> dict[str, Any]:
    return {
        "name": DECODE_CLUSTER,
        # Only local replies of this listener may have the retry header, not an engine's response.
        "response_headers_to_remove": [*stripped_response_headers(config), DECODE_WORKER_HEADER],
        "request_headers_to_remove": [DECODE_ORDER_HEADER],
        "virtual_hosts": [
            {
                "name": DECODE_CLUSTER,
                "domains": ["*"],
                "routes": [_picked(config), unavailable()],
            }
        ],
    }


def _picked(config: Config) -> dict[str, Any]:
    envoy = config.envoy
    # With ADS the reply of this pass names the cluster.
    cluster = (
        {"cluster_header": envoy.cluster_header} if envoy.has_ads else {"cluster": envoy.cluster}
    )
    return {
        "name": "picked",
        "match": {"prefix": "/", "headers": [{"name": DESTINATION_HEADER, "present_match": True}]},
        "response_headers_to_remove": stripped_worker_headers(),
        "route": {
            **cluster,
            # The ingress route has the limits and makes the next attempt.
            "timeout": "0s",
            "idle_timeout": "0s",
        },
    }
