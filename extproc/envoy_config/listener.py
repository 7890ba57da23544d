"""Renders the ingress listener, where clients connect, and the filters that ask this service."""

from typing import Any, Final

from extproc.config.schema import Config
from extproc.envoy_config.access_log import access_log
from extproc.envoy_config.decompressors import decompressors
from extproc.envoy_config.local_replies import local_replies
from extproc.envoy_config.routes import route_config
from extproc.envoy_config.stripped_headers import request_header_removals
from extproc.envoy_config.wire_form import duration, socket_address, typed
from extproc.headers import (
    ATTEMPTS_NAMESPACE,
    DECISION_NAMESPACE,
    DECODE_PASS,
    DECODE_PASS_HEADERS,
    DESTINATION_NAMESPACE,
    EXTPROC_CLUSTER,
    EXTPROC_FILTER,
    PASS_KEY,
    PREFILL_HEADER_PREFIXES,
    PREFILL_HEADERS,
    RESPONSE_HEADERS,
    ROUTE_PASS,
    ROUTE_PASS_HEADERS,
)

__all__ = [
    "BODY_HEADROOM_BYTES",
    "MAX_HEADERS",
    "MAX_HEADERS_KIBIBYTES",
    "buffer_bytes",
    "decode_filter",
    "early_removals",
    "ext_proc_filter",
    "ingress_listener",
    "router_filter",
]

_MEBIBYTE: Final = 1024 * 1024
# Envoy accepts a little more than server.max_body_bytes. So the service answers a body over the
# limit, with the number in the message, and a body that it has extended still fits: bootstrap
# rooms for a batch, or a prefill worker's handle to its cache.
BODY_HEADROOM_BYTES: Final = 1280 * 1024
# Proxies in front add headers. Beyond these limits Envoy closes an HTTP/1.1 connection.
MAX_HEADERS: Final = 1000
MAX_HEADERS_KIBIBYTES: Final = 256
# Longer than load balancers in front keep idle connections, so that they close them first.
_HTTP_10_HOST: Final = "localhost"
_CLIENT_IDLE_SECONDS: Final = 600.0
_REQUEST_HEADERS_SECONDS: Final = 30.0


def ingress_listener(config: Config) -> dict[str, Any]:
    address = socket_address(config.envoy.host, config.envoy.port)
    if config.envoy.host == "::":
        address["socket_address"]["ipv4_compat"] = True
    manager = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": _connection_manager(config),
    }
    return {
        "name": "ingress",
        "address": address,
        # How much of a body may wait for the decision and for a second attempt. A virtual host's
        # request_body_buffer_limit does not work here: Envoy ignores it while the route is a
        # direct_response, which is the route of every request before the decision.
        "per_connection_buffer_limit_bytes": buffer_bytes(config),
        "filter_chains": [{"filters": [manager]}],
    }


def buffer_bytes(config: Config) -> int:
    """How much of a body Envoy keeps, for the decision and for a second attempt."""
    return config.server.max_body_bytes + BODY_HEADROOM_BYTES


def ext_proc_filter(config: Config) -> dict[str, Any]:
    """The filter of the first pass."""
    return _asking_filter(
        config,
        which=ROUTE_PASS,
        hang_timeout=config.envoy.first_pass_hang_secs,
        message_timeout=config.envoy.message_timeout_secs + config.extra_wait_secs,
        request_body_mode="BUFFERED",
        headers=[
            *_exact(*sorted((*ROUTE_PASS_HEADERS, *RESPONSE_HEADERS)), *PREFILL_HEADERS),
            *_exact(*sorted(_queue_headers(config))),
            *({"prefix": prefix} for prefix in PREFILL_HEADER_PREFIXES),
        ],
    )


def decode_filter(config: Config) -> dict[str, Any]:
    """The filter of the second pass."""
    return _asking_filter(
        config,
        which=DECODE_PASS,
        hang_timeout=config.envoy.second_pass_hang_secs,
        message_timeout=config.envoy.message_timeout_secs,
        request_body_mode="NONE",
        headers=_exact(
            *sorted((*DECODE_PASS_HEADERS, *RESPONSE_HEADERS)), config.envoy.model_header
        ),
    )


def _queue_headers(config: Config) -> set[str]:
    """What is read of requests that may have to wait."""
    return {
        name
        for model in config.models
        if model.queue.max_requests
        for name in (model.queue.tenant_header, model.queue.priority_header)
    }


def _exact(*names: str) -> list[dict[str, str]]:
    return [{"exact": name} for name in names]


