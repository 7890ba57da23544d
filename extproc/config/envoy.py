"""The configuration of the Envoy that `extproc envoy-config` renders."""

from typing import Annotated, Final, Literal
from urllib.parse import quote

from msgspec import Meta, field

from extproc.config.section import SECONDS, Port, Seconds, Section, Text
from extproc.headers import DEFAULT_CLUSTER_HEADER, DEFAULT_MODEL_HEADER

__all__ = ["EnvoyConfig", "ExtprocEndpointConfig"]

# A request of a pair may meet a hung service in both passes, one after the other.
_SECOND_PASS_SHARE: Final = 0.4
_SECOND_PASS_MIN: Final = 0.5 * SECONDS
# What the name of a cluster takes over from the id of a model, besides letters, digits and _.-~
_SAFE_IN_CLUSTER: Final = "/:|@+"


class ExtprocEndpointConfig(Section, frozen=True, kw_only=True):
    host: Annotated[
        str | None,
        Meta(
            description="Host at which Envoy reaches this service; without it, `server.host`, or "
            "127.0.0.1 where that is a wildcard."
        ),
    ] = None
    ca_file: Annotated[
        str | None,
        Meta(
            description="PEM CA bundle with which Envoy verifies this service; needed with "
            "`server.tls`."
        ),
    ] = None
    cert_file: Annotated[
        str | None, Meta(description="Client certificate that Envoy presents; needed for mTLS.")
    ] = None
    key_file: Annotated[
        str | None, Meta(description="Key of that certificate; needed for mTLS.")
    ] = None


