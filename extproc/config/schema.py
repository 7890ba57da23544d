"""Every configuration key: its name, type, default, bounds and meaning.

The key names and defaults of `server`, `observability`, `models`, `discovery`, `proxy` and
`active_load` follow sgl-router's file, so that its users can keep theirs. Separate from loading
because the documentation and the JSON Schema are generated from it, too. Nothing else in the
package reads settings from files or from the environment.
"""

from typing import Annotated, Literal

from msgspec import Meta, field

from extproc.config.discovery import (
    BACKENDS_ARE_NEEDED,
    IP_VERSIONS,
    ClusterSection,
    DiscoveryConfig,
    DnsConfig,
    DnsLookupFamily,
    InferencePoolConfig,
    K8sConfig,
    K8sPodsConfig,
    SelectedSection,
    StaticUrlsConfig,
)
from extproc.config.envoy import EnvoyConfig
from extproc.config.models import TOKEN_POLICIES, ModelConfig, PdModelConfig
from extproc.config.section import MEBIBYTE, SECONDS, Seconds, Section
from extproc.config.server import ServerConfig

__all__ = [
    "IP_VERSIONS",
    "ActiveLoadConfig",
    "ClusterSection",
    "Config",
    "DiscoveryConfig",
    "DnsConfig",
    "DnsLookupFamily",
    "InferencePoolConfig",
    "K8sConfig",
    "K8sPodsConfig",
    "KvConfig",
    "LoadConfig",
    "ObservabilityConfig",
    "PdConfig",
    "ProxyConfig",
    "SelectedSection",
    "StaticUrlsConfig",
    "TokenizationConfig",
    "WorkersConfig",
]

_PREFILL_SHARE = 0.8
# A rule between keys of one section, for editors; the loader has it in config.rules.
_TOKENIZER_IS_NEEDED = {
    "if": {
        "properties": {
            "policy": {"enum": list(TOKEN_POLICIES)},
            "tokens_from": {"not": {"const": "engine"}},
        },
        "required": ["policy"],
    },
    "then": {"properties": {"tokenizer_path": {"type": "string"}}, "required": ["tokenizer_path"]},
}


class ObservabilityConfig(Section, frozen=True, kw_only=True):
    log_level: Annotated[
        Literal["debug", "info", "warn", "warning", "error"],
        Meta(description="Lowest level that is logged. `debug` has a line per routing decision."),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"], Meta(description="Key-value text, or one JSON object per line.")
    ] = "text"
    debug_headers: Annotated[
        bool,
        Meta(
            description="Replies to requests with `x-extproc-debug: true` get headers that name "
            "the worker, the policy, the reason and the overlap."
        ),
    ] = False


class WorkersConfig(Section, frozen=True, kw_only=True):
    api_key: Annotated[
        str | None,
        Meta(
            description="Bearer token for this service's own requests to workers (`/server_info`)."
        ),
    ] = None
    api_key_file: Annotated[
        str | None, Meta(description="File that holds the token, instead of `workers.api_key`.")
    ] = None
    forward_api_key: Annotated[
        bool,
        Meta(
            description="Also set that token as `authorization` on the requests of clients, in "
            "place of theirs. The gateway must then authenticate clients."
        ),
    ] = False
    ca_file: Annotated[
        str | None,
        Meta(description="PEM CA bundle for https workers; without it, the system's."),
    ] = None


class ProxyConfig(Section, frozen=True, kw_only=True):
    request_timeout_secs: Annotated[
        Seconds,
        Meta(
            description="Time limit for requests that are not streamed, and for a body to arrive."
        ),
    ] = 300 * SECONDS
    first_byte_timeout_secs: Annotated[
        Seconds,
        Meta(
            description="Time limit for the response headers of a streamed request, for each "
            "attempt. A worker that exceeds it counts as failed. Waiting in the engine's queue "
            "counts. Requests that are not streamed have `request_timeout_secs`."
        ),
    ] = 120 * SECONDS
    connect_timeout_secs: Annotated[
        Seconds, Meta(description="Time limit for a TCP connection to a worker.")
    ] = 5 * SECONDS
    fallback_workers: Annotated[
        int,
        Meta(
            ge=0,
            le=8,
            description="Number of further workers in the destination list. Envoy tries them in "
            "order if the chosen worker refuses the connection. At most 2 with `proxy.retry_busy`.",
        ),
    ] = 2
    retry_busy: Annotated[
        bool,
        Meta(
            description="A 503 or 429 of a worker goes to the next worker of the list, for models "
            "without separate prefill and decode workers. The rendered Envoy configuration limits "
            "such requests to a share of those in flight. Needs its filter in the workers' cluster."
        ),
    ] = True


