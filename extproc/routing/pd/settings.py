"""The part of the configuration that routing to prefill and decode workers needs."""

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from extproc.config.schema import Config

__all__ = ["PdSettings"]

# Of the time for a decision: how long one prefill worker may take to accept a connection.
_CONNECT_SHARE: Final = 0.3


class PdSettings(Struct, frozen=True, kw_only=True):
    """`protocols` and `min_prefill_tokens` are by model id.

    `inline`: the first pass picks the decode worker, too. `decode_attempts` bounds how many decode
    workers are tried for one request; 0 is taken as 1. `authorization` replaces the client's
    header in requests to prefill workers.
    """

    inline: bool
    protocols: Mapping[str, str]
    min_prefill_tokens: Mapping[str, int]
    decode_attempts: int
    connect_seconds: float
    prefill_seconds: float
    kv_seconds: float
    linger_seconds: float
    request_timeout_ms: int
    authorization: str | None = None

    @classmethod
    def of(cls, config: Config, authorization: str | None) -> "PdSettings":
        pd, proxy = config.pd, config.proxy
        estimated = config.load.release == "estimate"
        return cls(
            inline=pd.decode == "inline",
            protocols={model.id: model.pd.protocol for model in config.models},
            min_prefill_tokens={model.id: model.pd.min_prefill_tokens for model in config.models},
            decode_attempts=config.destinations_max,
            connect_seconds=min(
                proxy.connect_timeout_secs, config.server.step_deadline_secs * _CONNECT_SHARE
            ),
            prefill_seconds=config.prefill_silence_secs,
            kv_seconds=pd.prefill_timeout_secs,
            # Where a gateway ends our stream at the response headers, we do not see the end of
            # a good response.
            linger_seconds=pd.prefill_timeout_secs if estimated else pd.prefill_linger_secs,
            request_timeout_ms=max(1, round(proxy.request_timeout_secs * 1000)),
            authorization=authorization,
        )