def _asking_filter(
    config: Config,
    *,
    which: str,
    hang_timeout: float,
    message_timeout: float,
    request_body_mode: str,
    headers: list[dict[str, str]],
) -> dict[str, Any]:
    """An ext_proc filter that forwards only `headers`, of requests and of responses.

    These are the headers that the service reads. Parsing all the others would take a good part
    of its time.
    """
    external_processor = typed(
        "extensions.filters.http.ext_proc.v3.ExternalProcessor",
        grpc_service=_grpc_service(which),
        # In any case: the routes decide what happens to a request without a decision.
        failure_mode_allow=True,
        status_on_error={"code": 503},
        # A service that is at work asks for more, so a hung one is noticed soon.
        message_timeout=duration(hang_timeout),
        max_message_timeout=duration(message_timeout),
        processing_mode={
            "request_header_mode": "SEND",
            "request_body_mode": request_body_mode,
            # A request may have trailers and no body: the service must get a message for it.
            "request_trailer_mode": "SEND",
            "response_header_mode": "SEND",
            "response_body_mode": "NONE",
            # Keeps the stream open to the last byte, when the load is released.
            "response_trailer_mode": "SEND",
        },
        forward_rules={"allowed_headers": {"patterns": headers}},
        response_attributes=[
            "upstream.address",
            "upstream.request_attempt_count",
            "response.code_details",
        ],
        # The service sets x-envoy-max-retries, and the time-out of responses that are not streamed.
        mutation_rules={"allow_envoy": True},
        # Envoy silently drops metadata of other namespaces.
        metadata_options={
            "forwarding_namespaces": {"untyped": [ATTEMPTS_NAMESPACE]},
            "receiving_namespaces": {"untyped": [DESTINATION_NAMESPACE, DECISION_NAMESPACE]},
        },
    )
    return {"name": EXTPROC_FILTER, "typed_config": external_processor}


def _grpc_service(which: str) -> dict[str, Any]:
    return {
        "envoy_grpc": {"cluster_name": EXTPROC_CLUSTER, "skip_envoy_headers": True},
        # A replica that is gone is replaced by another one before the request is affected.
        "retry_policy": {
            "retry_on": "connect-failure,refused-stream,reset,unavailable",
            "num_retries": 3,
            "retry_host_predicate": [
                {
                    "name": "envoy.retry_host_predicates.previous_hosts",
                    "typed_config": typed(
                        "extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
                    ),
                }
            ],
            "host_selection_retry_max_attempts": 3,
            "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
        },
        "initial_metadata": [{"key": PASS_KEY, "value": which}],
    }


def early_removals(mutations: list[dict[str, Any]]) -> dict[str, Any]:
    """The extension that makes these mutations before Envoy chooses a route."""
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": typed(
            "extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            mutations=mutations,
        ),
    }


def router_filter() -> dict[str, Any]:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": typed(
            "extensions.filters.http.router.v3.Router", suppress_envoy_headers=True
        ),
    }


def _connection_manager(config: Config) -> dict[str, Any]:
    idle = duration(config.envoy.stream_idle_timeout_secs)
    return typed(
        "extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        stat_prefix="ingress",
        codec_type="AUTO",
        use_remote_address=True,
        preserve_external_request_id=True,
        always_set_request_id_in_response=True,
        # The worker gets the path that the service has matched. Escaped slashes stay: a model's
        # name may have one, and the service answers 404 to paths it does not know.
        normalize_path=True,
        merge_slashes=True,
        path_with_escaped_slashes_action="KEEP_UNCHANGED",
        max_request_headers_kb=MAX_HEADERS_KIBIBYTES,
        common_http_protocol_options={
            "idle_timeout": duration(_CLIENT_IDLE_SECONDS),
            "max_headers_count": MAX_HEADERS,
            "headers_with_underscores_action": "ALLOW",
        },
        http_protocol_options={
            "accept_http_10": True,
            # Clients of HTTP/1.0 need not name a host.
            "default_host_for_http_10": _HTTP_10_HOST,
        },
        http2_protocol_options={
            "max_concurrent_streams": 1000,
            # Envoy buffers no more of a stream than its window, so a body has to fit in it.
            "initial_stream_window_size": buffer_bytes(config),
            "initial_connection_window_size": max(buffer_bytes(config), 16 * _MEBIBYTE),
        },
        stream_idle_timeout=idle,
        request_headers_timeout=duration(_REQUEST_HEADERS_SECONDS),
        # Until the body is complete. A response is limited only by its silence.
        request_timeout=duration(config.proxy.request_timeout_secs),
        early_header_mutation_extensions=[early_removals(request_header_removals(config))],
        http_filters=[
            *decompressors(),
            ext_proc_filter(config),
            router_filter(),
        ],
        route_config=route_config(config),
        local_reply_config=local_replies(),
        access_log=access_log(config.envoy.access_log),
    )
