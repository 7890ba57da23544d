"""Renders the clusters: the workers, and this service."""

from collections.abc import Sequence
from typing import Any, Final

from msgspec import UnsetType

from extproc.config.schema import Config, DnsLookupFamily
from extproc.config.worker_urls import parse_nameserver
from extproc.envoy_config.attempts import attempt_filters, retry_limits
from extproc.envoy_config.wire_form import (
    UNLIMITED,
    duration,
    host_is_ip,
    socket_address,
    typed,
)
from extproc.headers import (
    ADS_CLUSTER,
    DESTINATION_HEADER,
    DESTINATION_NAMESPACE,
    EXTPROC_CLUSTER,
)
from extproc.worker_url import WorkerUrl, parse_worker_url

__all__ = [
    "ads_source",
    "fail_open_name",
    "lb_endpoint",
    "no_limits",
    "pool_cluster",
    "service_clusters",
    "tls_contexts",
    "worker_cluster",
    "worker_clusters",
    "worker_urls",
]

_SYSTEM_CA_FILE: Final = "/etc/ssl/certs/ca-certificates.crt"
_MEBIBYTE: Final = 1024 * 1024
_EXTPROC_DNS_REFRESH_SECONDS: Final = 5.0
# Envoy's names. With AUTO it asks for IPv4 only where there is no IPv6 address.
_DNS_FAMILIES: Final[dict[DnsLookupFamily, str]] = {
    "v4_preferred": "V4_PREFERRED",
    "v6_preferred": "AUTO",
    "v4_only": "V4_ONLY",
    "v6_only": "V6_ONLY",
}
_FAIL_OPEN_SUFFIX: Final = "-fail-open"
_FAIL_OPEN_DNS_REFRESH_SECONDS: Final = 5.0
_INITIAL_FETCH_TIMEOUT: Final = "2s"
_KEEPALIVE: Final = {"interval": "30s", "timeout": "5s"}
# An Envoy whose replica hangs soon asks another one.
_ADS_KEEPALIVE: Final = {"interval": "5s", "timeout": "2s"}
_TLS_TO_NAMES: Final = "tls"
_HTTP_OPTIONS: Final = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def worker_urls(config: Config) -> list[WorkerUrl]:
    """The configured URLs; with the backend `dns` the hosts stand for several workers."""
    listed = config.discovery.listed
    return [] if listed is None else [parse_worker_url(url) for url in listed.urls]


def worker_clusters(config: Config) -> list[dict[str, Any]]:
    """The clusters of workers in Envoy's file: all of them, or with ADS only the one for requests
    without a decision.
    """
    if not config.envoy.has_ads:
        return [worker_cluster(config)]
    return [_fail_open_cluster(config)] if config.fails_open and config.knows_all_workers else []


def pool_cluster(config: Config, model: str, role: str) -> dict[str, Any]:
    """The cluster of the workers of one model and role, which Envoy asks this service for.

    A request that leaves its list of destinations stays with workers of this model and role.
    """
    name = config.envoy.cluster_of(model, role)
    source = {"type": "EDS", "eds_cluster_config": {"eds_config": ads_source()}}
    cluster = _of_workers(config, name, source, {}) | {
        # The same for any number of workers: a cluster that changes is made anew.
        "circuit_breakers": retry_limits(config, 0),
    }
    # A dot in the name of a statistic would end the cluster's part of it.
    return cluster | {"alt_stat_name": name.replace(".", "_")}


def ads_source() -> dict[str, Any]:
    """Where Envoy has clusters and endpoints from, with ADS."""
    return {
        "ads": {},
        "resource_api_version": "V3",
        # Envoy opens its ports after that, with or without this service.
        "initial_fetch_timeout": _INITIAL_FETCH_TIMEOUT,
    }


