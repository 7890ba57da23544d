"""The configuration of one model: policy, tokenizer, KV events and circuit breaker.

Separate from the rest of the schema because it grows with each policy.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, field

from extproc.config.section import SECONDS, Seconds, Section, Text

__all__ = [
    "TOKEN_POLICIES",
    "CacheAwareConfig",
    "CircuitBreakerConfig",
    "KvEventsConfig",
    "MinTtftConfig",
    "ModelConfig",
    "PdModelConfig",
    "PolicyName",
    "QueueConfig",
    "TokenProofMode",
]

TokenProofMode = Literal["route_by_load", "warn", "off"]
PolicyName = Literal[
    "round_robin", "random", "power_of_two", "least_load", "cache_aware_zmq", "min_ttft"
]
# The policies that need the tokens of a prompt.
TOKEN_POLICIES = ("cache_aware_zmq", "min_ttft")


class CircuitBreakerConfig(Section, frozen=True, kw_only=True):
    threshold: Annotated[
        int, Meta(ge=1, description="Consecutive failures that open a worker's circuit breaker.")
    ] = 3
    cool_down_secs: Annotated[
        float,
        Meta(ge=0, le=86400, description="Time before one probe request may try the worker again."),
    ] = 30 * SECONDS


class CacheAwareConfig(Section, frozen=True, kw_only=True):
    cache_threshold: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="A worker is preferred for the pages it holds if it holds more than this "
            "share of the prompt's whole pages.",
        ),
    ] = 0.5
    balance_abs_threshold: Annotated[
        int,
        Meta(
            ge=0,
            description="Load alone decides if the highest load of a worker exceeds the lowest "
            "by more than this number of requests, and `balance_rel_threshold` is exceeded, too.",
        ),
    ] = 32
    balance_rel_threshold: Annotated[
        float,
        Meta(
            ge=1,
            le=1000,
            description="See `balance_abs_threshold`: the ratio of the highest load to the lowest.",
        ),
    ] = 1.1


class MinTtftConfig(Section, frozen=True, kw_only=True):
    prefill_tokens_per_second: Annotated[
        float,
        Meta(
            ge=1,
            le=1e9,
            description="Prefill speed that is assumed until a worker's own speed is measured.",
        ),
    ] = 8000.0


class KvEventsConfig(Section, frozen=True, kw_only=True):
    url: Annotated[
        str | None,
        Meta(
            description="The worker of this entry; without it, all workers that no other entry "
            "names."
        ),
    ] = None
    endpoint: Annotated[
        Text,
        Meta(
            description="`tcp://host:port` of the publisher of rank 0. Rank r uses the port plus "
            "r. `*` stands for the worker's own host."
        ),
    ]
    replay_endpoint: Annotated[
        str | None,
        Meta(description="Address at which rank 0 answers replay requests, if the engine does so."),
    ] = None
    topic: Annotated[
        str,
        Meta(
            max_length=256, description="Topic of the events, exactly as the engine publishes it."
        ),
    ] = ""
    block_size: Annotated[int, Meta(ge=1, le=65536, description="Tokens in a KV page.")]
    dp_size: Annotated[int, Meta(ge=1, le=1024, description="Data-parallel ranks of a worker.")] = 1


class PdModelConfig(Section, frozen=True, kw_only=True):
    protocol: Annotated[
        Literal["sglang", "nixl"],
        Meta(
            description="How the KV cache goes from the prefill to the decode worker. `sglang`: "
            "both get the request at once and meet in a bootstrap room. `nixl` (vLLM): the "
            "prefill comes first, and its answer goes into the request to the decode worker."
        ),
    ] = "sglang"
    min_prefill_tokens: Annotated[
        int,
        Meta(
            ge=0,
            description="If a decode worker lacks fewer tokens of a prompt than this, it serves "
            "the request without a prefill worker. Only for decode workers that can prefill, "
            "hence with `nixl`; 0 = never.",
        ),
    ] = 0


class QueueConfig(Section, frozen=True, kw_only=True):
    max_requests: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="Most requests that wait in this service while all workers of the model "
            "are full: they have answered 503 or 429, or report waiting requests, or have "
            "`worker_requests_max`. 0 = none waits.",
        ),
    ] = 0
    max_wait_secs: Annotated[
        Seconds,
        Meta(
            description="Longest wait; then the client gets a 503. Must be shorter than "
            "`server.step_deadline_secs`, of which the wait is a part."
        ),
    ] = 3 * SECONDS
    worker_requests_max: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(
            description="A worker with so many requests of this service is full; without a value, "
            "no number is too many.",
        ),
    ] = None
    worker_waiting_max: Annotated[
        int,
        Meta(
            ge=0,
            description="A worker whose engine reports so many waiting requests on each rank is "
            "full. Only engines report that whose KV events are followed.",
        ),
    ] = 8
    tenant_header: Annotated[
        Text,
        Meta(
            description="Request header that names the tenant. Tenants take turns. The gateway "
            "must set it, or clients could claim to be others."
        ),
    ] = "x-tenant-id"
    priority_header: Annotated[
        Text, Meta(description="Request header that names the priority class, as above.")
    ] = "x-request-priority"
    priority_classes: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=64)]],
        Meta(
            max_length=16,
            description="The classes. Each is served before all that follow.",
        ),
    ] = field(default_factory=lambda: ["high", "normal", "low"])
    default_class: Annotated[
        Text, Meta(description="The class of requests that name no class or an unknown one.")
    ] = "normal"


class ModelConfig(Section, frozen=True, kw_only=True):
    id: Annotated[
        Text,
        Meta(
            max_length=256,
            description="Name that clients send as `model`. A worker belongs to the model whose "
            "id it reports as its `served_model_name`.",
        ),
    ]
    policy: Annotated[
        PolicyName, Meta(description="How a worker is chosen among the healthy workers.")
    ] = "round_robin"
    tokenizer_path: Annotated[
        Text | None,
        Meta(
            description="The model's `tokenizer.json`, or the folder that holds it with "
            "`tokenizer_config.json` and chat templates. Needed by `cache_aware_zmq` and "
            "`min_ttft`. With other policies it only serves `/v1/tokenize`."
        ),
    ] = None
    chat_template_name: Annotated[
        Text | None,
        Meta(
            description="Name of the chat template, if there are several; as the engine's "
            "`--hf-chat-template-name`."
        ),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any],
        Meta(
            description="Variables for the chat template that a request does not set itself; as "
            "the engine's `--default-chat-template-kwargs`."
        ),
    ] = field(default_factory=dict)
    token_proof: Annotated[
        TokenProofMode,
        Meta(
            description="Whether workers are asked for the tokens of a handful of short prompts: "
            "when they join, after a restart of their engine, and every 15 minutes. If a worker "
            "computes other tokens than this service, requests of that kind are routed to it by "
            "load (`route_by_load`), or that is only shown and logged (`warn`). `off` asks nothing."
        ),
    ] = "route_by_load"  # noqa: S105 (not a password)
    tokens_from: Annotated[
        Literal["service", "engine"],
        Meta(
            description="With `engine`, a worker is asked for the tokens of a request where this "
            "service cannot make them as the engine does: chats that the engine renders with code "
            "of its own (`rendered_by_engine`; vLLM needs `--enable-scale-out`), and those whose "
            "tokens were found to differ on all workers, see `token_proof`. Such a request waits "
            "for 0.1 s, and for up to 0.5 s with a large body. Without `tokenizer_path`, for "
            "instance for a model that only has a Mistral tokenizer, it is asked for all tokens. "
            "`service` asks no worker."
        ),
    ] = "service"
    engine: Annotated[
        Literal["sglang", "vllm"],
        Meta(
            description="The engine of workers that do not say what they are. It decides how the "
            "prompt of a request becomes tokens."
        ),
    ] = "sglang"
    chat_template_content_format: Annotated[
        Literal["auto", "string", "openai"],
        Meta(
            description="How vLLM gives a message's content to the chat template; as its "
            "`--chat-template-content-format`. Has no effect with SGLang."
        ),
    ] = "auto"
    exclude_tools_when_tool_choice_none: Annotated[
        bool,
        Meta(
            description="vLLM was started with this flag: a `tool_choice` that forbids calls "
            "hides the tools from the model. Has no effect with SGLang."
        ),
    ] = False
    cache_aware: Annotated[
        CacheAwareConfig, Meta(description="Settings of the policy `cache_aware_zmq`.")
    ] = field(default_factory=CacheAwareConfig)
    min_ttft: Annotated[MinTtftConfig, Meta(description="Settings of the policy `min_ttft`.")] = (
        field(default_factory=MinTtftConfig)
    )
    kv_events: Annotated[
        list[KvEventsConfig],
        Meta(
            description="Where workers publish KV events if they do not report it: SGLang in "
            "`/server_info`, vLLM from 0.32 on in `/kv_event_sources`. SGLang's own report takes "
            "precedence, this key takes precedence over vLLM's."
        ),
    ] = field(default_factory=list)
    pd: Annotated[
        PdModelConfig,
        Meta(description="For a model with separate prefill and decode workers."),
    ] = field(default_factory=PdModelConfig)
    first_byte_timeout_secs: Annotated[
        Seconds | None,
        Meta(description="`proxy.first_byte_timeout_secs` of this model."),
    ] = None
    queue: Annotated[
        QueueConfig, Meta(description="What happens while all workers of the model are full.")
    ] = field(default_factory=QueueConfig)
    ready_without_workers: Annotated[
        bool,
        Meta(
            description="The service is ready also while the model has no worker: then its "
            "requests get a 503 and can make an autoscaler start one. Without this, a gateway "
            "sends no requests from which the demand could be seen."
        ),
    ] = False
    circuit_breaker: Annotated[
        CircuitBreakerConfig, Meta(description="When a failing worker gets no more requests.")
    ] = field(default_factory=CircuitBreakerConfig)

    @property
    def proves_tokens(self) -> bool:
        """True if workers are asked for the tokens of probes."""
        return self.policy in TOKEN_POLICIES and self.token_proof != "off"  # noqa: S105

    @property
    def differences_by_load(self) -> bool:
        """True if requests whose tokens differ are routed by load."""
        return self.token_proof == "route_by_load"  # noqa: S105