class ActiveLoadConfig(Section, frozen=True, kw_only=True):
    stale_request_timeout_secs: Annotated[
        Seconds,
        Meta(
            description="Age at which a request is ended: with a 504 before the response "
            "headers, by ending the stream after them."
        ),
    ] = 600 * SECONDS


class LoadConfig(Section, frozen=True, kw_only=True):
    release: Annotated[
        Literal["stream_end", "estimate"],
        Meta(
            description="When a request stops counting as load. `stream_end`: at the end of its "
            "ext_proc stream, which is exact where the gateway sends response trailers. "
            "`estimate`: after an estimated time, for gateways that close that stream at the "
            "response headers."
        ),
    ] = "stream_end"
    estimated_stream_secs: Annotated[
        Seconds,
        Meta(
            description="With `estimate`: time for which a streamed response counts as load "
            "after its headers."
        ),
    ] = 15 * SECONDS

    @property
    def estimate_secs(self) -> float | None:
        """The estimate, None where the end of a response is known."""
        return self.estimated_stream_secs if self.release == "estimate" else None


class KvConfig(Section, frozen=True, kw_only=True):
    max_pages: Annotated[
        int,
        Meta(
            ge=1000,
            le=1_000_000_000,
            description="Most pages in the index, summed over all ranks of all workers. A page "
            "takes about 250 bytes. Further pages are not added, and are counted.",
        ),
    ] = 8_000_000
    ranks_per_worker_max: Annotated[
        int,
        Meta(
            ge=1,
            le=1024,
            description="Most data-parallel ranks of a worker whose KV events are followed. Each "
            "takes up to six file descriptors. A worker that reports more is used without them.",
        ),
    ] = 128
    replay_timeout_secs: Annotated[
        Seconds, Meta(description="A replay fails if no frame arrives for this long.")
    ] = 5 * SECONDS
    replay_retry_secs: Annotated[
        Seconds, Meta(description="Time before a failed replay is requested again.")
    ] = 30 * SECONDS


class PdConfig(Section, frozen=True, kw_only=True):
    decode: Annotated[
        Literal["two_pass", "inline"],
        Meta(
            description="When the decode worker is chosen. `two_pass`: for each attempt, by a "
            "second filter behind an internal listener. `inline`: together with the prefill "
            "worker, for gateways without internal listeners."
        ),
    ] = "two_pass"
    response_timeout_secs: Annotated[
        Seconds,
        Meta(
            description="Longest silence of a decode worker, before its response and in it; at "
            "most half of `envoy.stream_idle_timeout_secs`. It is the only limit for a request "
            "whose prefill was lost because a router stopped."
        ),
    ] = 120 * SECONDS
    prefill_timeout_secs: Annotated[
        Seconds,
        Meta(
            description="Time limit for a prefill worker's answer. With the protocol `sglang`, "
            "at most four fifths of the decode worker's time, so that a failure is attributed "
            "to the worker that was silent. With `nixl`, Envoy has to wait for a reply of this "
            "service for as long as this."
        ),
    ] = 90 * SECONDS
    prefill_linger_secs: Annotated[
        Seconds,
        Meta(
            description="Time a prefill worker still has to answer after the decode worker's "
            "response has ended well. Its connection is then closed."
        ),
    ] = 1 * SECONDS