def fail_open_name(config: Config) -> str:
    """The cluster that Envoy uses without this service.

    With ADS and no such cluster in the file, it is the model's: an Envoy that runs has it.
    """
    envoy = config.envoy
    if envoy.has_ads and config.knows_all_workers:
        return f"{envoy.cluster}{_FAIL_OPEN_SUFFIX}"
    return envoy.cluster_of(config.models[0].id, "plain")


def _fail_open_cluster(config: Config) -> dict[str, Any]:
    """The workers by DNS or by the list of the configuration, as far as Envoy can find them."""
    host, dns = config.envoy.fail_open_host, config.discovery.dns
    urls = worker_urls(config) if host is None else [parse_worker_url(f"http://{host}")]
    name = fail_open_name(config)
    resolution: dict[str, Any] = {"type": "STATIC"}
    if any(not url.is_ip for url in urls):
        servers = [] if isinstance(dns, UnsetType) else dns.nameservers
        family = config.discovery.lookup_family
        resolution = _by_dns(_FAIL_OPEN_DNS_REFRESH_SECONDS, family, servers)
    return _of_workers(config, name, resolution, _load_assignment(name, urls))


def worker_cluster(config: Config) -> dict[str, Any]:
    """The cluster of all static workers, whatever their model; the destination picks among them.

    Envoy skips an unknown destination and uses the fallback policy, so no request reaches an
    address that is not in this list.
    """
    urls, name = worker_urls(config), config.envoy.cluster
    assignment = {} if config.envoy.endpoints_change else _load_assignment(name, urls)
    return _of_workers(config, name, _resolution(config, urls), assignment)


def _of_workers(
    config: Config, name: str, resolution: dict[str, Any], assignment: dict[str, Any]
) -> dict[str, Any]:
    """A cluster of workers; `resolution` and `assignment` say where its endpoints come from."""
    filters = attempt_filters(config)
    cluster: dict[str, Any] = {
        "name": name,
        **resolution,
        "connect_timeout": duration(config.proxy.connect_timeout_secs),
        **assignment,
        "load_balancing_policy": {"policies": [_destination_policy()]},
        "circuit_breakers": retry_limits(config, len(worker_urls(config))),
        "upstream_connection_options": {"tcp_keepalive": _tcp_keepalive()},
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: typed(
                "extensions.upstreams.http.v3.HttpProtocolOptions",
                common_http_protocol_options={
                    # Shorter than the engine's keep-alive: a request written to a connection
                    # that the engine is closing is lost, and must not be sent twice.
                    "idle_timeout": duration(config.envoy.worker_idle_timeout_secs),
                },
                explicit_http_config={"http_protocol_options": {}},
                **({"http_filters": filters} if filters else {}),
            )
        },
    }
    if contexts := tls_contexts(config):
        cluster["transport_socket_matches"] = [
            {"name": name, "match": {"tls": name}, "transport_socket": context}
            for name, context in sorted(contexts.items())
        ]
    return cluster


def service_clusters(config: Config) -> list[dict[str, Any]]:
    """The clusters of this service, over HTTP/2: for requests, and for ADS if Envoy uses that."""
    if not config.envoy.has_ads:
        return [_requests_cluster(config)]
    # Without health checks: the service passes them only when its Envoys have the workers.
    ads = _of_this_service(config, ADS_CLUSTER, _ADS_KEEPALIVE, {})
    return [_requests_cluster(config), ads]


def _requests_cluster(config: Config) -> dict[str, Any]:
    """Health checks notice a dead service in two seconds."""
    checks = {
        # In panic mode Envoy goes on asking a service that it knows to be dead, and a request
        # whose body is under way then fails instead of taking the fallback route.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "health_checks": [_grpc_health_check()],
    }
    return _of_this_service(config, EXTPROC_CLUSTER, _KEEPALIVE, checks)


