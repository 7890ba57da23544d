"""Where a worker publishes KV events: from its `/server_info`, else from the configuration.

An answer never sets the host, which is that of the worker's URL. Engines announce the address
that they bind to, mostly a wildcard, and no answer may make this service connect to another
host.
"""

from collections.abc import Sequence
from typing import Any, Final

from extproc.config.models import KvEventsConfig
from extproc.worker_url import WorkerUrl, parse_kv_endpoint, parse_worker_url
from extproc.workers.worker import KvEvents

__all__ = ["configured_kv_events", "read_kv_events"]

_PORT_MAX: Final = 65_535
_BLOCK_MAX: Final = 65_536
_TOPIC_MAX_CHARS: Final = 256
# With these draft models SGLang caches pages of token pairs.
_BIGRAM_ALGORITHMS: Final = frozenset(("EAGLE", "EAGLE3", "FROZEN_KV_MTP"))


def read_kv_events(block: Any, algorithm: Any, url: WorkerUrl, ranks_max: int) -> KvEvents | None:
    """Read the fields `kv_events` (`block`) and `speculative_algorithm` of an answer.

    More than `ranks_max` ranks are not followed, since each of them takes sockets. Returns None if
    the worker publishes no events. Raises ValueError, which says what is wrong with the block.
    """
    if block is None:
        return None
    if not isinstance(block, dict):
        raise ValueError("kv_events is not an object")
    ranks = _number(block, "dp_size", ranks_max, default=1)
    return KvEvents(
        host=url.host,
        port=_port(block, "endpoint_port_base", ranks),
        block_size=_number(block, "block_size", _BLOCK_MAX),
        topic=_topic(block, "topic", ""),
        dp_size=ranks,
        replay_port=_optional_port(block, "replay_endpoint_port_base", ranks),
        load_port=_optional_port(block, "load_endpoint_port_base", ranks),
        load_topic=_topic(block, "load_topic", "load"),
        bigram=isinstance(algorithm, str) and algorithm.upper() in _BIGRAM_ALGORITHMS,
    )


def configured_kv_events(entries: Sequence[KvEventsConfig], url: WorkerUrl) -> KvEvents | None:
    """What the configuration says about this worker; an entry with its URL comes first."""
    best: KvEventsConfig | None = None
    for entry in entries:
        if entry.url is None:
            best = best or entry
        elif parse_worker_url(entry.url) == url:
            best = entry
            break
    if best is None:
        return None
    host, port = parse_kv_endpoint(best.endpoint)
    replay = None
    if best.replay_endpoint is not None:
        replay = parse_kv_endpoint(best.replay_endpoint)[1]
    return KvEvents(
        host=host or url.host,
        port=port,
        block_size=best.block_size,
        topic=best.topic,
        dp_size=best.dp_size,
        replay_port=replay,
    )


def _number(block: dict[str, Any], name: str, highest: int, default: int | None = None) -> int:
    value = block.get(name, default)
    if type(value) is not int or not 1 <= value <= highest:
        raise ValueError(f"kv_events.{name} is not a number from 1 to {highest}")
    return value


def _port(block: dict[str, Any], name: str, ranks: int) -> int:
    return _number(block, name, _PORT_MAX - ranks + 1)


def _optional_port(block: dict[str, Any], name: str, ranks: int) -> int | None:
    return None if block.get(name) is None else _port(block, name, ranks)


def _topic(block: dict[str, Any], name: str, default: str) -> str:
    value = block.get(name, default)
    if not isinstance(value, str) or len(value) > _TOPIC_MAX_CHARS:
        raise ValueError(f"kv_events.{name} is not a short text")
    return value
