"""Builds the discovery backend that the configuration names.

Separate from the rest of the wiring because each backend brings a client of its own.
"""

import asyncio

from extproc.build import Shared
from extproc.config.schema import (
    Config,
    DnsConfig,
    InferencePoolConfig,
    K8sConfig,
    K8sPodsConfig,
    StaticUrlsConfig,
)
from extproc.discovery.cluster_source import SourceParts
from extproc.discovery.dns_names import dns_source
from extproc.discovery.endpoint_slices import slice_source
from extproc.discovery.inference_pool import pool_source
from extproc.discovery.pods import pod_source
from extproc.discovery.static_urls import StaticUrls
from extproc.errors import ConfigError
from extproc.worker_url import parse_worker_url
from extproc.workers.resolver import SystemResolver
from extproc.workers.source import WorkerSource
from extproc.workers.worker_warnings import SEVERAL_ADDRESSES_FIX

__all__ = ["build_source", "name_warnings"]


def build_source(config: Config, shared: Shared) -> WorkerSource:
    """The discovery backend; raises ConfigError where a cluster cannot be asked."""
    discovery = config.discovery
    if isinstance(discovery.static_urls, StaticUrlsConfig):
        return StaticUrls(discovery.static_urls)
    parts = SourceParts(
        clock=shared.clock,
        random=shared.random,
        metrics=shared.metrics.discovery,
        health=shared.sources,
    )
    if isinstance(discovery.dns, DnsConfig):
        return dns_source(discovery.dns, parts)
    match discovery.cluster:
        case K8sPodsConfig() as section:
            return pod_source(section, parts)
        case InferencePoolConfig() as section:
            return pool_source(section, parts)
        case K8sConfig() as section:
            return slice_source(section, parts)
    raise ConfigError([f"discovery.{discovery.backend}: this section is needed"])


async def name_warnings(config: Config) -> list[str]:
    """The names in the list of workers that have several addresses here, as `key: sentence`."""
    static_urls = config.discovery.static_urls
    if not isinstance(static_urls, StaticUrlsConfig):
        return []
    resolver = SystemResolver(static_urls.dns_lookup_family)
    urls = [parse_worker_url(text) for text in static_urls.urls]
    answers = await asyncio.gather(*(resolver.resolve(url) for url in urls))
    return [
        f"discovery.static_urls.urls[{index}]: the name has {len(addresses)} addresses; "
        f"{SEVERAL_ADDRESSES_FIX}"
        for index, addresses in enumerate(answers)
        if len(addresses) > 1
    ]
