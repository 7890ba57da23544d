"""The system's resolver, with names that every machine knows."""

import pytest

from extproc.worker_url import WorkerUrl, parse_worker_url
from extproc.workers.resolver import SystemResolver


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://10.0.0.1:8000", "10.0.0.1:8000"),
        ("http://[2001:db8:0::1]:8000", "[2001:db8::1]:8000"),
        ("https://10.0.0.1", "10.0.0.1:443"),
        ("http://localhost:8000", "127.0.0.1:8000"),
    ],
)
async def test_an_address_is_formatted_as_envoy_formats_it(url: str, address: str) -> None:
    assert await SystemResolver().resolve(parse_worker_url(url)) == (address,)


@pytest.mark.parametrize("host", ["nobody.invalid", "a..b", "x" * 64, "x" * 300])
async def test_a_host_name_that_cannot_be_resolved_has_no_address(host: str) -> None:
    assert await SystemResolver().resolve(WorkerUrl("http", host, 1)) == ()
