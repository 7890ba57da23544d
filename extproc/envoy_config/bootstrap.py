"""Puts the bootstrap together, and refuses configurations that Envoy cannot run with."""

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import yaml
from msgspec import UnsetType

from extproc.config.schema import Config
from extproc.envoy_config.clusters import (
    ads_source,
    service_clusters,
    worker_clusters,
)
from extproc.envoy_config.decode_pass import (
    decode_pass_cluster,
    decode_pass_listener,
    internal_listener_extension,
)
from extproc.envoy_config.listener import ingress_listener
from extproc.envoy_config.overload import overload_manager
from extproc.envoy_config.wire_form import host_is_ip, socket_address
from extproc.errors import ConfigError
from extproc.headers import ADS_CLUSTER, DECODE_CLUSTER, EXTPROC_CLUSTER
from extproc.worker_url import parse_worker_url

__all__ = [
    "NODE",
    "as_yaml",
    "bootstrap_problems",
    "dynamic_resources",
    "render_bootstrap",
    "render_yaml",
    "rendering_problems",
]

NODE: Final = "llm-extproc"
_MAX_MESSAGE_TIMEOUT_SECONDS: Final = 3600

_HEADER: Final = """\
# Rendered by `extproc envoy-config`; change the configuration and render again.
# Needs Envoy 1.38 or later.
"""


def render_bootstrap(config: Config) -> dict[str, Any]:
    """Return Envoy's bootstrap as plain data.

    Raises ConfigError with every key whose value Envoy could not run with.
    """
    if problems := list(rendering_problems(config)):
        raise ConfigError(problems)
    return {
        "node": {"id": NODE, "cluster": NODE},
        "admin": {"address": socket_address("127.0.0.1", config.envoy.admin_port)},
        "bootstrap_extensions": [internal_listener_extension()],
        "overload_manager": overload_manager(config.envoy),
        **({"dynamic_resources": dynamic_resources()} if config.envoy.has_ads else {}),
        "static_resources": {
            "listeners": [ingress_listener(config), decode_pass_listener(config)],
            "clusters": [
                *worker_clusters(config),
                decode_pass_cluster(),
                *service_clusters(config),
            ],
        },
    }


def dynamic_resources() -> dict[str, Any]:
    """Envoy has the clusters of workers, and their endpoints, from the cluster of this service."""
    return {"ads_config": _ads(), "cds_config": ads_source()}


def _ads() -> dict[str, Any]:
    return {
        "api_type": "DELTA_GRPC",
        "transport_api_version": "V3",
        "set_node_on_first_message_only": True,
        "grpc_services": [
            {
                "envoy_grpc": {
                    "cluster_name": ADS_CLUSTER,
                    # Envoy's default goes up to 30 s, in which it would miss new workers. A
                    # service that starts waits for its Envoys for `envoy.eds_settle_secs` only.
                    "retry_policy": {
                        "retry_back_off": {"base_interval": "0.1s", "max_interval": "0.4s"}
                    },
                }
            }
        ],
    }


def render_yaml(config: Config) -> str:
    """Return the bootstrap as the text of a YAML file; raises like render_bootstrap."""
    return _HEADER + as_yaml(render_bootstrap(config))


def as_yaml(bootstrap: dict[str, Any]) -> str:
    """The text of a YAML file, without anchors."""
    return yaml.dump(bootstrap, Dumper=_PlainDumper, sort_keys=False, width=100)


class _PlainDumper(yaml.SafeDumper):
    """Writes repeated parts out, since anchors are harder to read and to edit."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def rendering_problems(config: Config) -> Iterator[str]:
    """Every problem of bootstrap_problems, and those of a file for Envoy in particular."""
    yield from bootstrap_problems(config)
    if config.discovery.backend != "static_urls" and not config.envoy.endpoints_change:
        # No problem for those whose gateway discovers the workers itself.
        yield (
            "envoy.endpoints: ads is needed, or envoy.endpoints_file, to render Envoy's file with "
            f"the backend {config.discovery.backend!r}; otherwise Envoy would not know the workers "
            "that this service chooses"
        )


def bootstrap_problems(config: Config) -> Iterator[str]:
    """Every value that Envoy could not run with, as `key: sentence`.

    The configuration may break rules: then it cannot be rendered, but it can be checked.
    """
    envoy = config.envoy
    if not host_is_ip(envoy.host):
        yield "envoy.host: Envoy listens on addresses only, expected an IP address"
    if envoy.message_timeout_secs > _MAX_MESSAGE_TIMEOUT_SECONDS:
        yield f"envoy.message_timeout_secs: Envoy allows at most {_MAX_MESSAGE_TIMEOUT_SECONDS}"
    if envoy.cluster in (EXTPROC_CLUSTER, ADS_CLUSTER):
        yield f"envoy.cluster: {envoy.cluster!r} is the name of this service's own cluster"
    if envoy.cluster == DECODE_CLUSTER:
        yield f"envoy.cluster: {DECODE_CLUSTER!r} is the name of the second pass"
    section = config.discovery.static_urls
    for index, text in enumerate([] if isinstance(section, UnsetType) else section.urls):
        # A URL that cannot be parsed breaks a rule of the configuration.
        with contextlib.suppress(ValueError):
            if "%" in parse_worker_url(text).host:
                yield (
                    f"discovery.static_urls.urls[{index}]: Envoy cannot connect to an IPv6 "
                    "address with a zone"
                )
    if config.server.unix_socket is None and config.server.tls is None and envoy.extproc.ca_file:
        yield "envoy.extproc.ca_file: the service has no TLS to verify, set server.tls"
