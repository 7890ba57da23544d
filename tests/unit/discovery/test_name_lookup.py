"""Lookups against a real name server on loopback."""

from collections.abc import AsyncIterator
from pathlib import Path

import dns.rcode
import pytest

from extproc.config.schema import DnsLookupFamily
from extproc.discovery.name_lookup import Addresses, LookupFailedError, ServerLookup
from tests.dns_server import NameServer, name_server


@pytest.fixture
async def server() -> AsyncIterator[NameServer]:
    async with name_server() as found:
        found.ttl = 7
        yield found


def lookup(
    server: NameServer,
    folder: Path,
    family: DnsLookupFamily = "v4_preferred",
    hosts: str = "",
    resolv_conf: str = "",
) -> ServerLookup:
    for name, text in (("hosts", hosts), ("resolv.conf", resolv_conf)):
        (folder / name).write_text(text)
    servers = [("127.0.0.1", server.port)]
    return ServerLookup(family, servers, folder / "hosts", folder / "resolv.conf")


async def failure(found: ServerLookup, name: str) -> str:
    with pytest.raises(LookupFailedError) as caught:
        await found.find(name)
    assert caught.value.detail
    return caught.value.reason


async def test_all_addresses_are_found_in_order_with_their_time_to_live(
    server: NameServer, tmp_path: Path
) -> None:
    server.records["w.test"] = {"A": ["10.0.0.10", "10.0.0.9", "10.0.0.9"]}
    found = await lookup(server, tmp_path).find("w.test")
    assert found == Addresses(("10.0.0.9", "10.0.0.10"), 7.0)


async def test_an_alias_is_followed(server: NameServer, tmp_path: Path) -> None:
    server.records = {"a.test": {"CNAME": ["w.test."]}, "w.test": {"A": ["10.0.0.1"]}}
    assert (await lookup(server, tmp_path).find("a.test")).hosts == ("10.0.0.1",)


@pytest.mark.parametrize(
    ("family", "hosts"),
    [
        ("v4_preferred", ("10.0.0.1",)),
        ("v6_preferred", ("2001:db8::1",)),
        ("v4_only", ("10.0.0.1",)),
        ("v6_only", ("2001:db8::1",)),
    ],
)
async def test_a_worker_with_both_families_is_one_worker(
    server: NameServer, tmp_path: Path, family: DnsLookupFamily, hosts: tuple[str, ...]
) -> None:
    server.records["w.test"] = {"A": ["10.0.0.1"], "AAAA": ["2001:db8::1"]}
    assert (await lookup(server, tmp_path, family).find("w.test")).hosts == hosts


async def test_the_second_family_counts_only_if_there_is_no_address_of_the_first(
    server: NameServer, tmp_path: Path
) -> None:
    server.records["w.test"] = {"AAAA": ["2001:db8::1"]}
    found = lookup(server, tmp_path)
    assert (await found.find("w.test")).hosts == ("2001:db8::1",)
    only = lookup(server, tmp_path, "v4_only")
    assert await failure(only, "w.test") == "no_addresses"
    server.code = dns.rcode.SERVFAIL
    server.asked.clear()
    assert await failure(found, "w.test") == "server_error"
    assert not [kind for _, kind in server.asked if kind == "AAAA"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (dns.rcode.SERVFAIL, "server_error"),
        (dns.rcode.REFUSED, "refused"),
        (dns.rcode.NXDOMAIN, "name_not_found"),
        (dns.rcode.FORMERR, "invalid"),
    ],
)
async def test_a_failure_has_a_reason(
    server: NameServer, tmp_path: Path, code: dns.rcode.Rcode, reason: str
) -> None:
    server.code = code
    assert await failure(lookup(server, tmp_path), "w.test") == reason


async def test_a_name_without_addresses_that_can_be_used(
    server: NameServer, tmp_path: Path
) -> None:
    found = lookup(server, tmp_path)
    assert await failure(found, "w.test") == "name_not_found"
    server.records["w.test"] = {"TXT": ["x"]}
    assert await failure(found, "w.test") == "no_addresses"
    server.records["w.test"] = {"A": ["0.0.0.0", "224.0.0.1"], "AAAA": ["::", "fe80::1", "ff02::1"]}
    assert await failure(found, "w.test") == "no_addresses"


async def test_a_silent_server_is_a_time_out(
    server: NameServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extproc.discovery.name_lookup._LIFETIME_SECONDS", 0.3)
    server.is_silent = True
    assert await failure(lookup(server, tmp_path), "w.test") == "timeout"


async def test_a_large_answer_comes_over_tcp(server: NameServer, tmp_path: Path) -> None:
    many = [f"10.0.{high}.{low}" for high in range(4) for low in range(250)]
    server.records["w.test"] = {"A": many}
    found = await lookup(server, tmp_path).find("w.test")
    assert len(found.hosts) == 1000
    assert server.over_tcp == 1


async def test_search_domains_count(server: NameServer, tmp_path: Path) -> None:
    server.records["w.ns.svc.test"] = {"A": ["10.0.0.1"]}
    conf = "search svc.test ns.svc.test\noptions ndots:5\n"
    found = lookup(server, tmp_path, resolv_conf=conf)
    assert (await found.find("w")).hosts == ("10.0.0.1",)
    assert list(server.asked) == [("w.svc.test", "A"), ("w.ns.svc.test", "A")]
    # With a dot at the end there is nothing to search for.
    server.asked.clear()
    assert (await found.find("w.ns.svc.test.")).hosts == ("10.0.0.1",)
    assert list(server.asked) == [("w.ns.svc.test", "A")]


async def test_the_hosts_file_comes_first_and_its_changes_are_seen(
    server: NameServer, tmp_path: Path
) -> None:
    text = (
        "# text\n10.0.0.1 W.test other # w2.test\nnonsense w.test\n10.0.0.2\tw.test.\n::1 v6.test\n"
    )
    found = lookup(server, tmp_path, hosts=text)
    assert await found.find("w.TEST.") == Addresses(("10.0.0.1", "10.0.0.2"), None)
    assert (await found.find("v6.test")).hosts == ("::1",)
    assert not server.asked
    assert await failure(found, "w2.test") == "name_not_found"
    (tmp_path / "hosts").write_text("10.0.0.3 w.test\n")
    assert (await found.find("w.test")).hosts == ("10.0.0.3",)
    (tmp_path / "hosts").unlink()
    assert await failure(found, "w.test") == "name_not_found"


@pytest.mark.parametrize("text", [None, "", "nameserver nonsense\n"])
async def test_a_resolv_conf_without_a_server_is_read_again_when_it_changes(
    tmp_path: Path, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "resolv.conf"
    if text is not None:
        path.write_text(text)
    found = ServerLookup("v4_preferred", [], tmp_path / "hosts", path)
    with pytest.raises(LookupFailedError, match=r"unreachable: .* names no server"):
        await found.find("w.test")
    path.write_text("nameserver 127.0.0.77\n")
    monkeypatch.setattr("extproc.discovery.name_lookup._LIFETIME_SECONDS", 0.3)
    with pytest.raises(LookupFailedError) as caught:
        await found.find("w.test")
    assert "names no server" not in caught.value.detail
