"""The sections of the chart's values, and the types that they share.

Separate from the values themselves, which say how the sections belong together.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

__all__ = [
    "AutoscalingValues",
    "DisruptionValues",
    "GatewayValues",
    "ImageValues",
    "MonitoringValues",
    "Name",
    "NetworkPolicyValues",
    "Port",
    "RbacValues",
    "ResourceValues",
    "Seconds",
    "SecretKey",
    "Section",
    "ServiceAccountValues",
    "SizingValues",
    "Strings",
    "TlsValues",
    "TokenizerValues",
    "TopologyValues",
    "UserId",
]

DnsLabel = Annotated[str, Meta(pattern="^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
Name = Annotated[str, Meta(min_length=1, max_length=253)]
Digest = Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]
PullPolicy = Literal["Always", "IfNotPresent", "Never"]
Strings = dict[str, str]
UserId = Annotated[int, Meta(ge=1)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[int, Meta(ge=0, le=86400)]
Quantity = Annotated[str, Meta(pattern="^[0-9]+(\\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, rename="camel"):
    """Base of every section of the values."""


class ImageValues(Section, frozen=True, kw_only=True):
    repository: Annotated[Name, Meta(description="Repository of the image.")] = "llm-extproc"
    tag: Annotated[str, Meta(description="Tag; empty for the version of the chart.")] = ""
    digest: Annotated[
        Digest | None, Meta(description="Digest of the image, in place of the tag.")
    ] = None
    pull_policy: Annotated[PullPolicy, Meta(description="When the image is pulled.")] = (
        "IfNotPresent"
    )


class SecretKey(Section, frozen=True, kw_only=True):
    name: Annotated[DnsLabel, Meta(description="Name of a Secret in the namespace of the release.")]
    key: Annotated[Name, Meta(description="Key in the Secret.")] = "token"


class ClaimSource(Section, frozen=True, kw_only=True):
    claim_name: Annotated[DnsLabel, Meta(description="An existing claim that holds the files.")]
    sub_path: Annotated[str, Meta(description="Folder in the volume.")] = ""


class ImageSource(Section, frozen=True, kw_only=True):
    reference: Annotated[
        Name, Meta(description="Image or OCI artifact that holds the files in its top folder.")
    ]
    pull_policy: Annotated[PullPolicy, Meta(description="When the image is pulled.")] = (
        "IfNotPresent"
    )


class DownloadSource(Section, frozen=True, kw_only=True):
    repository: Annotated[
        str,
        Meta(
            pattern="^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$",
            description="Repository of the model, `owner/name`.",
        ),
    ]
    revision: Annotated[
        str,
        Meta(
            pattern="^[0-9a-f]{40}$",
            description="Commit of the repository, so that all replicas get the same files.",
        ),
    ]
    endpoint: Annotated[
        str, Meta(pattern="^https?://[^/]+", description="Address of the hub or of a mirror.")
    ] = "https://huggingface.co"
    token: Annotated[SecretKey | None, Meta(description="Token of the hub, for gated models.")] = (
        None
    )


class TokenizerValues(Section, frozen=True, kw_only=True):
    name: Annotated[DnsLabel, Meta(description="The files are at `/models/<name>`.")]
    persistent_volume_claim: Annotated[
        ClaimSource | UnsetType, Meta(description="The files are in a volume.")
    ] = UNSET
    image: Annotated[
        ImageSource | UnsetType,
        Meta(description="The files are in an image, which Kubernetes 1.35 or newer mounts."),
    ] = UNSET
    download: Annotated[
        DownloadSource | UnsetType,
        Meta(description="An init container downloads the files before the service starts."),
    ] = UNSET


class TlsValues(Section, frozen=True, kw_only=True):
    secret_name: Annotated[
        DnsLabel, Meta(description="Secret with `tls.crt`, `tls.key` and `ca.crt`.")
    ]
    client_ca: Annotated[
        bool, Meta(description="Gateways must present a certificate that `ca.crt` has signed.")
    ] = False


class GatewayServiceValues(Section, frozen=True, kw_only=True):
    type: Annotated[
        Literal["ClusterIP", "NodePort", "LoadBalancer"], Meta(description="Type of the Service.")
    ] = "ClusterIP"
    port: Annotated[Port, Meta(description="Port of the Service.")] = 80
    annotations: Annotated[Strings, Meta(description="Annotations of the Service.")] = field(
        default_factory=dict
    )


class GatewayValues(Section, frozen=True, kw_only=True):
    image: Annotated[ImageValues, Meta(description="Envoy 1.38 or newer.")] = field(
        default_factory=lambda: ImageValues(repository="envoyproxy/envoy", tag="distroless-v1.40.0")
    )
    concurrency: Annotated[
        int, Meta(ge=1, le=128, description="Threads of Envoy, and its CPU request.")
    ] = 2
    memory_mib: Annotated[
        int,
        Meta(
            ge=256,
            le=1_048_576,
            description="Memory limit of Envoy in MiB. Half of it is its request, and the default "
            "of `envoy.max_heap_mb`, from which Envoy refuses requests.",
        ),
    ] = 2048
    drain_secs: Annotated[
        Seconds,
        Meta(
            description="Longest time that running responses get when a pod ends. A longer one is "
            "cut."
        ),
    ] = 600
    service: Annotated[GatewayServiceValues, Meta(description="Where clients connect.")] = field(
        default_factory=GatewayServiceValues
    )


class ServiceAccountValues(Section, frozen=True, kw_only=True):
    create: Annotated[bool, Meta(description="Makes a ServiceAccount.")] = True
    name: Annotated[
        str, Meta(description="Its name, or that of an existing one; empty for the release's.")
    ] = ""
    annotations: Annotated[Strings, Meta(description="Annotations of the ServiceAccount.")] = field(
        default_factory=dict
    )


class RbacValues(Section, frozen=True, kw_only=True):
    create: Annotated[
        bool,
        Meta(
            description="Makes the Role and RoleBinding that discovery needs, or a ClusterRole and "
            "ClusterRoleBinding if `namespace` there is empty."
        ),
    ] = True


class DisruptionValues(Section, frozen=True, kw_only=True):
    enabled: Annotated[
        bool, Meta(description="Makes a PodDisruptionBudget if there can be several pods.")
    ] = True
    max_unavailable: Annotated[
        int, Meta(ge=1, description="Pods that an eviction may take away at a time.")
    ] = 1


class HpaValues(Section, frozen=True, kw_only=True):
    enabled: Annotated[bool, Meta(description="Makes a HorizontalPodAutoscaler.")] = False
    min_replicas: Annotated[int, Meta(ge=1, description="Least pods.")] = 2
    max_replicas: Annotated[int, Meta(ge=1, description="Most pods.")] = 6
    target_cpu_percent: Annotated[
        int, Meta(ge=1, le=100, description="Share of the CPU request to aim at.")
    ] = 60


class KedaValues(Section, frozen=True, kw_only=True):
    enabled: Annotated[bool, Meta(description="Makes a ScaledObject of KEDA.")] = False
    min_replicas: Annotated[int, Meta(ge=1, description="Least pods.")] = 2
    max_replicas: Annotated[int, Meta(ge=1, description="Most pods.")] = 6
    prometheus_address: Annotated[str, Meta(description="URL of Prometheus.")] = ""
    requests_per_replica: Annotated[
        int, Meta(ge=1, description="Open requests of a pod to aim at (`extproc_requests_open`).")
    ] = 1000


class AutoscalingValues(Section, frozen=True, kw_only=True):
    hpa: Annotated[HpaValues, Meta(description="By CPU. Not beside `keda`.")] = field(
        default_factory=HpaValues
    )
    keda: Annotated[KedaValues, Meta(description="By open requests. Not beside `hpa`.")] = field(
        default_factory=KedaValues
    )


class PortRange(Section, frozen=True, kw_only=True):
    port: Annotated[Port, Meta(description="First port.")]
    end_port: Annotated[Port | UnsetType, Meta(description="Last port of a range.")] = UNSET


class NetworkPolicyValues(Section, frozen=True, kw_only=True):
    enabled: Annotated[
        bool, Meta(description="Makes a NetworkPolicy for what comes and what goes.")
    ] = False
    gateways: Annotated[
        list[dict[str, Any]],
        Meta(
            description="Peers (`podSelector`, `namespaceSelector`, `ipBlock`) that may connect: "
            "gateways, or clients with `mode: gateway`. Empty for all pods of the namespace."
        ),
    ] = field(default_factory=list)
    monitoring: Annotated[
        list[dict[str, Any]],
        Meta(description="Peers that may read the metrics. Empty for no peer."),
    ] = field(default_factory=list)
    workers: Annotated[
        list[dict[str, Any]],
        Meta(description="Peers that are workers. Empty for all pods of the namespace."),
    ] = field(default_factory=list)
    worker_ports: Annotated[
        list[PortRange], Meta(description="Ports of the workers: HTTP, KV events and replays.")
    ] = field(default_factory=lambda: [PortRange(port=30000), PortRange(port=5557, end_port=5572)])
    api_server: Annotated[
        list[dict[str, Any]],
        Meta(
            description="Peers that are the API server, for discovery. Empty for any address on "
            "ports 443 and 6443."
        ),
    ] = field(default_factory=list)


class MonitorValues(Section, frozen=True, kw_only=True):
    enabled: Annotated[bool, Meta(description="Makes the object.")] = False
    interval: Annotated[
        str, Meta(pattern="^[0-9]+(ms|s|m)$", description="Interval of the scrapes.")
    ] = "15s"
    labels: Annotated[
        Strings, Meta(description="Labels by which the Prometheus operator selects it.")
    ] = field(default_factory=dict)


class RuleValues(Section, frozen=True, kw_only=True):
    enabled: Annotated[bool, Meta(description="Makes a PrometheusRule with alerts.")] = False
    labels: Annotated[
        Strings, Meta(description="Labels by which the Prometheus operator selects it.")
    ] = field(default_factory=dict)


class DashboardValues(Section, frozen=True, kw_only=True):
    enabled: Annotated[bool, Meta(description="Makes a ConfigMap with a Grafana dashboard.")] = (
        False
    )
    labels: Annotated[
        Strings, Meta(description="Labels by which the sidecar of Grafana finds it.")
    ] = field(default_factory=lambda: {"grafana_dashboard": "1"})


class MonitoringValues(Section, frozen=True, kw_only=True):
    service_monitor: Annotated[
        MonitorValues, Meta(description="ServiceMonitor. Not beside `podMonitor`.")
    ] = field(default_factory=MonitorValues)
    pod_monitor: Annotated[
        MonitorValues, Meta(description="PodMonitor. Not beside `serviceMonitor`.")
    ] = field(default_factory=MonitorValues)
    prometheus_rule: Annotated[RuleValues, Meta(description="Alerts.")] = field(
        default_factory=RuleValues
    )
    dashboard: Annotated[DashboardValues, Meta(description="Dashboard.")] = field(
        default_factory=DashboardValues
    )


class SizingValues(Section, frozen=True, kw_only=True):
    workers: Annotated[int, Meta(ge=1, le=100_000, description="Most workers of all models.")] = 16
    ranks_per_worker: Annotated[
        int, Meta(ge=1, le=1024, description="Data-parallel ranks of a worker.")
    ] = 1
    kv_tokens_per_worker: Annotated[
        int,
        Meta(ge=1, le=1_000_000_000, description="Tokens that a worker can cache, all its ranks."),
    ] = 500_000
    page_size: Annotated[
        int, Meta(ge=1, le=65536, description="Tokens in a KV page (vLLM: block size).")
    ] = 16
    open_files_max: Annotated[
        int,
        Meta(
            ge=1024,
            description="Open files that the container runtime allows. The chart refuses a fleet "
            "that needs more.",
        ),
    ] = 1_048_576


class ResourceValues(Section, frozen=True, kw_only=True):
    cpu_request: Annotated[
        Quantity, Meta(description="The event loop uses one core; tokenization uses more.")
    ] = "2"
    cpu_limit: Annotated[
        Quantity | None, Meta(description="A limit delays requests when it is reached.")
    ] = None
    memory_request: Annotated[
        Quantity | None, Meta(description="In place of what is computed from `sizing`.")
    ] = None
    memory_limit: Annotated[
        Quantity | None, Meta(description="In place of what is computed from `sizing`.")
    ] = None


class TopologyValues(Section, frozen=True, kw_only=True):
    zones: Annotated[
        Literal["DoNotSchedule", "ScheduleAnyway"],
        Meta(description="What happens to a pod that cannot be spread over zones."),
    ] = "ScheduleAnyway"
    nodes: Annotated[
        Literal["DoNotSchedule", "ScheduleAnyway"],
        Meta(description="What happens to a pod that cannot be spread over nodes."),
    ] = "ScheduleAnyway"
