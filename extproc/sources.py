"""Builds the discovery backend that the configuration names.

Separate from the rest of the wiring because each backend brings a client of its own.
"""

from extproc.build import Shared
from extproc.config.schema import (
    Config,
    InferencePoolConfig,
    K8sConfig,
    K8sPodsConfig,
    StaticUrlsConfig,
)
from extproc.discovery.cluster_source import SourceParts
from extproc.discovery.endpoint_slices import slice_source
from extproc.discovery.inference_pool import pool_source
from extproc.discovery.pods import pod_source
from extproc.discovery.static_urls import StaticUrls
from extproc.errors import ConfigError
from extproc.workers.source import WorkerSource

__all__ = ["build_source"]


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
    match discovery.cluster:
        case K8sPodsConfig() as section:
            return pod_source(section, parts)
        case InferencePoolConfig() as section:
            return pool_source(section, parts)
        case K8sConfig() as section:
            return slice_source(section, parts)
    raise ConfigError([f"discovery.{discovery.backend}: this section is needed"])
