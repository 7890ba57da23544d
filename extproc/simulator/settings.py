"""The settings of one simulated worker. They are checked once, here."""

from typing import Literal

import msgspec

from extproc.simulator.vllm_chats import ContentFormat

__all__ = ["DisaggregationMode", "EngineName", "PdProtocol", "SimulatorSettings", "WireFormat"]

EngineName = Literal["sglang", "vllm"]
DisaggregationMode = Literal["null", "prefill", "decode"]
PdProtocol = Literal["sglang", "nixl"]
WireFormat = Literal["map", "array"]

_BIGRAM_ALGORITHMS = ("EAGLE", "EAGLE3", "FROZEN_KV_MTP")


class SimulatorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One worker: where it listens, what it serves and how fast it is.

    `engine` is the one that the worker resembles: its paths, its KV events, its cache and what it
    makes of a chat. `port` 0 picks a free one. `model` is the served name. `no_server_info` makes
    a worker like SGLang answer 404 to introspection. While `startup_delay_seconds` have not
    passed, health, introspection and inference answer 503.

    KV events are published when `kv_events_port` is given, and by a worker like SGLang load, too.
    Rank r uses each of the three ports plus r; 0 picks free ones. `wire_format` "array" is the
    format of older versions of SGLang; their replays have no topic frame.

    `lora` are the adapters that are loaded at the start. A worker like vLLM serves them as models
    of their own, one like SGLang as `model:adapter`; without any, the latter takes every adapter
    and its list is empty. `dev_mode` brings the paths of vLLM's development mode.
    `content_format` overrides how a chat template is given contents.

    A "prefill" worker listens at `disaggregation_bootstrap_port`, which is also where a "decode"
    worker looks for the other leg of a request that names no port. With `pd_protocol` "nixl", as
    in vLLM, every worker listens at `nixl_side_channel_port` and runs both legs. 0 picks free
    ports. The legs wait `bootstrap_timeout_seconds` for each other.

    `tokenizer_path` names a `tokenizer.json`, or a model's folder with one, whose chat template
    is then applied to chats. Without it a token is a byte.

    Raises ValueError, which names the setting, for an invalid value.
    """

    host: str = "127.0.0.1"
    port: int = 0
    engine: EngineName = "sglang"
    model: str = "simulated-model"
    prefill_tokens_per_second: float = 8000.0
    decode_milliseconds_per_token: float = 20.0
    max_running_requests: int = 32  # of each rank; further requests wait in its queue
    max_queued_requests: int = 1_000_000  # of each rank; further requests get a 503
    default_max_tokens: int = 64
    max_total_num_tokens: int = 524_288  # the prefix cache of each rank
    host_cache_tokens: int = 0  # of each rank, for evicted pages; 0 means no host cache
    context_length: int = 131_072  # reported only
    page_size: int = 64
    dp_size: int = 1
    disaggregation_mode: DisaggregationMode = "null"
    disaggregation_bootstrap_port: int = 8998
    pd_protocol: PdProtocol = "sglang"
    bootstrap_timeout_seconds: float = 300.0
    nixl_side_channel_port: int = 0
    speculative_algorithm: str | None = None  # of the EAGLE family: pages hold bigrams
    tokenizer_path: str | None = None  # a tokenizer.json or a folder; None: bytes
    kv_events_port: int | None = None
    kv_replay_port: int = 0
    kv_load_port: int = 0
    no_replay: bool = False
    no_load_events: bool = False
    wire_format: WireFormat = "map"
    kv_topic: str = ""
    lora: list[str] = []
    dev_mode: bool = False
    content_format: ContentFormat | None = None
    sliding_window: int | None = None  # in tokens, of half of the layers
    api_key: str | None = None
    startup_delay_seconds: float = 0.0
    log_requests: bool = False
    no_server_info: bool = False

    def __post_init__(self) -> None:
        for name in (
            "port",
            "kv_events_port",
            "kv_replay_port",
            "kv_load_port",
            "disaggregation_bootstrap_port",
            "nixl_side_channel_port",
        ):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65_535:
                raise ValueError(f"{name}: {port} is not between 0 and 65535")
        if not self.model:
            raise ValueError("model: a name is needed")
        for name in ("prefill_tokens_per_second", "bootstrap_timeout_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be above 0")
        for name in (
            "decode_milliseconds_per_token",
            "startup_delay_seconds",
            "host_cache_tokens",
            "max_queued_requests",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative")
        for name in (
            "max_running_requests",
            "default_max_tokens",
            "max_total_num_tokens",
            "context_length",
            "page_size",
            "dp_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1")
        self._check_engine()
        if self.api_key is not None and not self.api_key:
            raise ValueError("api_key: must not be empty; leave it out for an open worker")

    def _check_engine(self) -> None:
        if self.is_vllm:
            if self.host_cache_tokens:
                raise ValueError("host_cache_tokens: a worker like vllm has no host cache")
            if self.sliding_window is not None and self.sliding_window < 1:
                raise ValueError("sliding_window: must be at least 1")
            return
        for name in ("dev_mode", "content_format", "sliding_window"):
            if getattr(self, name):
                raise ValueError(f"{name}: needs engine vllm")

    @property
    def is_vllm(self) -> bool:
        return self.engine == "vllm"

    @property
    def blocks(self) -> int:
        """The number of pages that a rank's cache holds."""
        return self.max_total_num_tokens // self.page_size

    @property
    def caches_bigrams(self) -> bool:
        """True if pages are made of pairs of tokens."""
        name = self.speculative_algorithm
        return name is not None and name.upper() in _BIGRAM_ALGORITHMS
