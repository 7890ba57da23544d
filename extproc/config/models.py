"""The configuration of one model: its workers' policy, tokens, events and breaker.

Apart from config because it is what grows with each policy.
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, field

from extproc.config.section import SECONDS, Section, Text

__all__ = [
    "TOKEN_POLICIES",
    "CacheAwareConfig",
    "CircuitBreakerConfig",
    "KvEventsConfig",
    "MinTtftConfig",
    "ModelConfig",
    "PdModelConfig",
    "PolicyName",
]

PolicyName = Literal[
    "round_robin", "random", "power_of_two", "least_load", "cache_aware_zmq", "min_ttft"
]
# Those that look at the tokens of a prompt.
TOKEN_POLICIES = ("cache_aware_zmq", "min_ttft")


class CircuitBreakerConfig(Section, frozen=True, kw_only=True):
    threshold: Annotated[
        int, Meta(ge=1, description="Consecutive failures after which a worker is left alone.")
    ] = 3
    cool_down_secs: Annotated[
        float,
        Meta(ge=0, le=86400, description="Time before one probe request may try the worker."),
    ] = 30 * SECONDS


class CacheAwareConfig(Section, frozen=True, kw_only=True):
    cache_threshold: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            description="A worker is preferred for what it holds when it holds more than this "
            "share of the prompt's whole pages.",
        ),
    ] = 0.5
    balance_abs_threshold: Annotated[
        int,
        Meta(
            ge=0,
            description="Load decides alone when the loads of workers, in requests, lie further "
            "apart than this …",
        ),
    ] = 32
    balance_rel_threshold: Annotated[
        float,
        Meta(ge=1, le=1000, description="… and the highest is over so many times the lowest."),
    ] = 1.1


class MinTtftConfig(Section, frozen=True, kw_only=True):
    prefill_tokens_per_second: Annotated[
        float,
        Meta(
            ge=1,
            le=1e9,
            description="Prefill speed assumed of a model's workers until theirs is observed.",
        ),
    ] = 8000.0


class KvEventsConfig(Section, frozen=True, kw_only=True):
    url: Annotated[
        str | None,
        Meta(description="The worker this is for; absent = all that no other entry names."),
    ] = None
    endpoint: Annotated[
        Text,
        Meta(
            description="`tcp://host:port` of rank 0's publisher, rank r uses the port plus r; "
            "`*` stands for the worker's own host."
        ),
    ]
    replay_endpoint: Annotated[
        str | None, Meta(description="Where rank 0 answers replay requests; absent = nowhere.")
    ] = None
    topic: Annotated[
        str, Meta(max_length=256, description="Topic of the events, exactly as published.")
    ] = ""
    block_size: Annotated[int, Meta(ge=1, le=65536, description="Tokens in a KV page.")]
    dp_size: Annotated[int, Meta(ge=1, le=1024, description="Data-parallel ranks of a worker.")] = 1


class PdModelConfig(Section, frozen=True, kw_only=True):
    protocol: Annotated[
        Literal["sglang", "nixl"],
        Meta(
            description="How prefill and decode workers meet: `sglang`, by a bootstrap room, both "
            "at once; `nixl` (vLLM), prefill first, then decode with what it returned."
        ),
    ] = "sglang"
    min_prefill_tokens: Annotated[
        int,
        Meta(
            ge=0,
            description="A prompt of which a decode worker lacks fewer tokens than this goes to "
            "that worker alone. Only where decode workers can prefill, hence with `nixl`; 0 = "
            "never.",
        ),
    ] = 0


class ModelConfig(Section, frozen=True, kw_only=True):
    id: Annotated[
        Text,
        Meta(
            max_length=256,
            description="Name clients send as `model`; a worker belongs to it when it reports "
            "this as its `served_model_name`.",
        ),
    ]
    policy: Annotated[
        PolicyName, Meta(description="How a worker is chosen among the healthy ones.")
    ] = "round_robin"
    tokenizer_path: Annotated[
        Text | None,
        Meta(
            description="The model's `tokenizer.json`, or the folder that holds it with "
            "`tokenizer_config.json` and chat templates. Needed by `cache_aware_zmq` and "
            "`min_ttft`; for other policies it only serves `/v1/tokenize`."
        ),
    ] = None
    chat_template_name: Annotated[
        Text | None,
        Meta(
            description="Which of several chat templates to use, as the engine's "
            "`--hf-chat-template-name`."
        ),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any],
        Meta(
            description="Variables for the chat template where a request does not set them, as "
            "the engine's `--default-chat-template-kwargs`."
        ),
    ] = field(default_factory=dict)
    cache_aware: Annotated[
        CacheAwareConfig, Meta(description="For the policy `cache_aware_zmq`.")
    ] = field(default_factory=CacheAwareConfig)
    min_ttft: Annotated[MinTtftConfig, Meta(description="For the policy `min_ttft`.")] = field(
        default_factory=MinTtftConfig
    )
    kv_events: Annotated[
        list[KvEventsConfig],
        Meta(
            description="Where workers publish KV events that do not say so in `/server_info` "
            "(vLLM); what a worker says itself comes first."
        ),
    ] = field(default_factory=list)
    pd: Annotated[
        PdModelConfig,
        Meta(description="For a model whose workers prefill and decode apart."),
    ] = field(default_factory=PdModelConfig)
    circuit_breaker: Annotated[
        CircuitBreakerConfig, Meta(description="When a failing worker is left alone.")
    ] = field(default_factory=CircuitBreakerConfig)