def _of_this_service(
    config: Config, name: str, keepalive: dict[str, str], checks: dict[str, Any]
) -> dict[str, Any]:
    server = config.server
    if server.unix_socket is not None:
        host = None
        address: dict[str, Any] = {"pipe": {"path": server.unix_socket}}
    else:
        host = _extproc_host(config)
        address = socket_address(host, server.port)
    by_name = host is not None and not host_is_ip(host)
    cluster: dict[str, Any] = {
        "name": name,
        **(
            _by_dns(_EXTPROC_DNS_REFRESH_SECONDS, "v4_preferred") if by_name else {"type": "STATIC"}
        ),
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
        "circuit_breakers": no_limits(),
        **checks,
        "typed_extension_protocol_options": {
            _HTTP_OPTIONS: typed(
                "extensions.upstreams.http.v3.HttpProtocolOptions",
                explicit_http_config={
                    "http2_protocol_options": {
                        # Room for replies that carry a rewritten body of full size.
                        "initial_stream_window_size": 16 * _MEBIBYTE,
                        "initial_connection_window_size": 64 * _MEBIBYTE,
                        "connection_keepalive": keepalive,
                    }
                },
            )
        },
    }
    if host is not None and server.tls is not None:
        cluster["transport_socket"] = _tls_to_us(config, host)
    return cluster


def _extproc_host(config: Config) -> str:
    host = config.envoy.extproc.host or config.server.host
    return "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 (compared only)


def _load_assignment(name: str, urls: list[WorkerUrl]) -> dict[str, Any]:
    """The endpoints of a cluster that has them in Envoy's own file."""
    entries = [lb_endpoint(url, url.host, url.port) for url in urls]
    return {"load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": entries}]}}


def _resolution(config: Config, urls: list[WorkerUrl]) -> dict[str, Any]:
    section, path = config.discovery.static_urls, config.envoy.endpoints_file
    if path is not None:
        source = {"path_config_source": {"path": path}, "resource_api_version": "V3"}
        return {"type": "EDS", "eds_cluster_config": {"eds_config": source}}
    if isinstance(section, UnsetType) or all(url.is_ip for url in urls):
        return {"type": "STATIC"}
    # The service resolves as often and in the same family: Envoy must know what it names.
    return _by_dns(section.dns_ttl_secs, section.dns_lookup_family)


def _by_dns(
    refresh_seconds: float, family: DnsLookupFamily, nameservers: Sequence[str] = ()
) -> dict[str, Any]:
    """Strict DNS with one endpoint per address, in the form that replaces `type: STRICT_DNS`.

    Without `nameservers`, Envoy asks those of the system. The record's own time to live is ignored:
    with it this service and Envoy would drift apart.
    """
    dns_cluster = typed(
        "extensions.clusters.dns.v3.DnsCluster",
        dns_lookup_family=_DNS_FAMILIES[family],
        dns_refresh_rate=duration(refresh_seconds),
        dns_failure_refresh_rate={"base_interval": "1s", "max_interval": "10s"},
        respect_dns_ttl=False,
        all_addresses_in_single_endpoint=False,
    )
    if nameservers:
        resolvers = [socket_address(*parse_nameserver(one)) for one in nameservers]
        dns_cluster["typed_dns_resolver_config"] = {
            "name": "envoy.network.dns_resolver.cares",
            "typed_config": typed(
                "extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
                resolvers=resolvers,
            ),
        }
    return {"cluster_type": {"name": "envoy.clusters.dns", "typed_config": dns_cluster}}


def lb_endpoint(url: WorkerUrl, host: str, port: int) -> dict[str, Any]:
    """The worker of this URL at a host, which is an address or a name."""
    entry: dict[str, Any] = {"endpoint": {"address": socket_address(host, port)}}
    if not url.is_ip:
        entry["endpoint"]["hostname"] = url.host
    if url.tls:
        entry["metadata"] = {
            "filter_metadata": {"envoy.transport_socket_match": {"tls": _tls_key(url)}}
        }
    return entry


