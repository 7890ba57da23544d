"""Where a worker publishes KV events: by its answer, by the configuration, or nowhere."""

from typing import Any

import pytest

from extproc.config.models import KvEventsConfig
from extproc.worker_url import parse_worker_url
from extproc.workers.kv_announcement import configured_kv_events, read_kv_events
from extproc.workers.worker import KvEvents

URL = parse_worker_url("http://10.0.0.7:30000")
BLOCK: dict[str, Any] = {
    "publisher": "zmq",
    "endpoint_host": "*",
    "endpoint_port_base": 5557,
    "topic": "",
    "block_size": 64,
    "dp_size": 2,
    "replay_endpoint_port_base": 5600,
    "load_endpoint_port_base": 5700,
    "load_topic": "load",
}


def test_the_kv_events_block_of_an_engine_is_read() -> None:
    assert read_kv_events(BLOCK, None, URL, 64) == KvEvents(
        host="10.0.0.7",
        port=5557,
        block_size=64,
        dp_size=2,
        replay_port=5600,
        load_port=5700,
    )


@pytest.mark.parametrize("host", ["*", "0.0.0.0", "::", "169.254.169.254", "evil", 5])
def test_the_host_is_always_that_of_the_url(host: object) -> None:
    found = read_kv_events(BLOCK | {"endpoint_host": host}, None, URL, 64)
    assert found is not None
    assert found.host == "10.0.0.7"


def test_ports_for_replay_and_load_are_optional() -> None:
    block = {key: BLOCK[key] for key in ("endpoint_port_base", "block_size", "dp_size")}
    found = read_kv_events(block | {"load_endpoint_port_base": None}, None, URL, 64)
    assert found == KvEvents(host="10.0.0.7", port=5557, block_size=64, dp_size=2)


@pytest.mark.parametrize(
    ("algorithm", "bigram"),
    [
        ("EAGLE", True),
        ("eagle3", True),
        ("FROZEN_KV_MTP", True),
        ("NEXTN", False),
        (None, False),
        (5, False),
    ],
)
def test_some_speculative_algorithms_publish_pages_of_token_pairs(
    algorithm: object, bigram: bool
) -> None:
    found = read_kv_events(BLOCK, algorithm, URL, 64)
    assert found is not None
    assert found.bigram is bigram


def test_an_engine_without_kv_events_announces_no_endpoint() -> None:
    assert read_kv_events(None, "EAGLE", URL, 64) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ([], "kv_events"),
        ("on", "kv_events"),
        ({"endpoint_port_base": None}, "endpoint_port_base"),
        ({"endpoint_port_base": "5557"}, "endpoint_port_base"),
        ({"endpoint_port_base": True}, "endpoint_port_base"),
        ({"endpoint_port_base": 65_535}, "endpoint_port_base"),  # rank 1 has no port
        ({"block_size": 0}, "block_size"),
        ({"block_size": 1.5}, "block_size"),
        ({"block_size": 1 << 40}, "block_size"),
        ({"dp_size": 0}, "dp_size"),
        ({"dp_size": 65}, "dp_size is not a number from 1 to 64"),
        ({"dp_size": 100_000}, "dp_size"),
        ({"replay_endpoint_port_base": 0}, "replay_endpoint_port_base"),
        ({"topic": 5}, "topic"),
        ({"topic": "x" * 10_000}, "topic"),
        ({"load_topic": None}, "load_topic"),
    ],
)
def test_the_error_names_the_field_that_cannot_be_used(change: Any, named: str) -> None:
    block = BLOCK | change if isinstance(change, dict) else change
    with pytest.raises(ValueError, match=named):
        read_kv_events(block, None, URL, 64)


def entry(**fields: Any) -> KvEventsConfig:
    given: dict[str, Any] = {"endpoint": "tcp://*:5557", "block_size": 16} | fields
    return KvEventsConfig(**given)


def test_a_worker_without_kv_events_gets_the_configured_ones() -> None:
    found = configured_kv_events(
        [entry(replay_endpoint="tcp://*:5558", topic="kv@m", dp_size=2)], URL
    )
    assert found == KvEvents(
        host="10.0.0.7", port=5557, block_size=16, topic="kv@m", dp_size=2, replay_port=5558
    )


def test_an_entry_with_the_url_of_the_worker_comes_first() -> None:
    own = entry(url="http://10.0.0.7:30000/", endpoint="tcp://10.9.9.9:7000")
    general = entry()
    for entries in ([general, own], [own, general]):
        found = configured_kv_events(entries, URL)
        assert found is not None
        assert (found.host, found.port) == ("10.9.9.9", 7000)
    other = parse_worker_url("http://10.0.0.8:30000")
    assert configured_kv_events([own], other) is None
