"""Every value of the chart: its name, type, default, bounds and meaning.

The schema, values.yaml and the table in the chart's README are generated from these structs, as the
pages of the configuration are from theirs. `config` is the service's own configuration, so a value
there is checked by the same rules.
"""

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, field

from extproc.config.schema import Config
from helm.gateway_objects import GatewayObjectsValues
from helm.sections import (
    AutoscalingValues,
    DisruptionValues,
    GatewayValues,
    ImageValues,
    MonitoringValues,
    NetworkPolicyValues,
    RbacValues,
    ResourceValues,
    Seconds,
    SecretKey,
    Section,
    ServiceAccountValues,
    SizingValues,
    Strings,
    TlsValues,
    TokenizerValues,
    TopologyValues,
    UserId,
)

__all__ = ["OWNED", "Values"]

# Keys of the service's configuration that the chart sets itself. They are refused in `config`, or
# a value there would not fit the objects that the chart makes.
OWNED: Final = {
    "ServerConfig": (
        "host",
        "admin_host",
        "unix_socket",
        "watch_secs",
        "admin_token_file",
        "admin_token_env",
        "tls",
    ),
    "WorkersConfig": ("api_key", "api_key_file"),
    "EnvoyConfig": ("host", "endpoints_file", "extproc"),
    "K8sConfig": ("kubeconfig",),
    "K8sPodsConfig": ("kubeconfig",),
    "InferencePoolConfig": ("kubeconfig",),
}


class Values(Section, frozen=True, kw_only=True):
    mode: Annotated[
        Literal["service", "gateway"],
        Meta(
            description="`service`: a gateway exists and asks this service. `gateway`: each pod "
            "has an Envoy of its own, which clients connect to."
        ),
    ] = "service"
    config: Annotated[
        Config,
        Meta(
            description="The configuration of the service, see docs/configuration.md. "
            "`models` and `discovery` are required. Keys that the chart sets are refused."
        ),
    ]
    reload: Annotated[
        bool,
        Meta(
            description="The service applies a changed `config` while it runs; only keys that need "
            "a restart replace the pods. Without it, and with `mode: gateway`, each change "
            "replaces the pods."
        ),
    ] = True
    tokenizers: Annotated[
        list[
            Annotated[
                TokenizerValues,
                Meta(
                    extra_json_schema={
                        "oneOf": [
                            {"required": ["persistentVolumeClaim"]},
                            {"required": ["image"]},
                            {"required": ["download"]},
                        ]
                    }
                ),
            ]
        ],
        Meta(
            description="Where tokenizers and chat templates come from, each from one source. "
            "`models[].tokenizer_path` is then `/models/<name>`."
        ),
    ] = field(default_factory=list)
    replicas: Annotated[int, Meta(ge=1, description="Pods, without autoscaling.")] = 2
    image: Annotated[ImageValues, Meta(description="The service.")] = field(
        default_factory=ImageValues
    )
    image_pull_secrets: Annotated[
        list[dict[str, str]], Meta(description="Secrets for private registries, as `name`.")
    ] = field(default_factory=list)
    gateway: Annotated[GatewayValues, Meta(description="Only with `mode: gateway`.")] = field(
        default_factory=GatewayValues
    )
    gateway_objects: Annotated[
        GatewayObjectsValues,
        Meta(
            description="Objects by which a gateway that exists asks this service. Only with "
            "`mode: service`."
        ),
    ] = field(default_factory=GatewayObjectsValues)
    listen_host: Annotated[
        Literal["0.0.0.0", "::"],  # noqa: S104 (a name of a choice)
        Meta(description="`::` in a cluster with IPv6 addresses."),
    ] = "0.0.0.0"  # noqa: S104 (the network of a pod)
    tls: Annotated[
        TlsValues | None,
        Meta(description="TLS between the gateway and the service. Only with `mode: service`."),
    ] = None
    admin_token: Annotated[
        SecretKey | None,
        Meta(description="Token that `/metrics` and `/workers` need; probes do not."),
    ] = None
    worker_api_key: Annotated[
        SecretKey | None,
        Meta(description="API key of the workers, for the service's own requests."),
    ] = None
    service_account: Annotated[
        ServiceAccountValues, Meta(description="Its token is mounted only if discovery needs it.")
    ] = field(default_factory=ServiceAccountValues)
    rbac: Annotated[RbacValues, Meta(description="Rights at the API server.")] = field(
        default_factory=RbacValues
    )
    sizing: Annotated[SizingValues, Meta(description="From which memory is computed.")] = field(
        default_factory=SizingValues
    )
    resources: Annotated[ResourceValues, Meta(description="CPU and memory of the service.")] = (
        field(default_factory=ResourceValues)
    )
    pod_disruption_budget: Annotated[
        DisruptionValues, Meta(description="Limit of voluntary evictions.")
    ] = field(default_factory=DisruptionValues)
    autoscaling: Annotated[AutoscalingValues, Meta(description="Number of pods by load.")] = field(
        default_factory=AutoscalingValues
    )
    network_policy: Annotated[
        NetworkPolicyValues,
        Meta(description="KV events contain prompts unencrypted: keep them in the namespace."),
    ] = field(default_factory=NetworkPolicyValues)
    monitoring: Annotated[MonitoringValues, Meta(description="For Prometheus and Grafana.")] = (
        field(default_factory=MonitoringValues)
    )
    pre_stop_secs: Annotated[
        Seconds,
        Meta(description="Time for gateways to notice that a pod ends, before it stops."),
    ] = 5
    grace_secs: Annotated[
        Seconds | None,
        Meta(
            description="In place of the computed time a pod has to end: `preStopSecs`, "
            "`server.drain_secs`, the longest prefill, and `gateway.drainSecs`."
        ),
    ] = None
    run_as_user: Annotated[
        UserId | None,
        Meta(description="User of the processes; null where the platform chooses one."),
    ] = 10001
    topology_spread: Annotated[TopologyValues, Meta(description="Spread of the pods.")] = field(
        default_factory=TopologyValues
    )
    node_selector: Annotated[Strings, Meta(description="As in a pod.")] = field(
        default_factory=dict
    )
    tolerations: Annotated[list[dict[str, Any]], Meta(description="As in a pod.")] = field(
        default_factory=list
    )
    affinity: Annotated[dict[str, Any], Meta(description="As in a pod.")] = field(
        default_factory=dict
    )
    priority_class_name: Annotated[str, Meta(description="As in a pod.")] = ""
    pod_labels: Annotated[Strings, Meta(description="Further labels of the pods.")] = field(
        default_factory=dict
    )
    pod_annotations: Annotated[Strings, Meta(description="Further annotations of the pods.")] = (
        field(default_factory=dict)
    )
    extra_env: Annotated[
        list[dict[str, Any]], Meta(description="Further variables of the service's container.")
    ] = field(default_factory=list)
    extra_volumes: Annotated[list[dict[str, Any]], Meta(description="Further volumes.")] = field(
        default_factory=list
    )
    extra_volume_mounts: Annotated[
        list[dict[str, Any]], Meta(description="Further mounts of the service's container.")
    ] = field(default_factory=list)
    name_override: Annotated[
        str, Meta(max_length=53, description="In place of the chart's name.")
    ] = ""
    fullname_override: Annotated[
        str, Meta(max_length=53, description="In place of the names of all objects.")
    ] = ""
    global_: Annotated[dict[str, Any], Meta(description="Values of a parent chart; not used.")] = (
        field(name="global", default_factory=dict)
    )