def _destination_policy() -> dict[str, Any]:
    least_request = typed("extensions.load_balancing_policies.least_request.v3.LeastRequest")
    override_host = typed(
        "extensions.load_balancing_policies.override_host.v3.OverrideHost",
        override_host_sources=[
            {"metadata": {"key": DESTINATION_NAMESPACE, "path": [{"key": DESTINATION_HEADER}]}},
            {"header": DESTINATION_HEADER},
        ],
        fallback_policy={
            "policies": [
                {
                    "typed_extension_config": {
                        "name": "envoy.load_balancing_policies.least_request",
                        "typed_config": least_request,
                    }
                }
            ]
        },
    )
    return {
        "typed_extension_config": {
            "name": "envoy.load_balancing_policies.override_host",
            "typed_config": override_host,
        }
    }


def no_limits() -> dict[str, Any]:
    limits = ("max_connections", "max_pending_requests", "max_requests", "max_retries")
    return {"thresholds": [{"priority": "DEFAULT", **dict.fromkeys(limits, UNLIMITED)}]}


def _tcp_keepalive() -> dict[str, int]:
    # Notices within a minute a worker that has vanished without a FIN.
    return {"keepalive_time": 30, "keepalive_interval": 10, "keepalive_probes": 3}


def _grpc_health_check() -> dict[str, Any]:
    return {
        "timeout": "1s",
        "interval": "1s",
        # Envoy's default without traffic is 60 s: after a quiet minute Envoy would bypass a
        # restarted service for as long.
        "no_traffic_interval": "1s",
        "no_traffic_healthy_interval": "1s",
        "unhealthy_threshold": 2,
        "healthy_threshold": 1,
        "reuse_connection": True,
        "grpc_health_check": {},
    }


def _tls_key(url: WorkerUrl) -> str:
    return f"{_TLS_TO_NAMES}-{url.host}" if url.is_ip else _TLS_TO_NAMES


def tls_contexts(config: Config) -> dict[str, dict[str, Any]]:
    """TLS contexts by the key that endpoints carry: names share one, each IP address has its own.

    The certificate of a name must have the name, which is sent as SNI. An address has no SNI, so
    the certificate must have the address among its IP SANs.
    """
    ca_file = config.workers.ca_file or _SYSTEM_CA_FILE
    to_names = _tls_context(
        {"trusted_ca": {"filename": ca_file}}, auto_host_sni=True, auto_sni_san_validation=True
    )
    # In the file of endpoints, https workers with names may appear later.
    contexts = {_TLS_TO_NAMES: to_names} if config.envoy.endpoints_change else {}
    for url in worker_urls(config):
        if url.tls:
            contexts[_tls_key(url)] = _verified_tls(ca_file, url.host) if url.is_ip else to_names
    return contexts


def _tls_to_us(config: Config, host: str) -> dict[str, Any]:
    extproc = config.envoy.extproc
    assert extproc.ca_file is not None  # noqa: S101 (a rule of config.rules)
    client: dict[str, Any] = {"alpn_protocols": ["h2"]}
    if extproc.cert_file is not None and extproc.key_file is not None:
        client["tls_certificates"] = [
            {
                "certificate_chain": {"filename": extproc.cert_file},
                "private_key": {"filename": extproc.key_file},
            }
        ]
    return _verified_tls(extproc.ca_file, host, client)


def _verified_tls(ca_file: str, host: str, common: dict[str, Any] | None = None) -> dict[str, Any]:
    """TLS to one known host; its certificate must have the name or the address."""
    by_ip = host_is_ip(host)
    validation = {
        "trusted_ca": {"filename": ca_file},
        "match_typed_subject_alt_names": [
            {"san_type": "IP_ADDRESS" if by_ip else "DNS", "matcher": {"exact": host}}
        ],
    }
    return _tls_context(validation, common, **({} if by_ip else {"sni": host}))


def _tls_context(
    validation: dict[str, Any], common: dict[str, Any] | None = None, **fields: Any
) -> dict[str, Any]:
    context = typed(
        "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        common_tls_context={**(common or {}), "validation_context": validation},
        **fields,
    )
    return {"name": "envoy.transport_sockets.tls", "typed_config": context}