class TokenizationConfig(Section, frozen=True, kw_only=True):
    cache_bytes: Annotated[
        int,
        Meta(
            ge=0,
            le=1024 * 1024 * MEBIBYTE,
            description="Memory for the tokens of known pieces of text, per model; 0 switches "
            "the cache off.",
        ),
    ] = 128 * MEBIBYTE
    inline_chars: Annotated[
        int,
        Meta(
            ge=0,
            le=MEBIBYTE,
            description="Longest new text, in characters, that is encoded on the event loop. A "
            "longer one is encoded in a thread, so that other requests need not wait.",
        ),
    ] = 4096
    threads: Annotated[
        int, Meta(ge=1, le=64, description="Threads that encode text, per model.")
    ] = 2


class Config(Section, frozen=True, kw_only=True):
    server: Annotated[ServerConfig, Meta(description="What this service listens on.")] = field(
        default_factory=ServerConfig
    )
    observability: Annotated[ObservabilityConfig, Meta(description="Logs and debugging.")] = field(
        default_factory=ObservabilityConfig
    )
    models: Annotated[
        list[Annotated[ModelConfig, Meta(extra_json_schema=_TOKENIZER_IS_NEEDED)]],
        Meta(
            extra_json_schema={"minItems": 1},
            description="The models that are served; at least one.",
        ),
    ]
    discovery: Annotated[
        DiscoveryConfig,
        Meta(extra_json_schema=BACKENDS_ARE_NEEDED, description="Where the workers are."),
    ]
    workers: Annotated[WorkersConfig, Meta(description="Requests of this service to workers.")] = (
        field(default_factory=WorkersConfig)
    )
    proxy: Annotated[ProxyConfig, Meta(description="Limits of proxied requests.")] = field(
        default_factory=ProxyConfig
    )
    active_load: Annotated[ActiveLoadConfig, Meta(description="Limits of requests in flight.")] = (
        field(default_factory=ActiveLoadConfig)
    )
    load: Annotated[LoadConfig, Meta(description="How load is counted.")] = field(
        default_factory=LoadConfig
    )
    kv: Annotated[KvConfig, Meta(description="The index of the workers' KV pages.")] = field(
        default_factory=KvConfig
    )
    tokenization: Annotated[TokenizationConfig, Meta(description="How prompts become tokens.")] = (
        field(default_factory=TokenizationConfig)
    )
    pd: Annotated[
        PdConfig, Meta(description="Models with separate prefill and decode workers.")
    ] = field(default_factory=PdConfig)
    envoy: Annotated[EnvoyConfig, Meta(description="What `extproc envoy-config` renders.")] = field(
        default_factory=EnvoyConfig
    )

    @property
    def is_disaggregated(self) -> bool:
        """True if the file configures prefill and decode workers; engines may report them, too."""
        configured = any(model.pd != PdModelConfig() for model in self.models)
        return self.discovery.names_roles or configured

    @property
    def fails_open(self) -> bool:
        """True if Envoy serves requests without this service, as far as the file says."""
        return self.envoy.fail_open and len(self.models) == 1 and not self.is_disaggregated

    @property
    def knows_all_workers(self) -> bool:
        """True if the file names all workers, or a host that stands for them."""
        return self.discovery.cluster is None or self.envoy.fail_open_host is not None

    @property
    def destinations_max(self) -> int:
        """How many workers are named in a destination list."""
        return 1 if self.envoy.destination == "single" else 1 + self.proxy.fallback_workers

    @property
    def extra_wait_secs(self) -> float:
        """How much longer than a decision one reply may take.

        With `nixl`, the answer to the prefill has to be in the request that goes on.
        """
        waits = any(model.pd.protocol == "nixl" for model in self.models)
        return self.pd.prefill_timeout_secs if waits else 0.0

    @property
    def decode_silence_secs(self) -> float:
        """How long a decode worker may be silent."""
        return min(self.pd.response_timeout_secs, self.envoy.stream_idle_timeout_secs / 2)

    @property
    def prefill_silence_secs(self) -> float:
        """How long a prefill worker may be silent while the decode worker waits for it."""
        return min(self.pd.prefill_timeout_secs, _PREFILL_SHARE * self.decode_silence_secs)

    @property
    def routing_deadline_secs(self) -> float:
        """Time limit for one reply, including the prefill where the reply waits for it."""
        return self.server.step_deadline_secs + self.extra_wait_secs
