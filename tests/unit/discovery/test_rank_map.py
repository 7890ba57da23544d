"""Which pods of a group have the ranks of its worker."""

from extproc.discovery.rank_map import RankMap
from extproc.discovery.worker_union import Reading, Sighting
from extproc.worker_url import parse_worker_url
from extproc.workers.worker import WorkerSpec

GROUP = "ns/g"


def leader(draining: bool = False, group: str = GROUP, **hosts: str) -> Reading:
    spec = WorkerSpec(id="u:8000", url=parse_worker_url("http://10.0.0.1:8000"))
    return Reading([Sighting(spec, draining)], group=group, rank_hosts=ranks(hosts))


def part(group: str = GROUP, **hosts: str) -> Reading:
    return Reading(group=group, rank_hosts=ranks(hosts))


def ranks(hosts: dict[str, str]) -> dict[int, str]:
    """`r3="a"` means that rank 3 is at the address a."""
    return {int(name[1:]): host for name, host in hosts.items()}


def hosts_in(reading: Reading) -> dict[int, str]:
    (one,) = reading.sightings
    return dict(one.spec.rank_hosts)


def test_a_list_gives_the_leader_the_ranks_of_all_pods_of_its_group() -> None:
    readings = {"l": leader(r0="a"), "p": part(r1="b", r2="b"), "q": part("ns/other", r3="c")}
    found = RankMap().replace(readings)
    assert hosts_in(found["l"]) == {0: "a", 1: "b", 2: "b"}
    assert (found["p"], found["q"]) == (readings["p"], readings["q"])


def test_readings_without_a_group_pass_unchanged() -> None:
    one = leader(group="")
    found = RankMap()
    assert found.replace({"l": one}) == {"l": one}
    assert found.put("l", one) == {"l": one}


def test_a_pod_that_comes_moves_or_goes_changes_the_leader() -> None:
    found = RankMap()
    found.replace({"l": leader(r0="a")})
    assert hosts_in(found.put("p", part(r1="b"))["l"]) == {0: "a", 1: "b"}
    assert hosts_in(found.put("p", part(r1="c"))["l"]) == {0: "a", 1: "c"}
    assert hosts_in(found.put("p", part("ns/other", r1="c"))["l"]) == {0: "a"}
    assert hosts_in(found.put("p", part(r1="c"))["l"]) == {0: "a", 1: "c"}
    assert hosts_in(found.put("p", Reading())["l"]) == {0: "a"}
    assert found.put("x", Reading()) == {"x": Reading()}


def test_a_rank_that_two_addresses_claim_is_at_neither() -> None:
    found = RankMap()
    found.replace({"l": leader(r0="a"), "p": part(r1="b"), "q": part(r1="c", r2="c")})
    assert hosts_in(found.put("l", leader(r0="a"))["l"]) == {0: "a", 2: "c"}
    assert hosts_in(found.put("p", Reading())["l"]) == {0: "a", 1: "c", 2: "c"}


def test_a_draining_worker_keeps_its_ranks_while_its_pods_end() -> None:
    found = RankMap()
    found.replace({"l": leader(r0="a"), "p": part(r1="b")})
    assert hosts_in(found.put("l", leader(draining=True, r0="a"))["l"]) == {0: "a", 1: "b"}
    assert hosts_in(found.put("p", Reading())["l"]) == {0: "a", 1: "b"}
    again = found.replace({"l": leader(draining=True, r0="a")})
    assert hosts_in(again["l"]) == {0: "a", 1: "b"}


def test_a_list_forgets_what_it_does_not_name() -> None:
    found = RankMap()
    found.replace({"l": leader(r0="a"), "p": part(r1="b")})
    assert hosts_in(found.replace({"l": leader(r0="a")})["l"]) == {0: "a"}
    found.replace({})
    assert hosts_in(found.put("l", leader(draining=True, r0="z"))["l"]) == {0: "z"}