class EnvoyConfig(Section, frozen=True, kw_only=True):
    host: Annotated[Text, Meta(description="Address of Envoy's listener.")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Port of Envoy's listener.")] = 8080
    admin_port: Annotated[
        Port, Meta(description="Port of Envoy's admin interface, on 127.0.0.1.")
    ] = 9901
    fail_open: Annotated[
        bool,
        Meta(
            description="If this service is gone, Envoy balances over the workers by itself. "
            "Only with exactly one model; with several models, or without this, requests get a "
            "503."
        ),
    ] = True
    message_timeout_secs: Annotated[
        Seconds,
        Meta(
            description="Time for which Envoy waits for one reply of this service, once the "
            "service has said that it is at work."
        ),
    ] = 10 * SECONDS
    hang_timeout_secs: Annotated[
        float,
        Meta(
            ge=0.2,
            le=604800,
            description="Time after which Envoy takes this service for hung, if it has not said "
            "that it is at work: then requests go on without it, or get 503. Values above "
            "`message_timeout_secs` have no effect. For the second pass of a pair it is 40 % of "
            "this, but not less than 0.5 s.",
        ),
    ] = 2 * SECONDS
    stream_idle_timeout_secs: Annotated[
        Seconds,
        Meta(
            description="Envoy ends a stream that has no byte in either direction for this "
            "long. Must be longer than `proxy.request_timeout_secs`. Envoy does not limit the "
            "total time of a stream."
        ),
    ] = 660 * SECONDS
    worker_idle_timeout_secs: Annotated[
        Seconds,
        Meta(
            description="Idle connections to workers are closed after this time. It must be "
            "shorter than the engine's own keep-alive time-out (5 s in SGLang), or requests are "
            "lost on connections that the engine is just closing."
        ),
    ] = 3 * SECONDS
    max_heap_mb: Annotated[
        Annotated[int, Meta(ge=64, le=1024 * 1024)] | None,
        Meta(
            description="Heap of Envoy in MiB, by which it measures its load. From 75 % of it, new "
            "requests get a 503; from 85 %, requests that still send their body are cut off. "
            "Bodies that are on their way come on top, so leave a container at least twice as "
            "much. `null` switches the limit off."
        ),
    ] = 2048
    max_connections: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000_000,
            description="Most connections of clients. Further ones are closed at once. Should be "
            "less than half of the file descriptors that Envoy may open.",
        ),
    ] = 50_000
    destination: Annotated[
        Literal["list", "single"],
        Meta(
            description="`list` names the chosen worker and its fallbacks. `single` names only "
            "the chosen worker, for gateways with ORIGINAL_DST clusters."
        ),
    ] = "list"
    cluster: Annotated[
        Text,
        Meta(
            description="Name of Envoy's cluster of workers, the value of `envoy.cluster_header`. "
            "With `endpoints: ads` it is followed by the model and the role, such as "
            "`workers/llama/plain`."
        ),
    ] = "workers"
    cluster_header: Annotated[Text, Meta(description="Request header that names the cluster.")] = (
        DEFAULT_CLUSTER_HEADER
    )
    model_header: Annotated[Text, Meta(description="Request header that names the model.")] = (
        DEFAULT_MODEL_HEADER
    )
    endpoints_file: Annotated[
        Text | None,
        Meta(
            description="JSON file of the workers' addresses, in a folder that this service may "
            "write and Envoy reads. The service keeps it up to date, so that Envoy need not be "
            "restarted when workers change. Without it, the workers are in the rendered file."
        ),
    ] = None
    endpoints: Annotated[
        Literal["static", "file", "ads"] | None,
        Meta(
            description="From where Envoy has the workers: `static` puts them into the rendered "
            "file, `file` needs `endpoints_file`, and with `ads` Envoy asks this service. Default: "
            "`file` if `endpoints_file` is set, otherwise `static`."
        ),
    ] = None
    eds_settle_secs: Annotated[
        float,
        Meta(
            ge=0,
            le=60,
            description="With `endpoints: ads`, a new worker gets requests when every Envoy that "
            "is connected to this replica has acknowledged it, but not before this time: an Envoy "
            "may be connected to another replica, which learns of the worker a moment later. For "
            "the same reason a worker that left stays among the endpoints for this time.",
        ),
    ] = 0.5 * SECONDS
    fail_open_host: Annotated[
        Text | None,
        Meta(
            description="`host:port` of all workers, such as a headless Service, to which Envoy "
            "sends requests without this service. Only with `endpoints: ads`; without it, Envoy "
            "uses the workers in `discovery.static_urls`, or looks up the names in "
            "`discovery.dns`."
        ),
    ] = None
    access_log: Annotated[
        Text | None,
        Meta(description="File of the JSON access log; `null` switches it off."),
    ] = "/dev/stdout"
    extproc: Annotated[
        ExtprocEndpointConfig, Meta(description="How Envoy reaches this service.")
    ] = field(default_factory=ExtprocEndpointConfig)

    @property
    def endpoints_change(self) -> bool:
        """True if Envoy gets its endpoints while it runs, by ADS or from a file."""
        return self.has_ads or self.endpoints_file is not None

    @property
    def has_ads(self) -> bool:
        """True if Envoy asks this service for the workers."""
        return self.endpoints == "ads"

    def cluster_of(self, model: str, role: str) -> str:
        """The cluster of the workers of this model and role.

        With ADS each model and role has its own. Otherwise all are in one, since the rendered
        file does not know which worker serves what.
        """
        if not self.has_ads:
            return self.cluster
        return f"{self.cluster}/{quote(model, safe=_SAFE_IN_CLUSTER)}/{role}"

    @property
    def first_pass_hang_secs(self) -> float:
        """How long Envoy waits in the first pass for a service that has not said it is at work."""
        return min(self.hang_timeout_secs, self.message_timeout_secs)

    @property
    def second_pass_hang_secs(self) -> float:
        """The same for the second pass, which only picks a worker: both are 2.8 s by default."""
        shortened = max(_SECOND_PASS_MIN, _SECOND_PASS_SHARE * self.hang_timeout_secs)
        return min(self.first_pass_hang_secs, shortened)
