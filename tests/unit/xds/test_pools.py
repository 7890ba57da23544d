"""Which workers are in which cluster."""

from extproc.envoy_config.endpoints import Endpoint
from extproc.workers.registry import WorkerRegistry
from extproc.workers.worker import Worker
from extproc.xds.pools import Members, Pools
from tests.builders import make_worker

ONE, TWO = Endpoint("10.0.0.1:80", "http://10.0.0.1:80"), Endpoint("10.0.0.2:80", "http://b:80")
MODELS = {"m": False, "n": False}


def registry(*workers: Worker) -> WorkerRegistry:
    found = WorkerRegistry()
    for worker in workers:
        found.upsert(worker)
    return found


def worker(role: str = "plain", *models: str, at: Endpoint = ONE, uid: str | None = None) -> Worker:
    return make_worker(at.url, id=uid, role=role, model_ids=models or ("m",))  # type: ignore[arg-type]


def test_each_model_and_role_has_a_cluster_of_its_own() -> None:
    pools = Pools(0.5)
    workers = registry(worker("prefill"), worker("decode", at=Endpoint("b:80", "http://b:80")))
    assert pools.look(MODELS, workers, 0.0) == {
        ("m", "decode"): Members({Endpoint("b:80", "http://b:80"): False}),
        ("m", "prefill"): Members({ONE: False}),
        ("n", "plain"): Members({}),
    }


def test_a_worker_is_in_the_clusters_of_its_models_and_of_no_others() -> None:
    pools = Pools(0.5)
    workers = registry(worker("plain", "m", "n"), worker("plain", "o", uid="other"))
    found = pools.look(MODELS, workers, 0.0)
    assert found == {("m", "plain"): Members({ONE: False}), ("n", "plain"): Members({ONE: False})}


def test_a_worker_without_an_address_is_in_no_cluster() -> None:
    workers = registry(make_worker(resolved=False))
    assert Pools(0.5).look({"m": False}, workers, 0.0) == {("m", "plain"): Members({})}


def test_of_two_workers_at_an_address_the_one_that_serves_counts() -> None:
    ending, new = worker(uid="1"), worker(uid="2")
    workers = registry(ending, new)
    workers.set_draining(ending, True)
    found = Pools(0.5).look({"m": False}, workers, 0.0)
    assert found == {("m", "plain"): Members({ONE: False})}
    workers.set_draining(new, True)
    found = Pools(0.5).look({"m": False}, workers, 0.0)
    assert found == {("m", "plain"): Members({ONE: True})}


def test_a_worker_that_left_is_draining_for_a_moment() -> None:
    pools, pool = Pools(0.5), ("m", "plain")
    assert pools.until_next_leaves(0.0) is None
    pools.look({"m": False}, registry(worker()), 0.0)
    left = {pool: Members({ONE: True}, frozenset({ONE}))}
    assert pools.look({"m": False}, registry(), 1.0) == left
    assert pools.until_next_leaves(1.25) == 0.25
    assert pools.look({"m": False}, registry(), 1.5) == {pool: Members({})}
    assert pools.until_next_leaves(1.5) is None


def test_a_worker_that_comes_back_in_time_has_not_left() -> None:
    pools = Pools(0.5)
    pools.look({"m": False}, registry(worker()), 0.0)
    pools.look({"m": False}, registry(), 1.0)
    found = pools.look({"m": False}, registry(worker()), 1.2)
    assert found == {("m", "plain"): Members({ONE: False})}
    assert pools.until_next_leaves(1.2) is None


def test_a_worker_that_changes_its_role_leaves_one_cluster_and_joins_the_other() -> None:
    pools = Pools(0.5)
    pools.look({"m": False}, registry(worker("prefill")), 0.0)
    assert pools.look({"m": False}, registry(worker("decode")), 1.0) == {
        ("m", "decode"): Members({ONE: False}),
        ("m", "prefill"): Members({ONE: True}, frozenset({ONE})),
    }


def test_a_model_without_workers_keeps_its_clusters() -> None:
    pools = Pools(0.5)
    both = [("m", "decode"), ("m", "prefill")]
    assert list(pools.look({"m": True}, registry(), 0.0)) == both
    assert list(pools.look({"m": True}, registry(worker()), 1.0)) == [("m", "plain")]
    pools.look({"m": True}, registry(), 2.0)
    assert list(pools.look({"m": True}, registry(), 3.0)) == [("m", "plain")]


def test_the_clusters_of_a_model_go_with_it() -> None:
    pools = Pools(0.5)
    pools.look(MODELS, registry(worker("plain", "n")), 0.0)
    assert list(pools.look({"m": False}, registry(worker("plain", "n")), 1.0)) == [("m", "plain")]
