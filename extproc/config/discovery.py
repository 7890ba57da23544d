"""The keys of discovery: where the workers are, and how they are asked.

Separate from the rest of the schema because each backend has a section of its own.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, UnsetType, field

from extproc.config.section import SECONDS, Port, Seconds, Section, Text

__all__ = [
    "BACKENDS_ARE_NEEDED",
    "IP_VERSIONS",
    "ClusterSection",
    "DiscoveryConfig",
    "DnsConfig",
    "DnsLookupFamily",
    "InferencePoolConfig",
    "K8sConfig",
    "K8sPodsConfig",
    "SelectedSection",
    "StaticUrlsConfig",
]

# A rule between keys of this section, for editors; the loader has it in config.rules.
BACKENDS_ARE_NEEDED = {
    "allOf": [
        {
            "if": {"properties": {"backend": {"const": backend}}},
            "then": {"required": [backend]},
        }
        for backend in ("static_urls", "dns", "k8s", "k8s_pods", "inference_pool")
    ]
}

DnsLookupFamily = Literal["v4_preferred", "v6_preferred", "v4_only", "v6_only"]
# The versions of IP of each, the preferred one first.
IP_VERSIONS: Final[Mapping[DnsLookupFamily, tuple[int, ...]]] = MappingProxyType(
    {"v4_preferred": (4, 6), "v6_preferred": (6, 4), "v4_only": (4,), "v6_only": (6,)}
)


_BootstrapPortAnnotation = Annotated[
    Text,
    Meta(
        description="Annotation of prefill pods with the bootstrap port (SGLang). What the "
        "engine reports counts more."
    ),
]
_BOOTSTRAP_PORT_ANNOTATION: Final = "sglang.ai/bootstrap-port"


class StaticUrlsConfig(Section, frozen=True, kw_only=True):
    urls: Annotated[
        list[str],
        Meta(
            extra_json_schema={"minItems": 1},
            description="Worker URLs, `http(s)://host[:port]`, without a path. The models are "
            "read from the workers.",
        ),
    ]
    prefill_urls: Annotated[
        list[str],
        Meta(
            description="Those of `urls` that are prefill workers. Needed only if the engine "
            "does not report its role (vLLM)."
        ),
    ] = field(default_factory=list)
    decode_urls: Annotated[
        list[str], Meta(description="Those of `urls` that are decode workers, as above.")
    ] = field(default_factory=list)
    dns_ttl_secs: Annotated[
        Seconds, Meta(description="Interval at which host names are resolved again.")
    ] = 30 * SECONDS
    dns_lookup_family: Annotated[
        DnsLookupFamily,
        Meta(
            description="Which addresses of a host name are used, by this service and by the "
            "rendered Envoy configuration. Another gateway must use the same family, or it does "
            "not know the addresses that this service names."
        ),
    ] = "v4_preferred"


class DnsConfig(Section, frozen=True, kw_only=True):
    """Host names whose every address is a worker."""

    urls: Annotated[
        list[str],
        Meta(
            extra_json_schema={"minItems": 1},
            description="Names of workers, `http://name:port`. Every address of a name is a worker "
            "at that port. The models are read from the workers.",
        ),
    ]
    prefill_urls: Annotated[
        list[str],
        Meta(
            description="Those of `urls` whose workers are prefill workers. Needed only if the "
            "engine does not report its role (vLLM)."
        ),
    ] = field(default_factory=list)
    decode_urls: Annotated[
        list[str], Meta(description="Those of `urls` with decode workers, as above.")
    ] = field(default_factory=list)
    address_family: Annotated[
        DnsLookupFamily,
        Meta(
            description="Which addresses of a name are workers. The second family is used only "
            "while a name has no address of the first one, so that a worker with both is one "
            "worker."
        ),
    ] = "v4_preferred"
    ttl_min_secs: Annotated[
        Seconds,
        Meta(
            description="A name is looked up again after the time to live of its records, but not "
            "before this time."
        ),
    ] = 1 * SECONDS
    ttl_max_secs: Annotated[
        Seconds, Meta(description="A name is looked up again after this time at the latest.")
    ] = 30 * SECONDS
    leave_secs: Annotated[
        float,
        Meta(
            ge=0,
            le=604800,
            description="A worker whose address is no longer among those of its name gets no new "
            "requests. It is removed after this time; until then it can come back with all that "
            "is known of it.",
        ),
    ] = 30 * SECONDS
    nameservers: Annotated[
        list[str],
        Meta(
            description="Addresses of name servers, `ip` or `ip:port`. Without them, those of "
            "`/etc/resolv.conf`. `/etc/hosts` and the search domains count in both cases."
        ),
    ] = field(default_factory=list)


class ClusterSection(Section, frozen=True, kw_only=True):
    """What all backends of a Kubernetes cluster have in common."""

    namespace: Annotated[
        str,
        Meta(description="Namespace of the objects that are followed; empty for all namespaces."),
    ]
    prefill_selector: Annotated[
        Text | None,
        Meta(description="Of those objects, selects prefill workers. It is tried first."),
    ] = None
    decode_selector: Annotated[
        Text | None, Meta(description="Of those objects, selects decode workers.")
    ] = None
    address_family: Annotated[
        DnsLookupFamily,
        Meta(
            description="Which addresses are used. A pod with both IPv4 and IPv6 is one worker. "
            "The gateway must know the same addresses."
        ),
    ] = "v4_preferred"
    kubeconfig: Annotated[
        Text | None,
        Meta(
            description="File with the address of the API server and the credentials. Without it, "
            "the service account of the pod in which this service runs."
        ),
    ] = None


class SelectedSection(ClusterSection, frozen=True, kw_only=True):
    """Objects that are selected by their labels."""

    label_selector: Annotated[
        Text | None,
        Meta(description="Selects the objects by their labels. The API server evaluates it."),
    ] = None
    port_name: Annotated[
        Text | None,
        Meta(description="Name of the workers' port in the object. Without it, `port` counts."),
    ] = None
    port: Annotated[
        Port | None,
        Meta(
            description="The workers' port where `port_name` does not give it. Without both, it is "
            "the first port of the object, or 30000 if the object has no port."
        ),
    ] = None


class K8sConfig(SelectedSection, frozen=True, kw_only=True):
    """The objects are EndpointSlices, which have the labels of their Service."""


class K8sPodsConfig(SelectedSection, frozen=True, kw_only=True):
    """The objects are pods."""

    bootstrap_port_annotation: _BootstrapPortAnnotation = _BOOTSTRAP_PORT_ANNOTATION
    ranks_from: Annotated[
        Text | None,
        Meta(
            description="Label or annotation that says which data-parallel ranks run in a pod, "
            "such as `3` or `4-7`, for engines on several pods (LeaderWorkerSet). The KV events "
            "of a rank are then read at the address of its pod."
        ),
    ] = None


class InferencePoolConfig(ClusterSection, frozen=True, kw_only=True):
    """One InferencePool of the Gateway API Inference Extension, version v1."""

    name: Annotated[Text, Meta(description="Name of the InferencePool.")]
    bootstrap_port_annotation: _BootstrapPortAnnotation = _BOOTSTRAP_PORT_ANNOTATION


class DiscoveryConfig(Section, frozen=True, kw_only=True):
    backend: Annotated[
        Literal["static_urls", "dns", "k8s", "k8s_pods", "inference_pool"],
        Meta(
            description="Where workers come from: a list, host names with several addresses (see "
            "[dns.md](dns.md)), or in a Kubernetes cluster the EndpointSlices of Services, the "
            "pods, or an InferencePool (see [kubernetes.md](kubernetes.md))."
        ),
    ]
    static_urls: Annotated[
        StaticUrlsConfig | UnsetType, Meta(description="Needed for backend `static_urls`.")
    ] = UNSET
    dns: Annotated[
        DnsConfig | UnsetType,
        Meta(description="Needed for backend `dns`: the names whose addresses are workers."),
    ] = UNSET
    k8s: Annotated[
        K8sConfig | UnsetType,
        Meta(
            description="Needed for backend `k8s`: the EndpointSlices, which have the labels of "
            "their Service."
        ),
    ] = UNSET
    k8s_pods: Annotated[
        K8sPodsConfig | UnsetType, Meta(description="Needed for backend `k8s_pods`: the pods.")
    ] = UNSET
    inference_pool: Annotated[
        InferencePoolConfig | UnsetType,
        Meta(description="Needed for backend `inference_pool`: the pool that the gateway uses."),
    ] = UNSET

    introspection_retry_secs: Annotated[
        Seconds,
        Meta(
            description="Interval of introspections of a worker that has not reported a model yet."
        ),
    ] = 30 * SECONDS
    introspection_interval_secs: Annotated[
        Seconds,
        Meta(
            description="Interval of introspections of a known worker. A changed role is noticed "
            "within this time."
        ),
    ] = 15 * SECONDS
    generating_check_secs: Annotated[
        Seconds | None,
        Meta(
            description="Interval at which plain workers are asked for `/health_generate` "
            "(SGLang), which needs one token of the engine. A worker that fails twice gets no "
            "requests until it passes. Without a value there is no such check."
        ),
    ] = None

    mass_removal_hold_secs: Annotated[
        float,
        Meta(
            ge=0,
            le=604800,
            description="How long a worker stays in use that the cluster names no longer, although "
            "nothing says that it leaves (not ready, terminating, or deleted): the list may be "
            "wrong. It leaves earlier if it does not answer its introspection; 0 turns this off.",
        ),
    ] = 30 * SECONDS

    runtime_workers_max: Annotated[
        int,
        Meta(
            ge=0,
            le=10_000,
            description="Most workers that can be added over the admin port while the service "
            "runs, see [runtime-workers.md](runtime-workers.md). 0 switches that off.",
        ),
    ] = 64

    @property
    def cluster(self) -> ClusterSection | None:
        """The section of the backend, if that is a Kubernetes cluster."""
        section = getattr(self, self.backend)
        return section if isinstance(section, ClusterSection) else None

    @property
    def lookup_family(self) -> DnsLookupFamily:
        """Which addresses of a host name count."""
        section = getattr(self, self.backend)
        if isinstance(section, StaticUrlsConfig):
            return section.dns_lookup_family
        if isinstance(section, ClusterSection | DnsConfig):
            return section.address_family
        return "v4_preferred"

    @property
    def listed(self) -> StaticUrlsConfig | DnsConfig | None:
        """The section of the backend, if that has lists of URLs."""
        section = getattr(self, self.backend)
        return section if isinstance(section, StaticUrlsConfig | DnsConfig) else None

    @property
    def names_roles(self) -> bool:
        """True if the section of the backend says which workers prefill and which decode."""
        if self.listed is not None:
            return bool(self.listed.prefill_urls or self.listed.decode_urls)
        return self.cluster is not None and self.cluster.prefill_selector is not None
