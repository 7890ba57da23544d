"""The system's resolver, with names that every machine knows."""

from socket import AF_INET, AF_INET6

import pytest

from extproc.config.schema import DnsLookupFamily
from extproc.worker_url import WorkerUrl, parse_worker_url
from extproc.workers.resolver import SystemResolver, of_one_family


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


@pytest.mark.parametrize(
    ("family", "addresses"),
    [
        ("v4_preferred", ["10.0.0.1", "10.0.0.2"]),
        ("v4_only", ["10.0.0.1", "10.0.0.2"]),
        ("v6_preferred", ["fe80::1"]),
        ("v6_only", ["fe80::1"]),
    ],
)
def test_addresses_are_of_the_family_that_envoy_uses(
    family: DnsLookupFamily, addresses: list[str]
) -> None:
    answers = {(AF_INET, "10.0.0.2"), (AF_INET, "10.0.0.1"), (AF_INET6, "fe80::1%eth0")}
    assert of_one_family(answers, family) == addresses


@pytest.mark.parametrize(
    ("family", "addresses"),
    [
        ("v4_preferred", ["::1"]),
        ("v4_only", []),
        ("v6_preferred", ["::1"]),
        ("v6_only", ["::1"]),
    ],
)
def test_a_preferred_family_without_an_address_gives_way(
    family: DnsLookupFamily, addresses: list[str]
) -> None:
    assert of_one_family({(AF_INET6, "::1")}, family) == addresses
