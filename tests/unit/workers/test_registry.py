"""Look-ups of workers by id, by model in a stable order, and by the address in Envoy."""

import pytest

from extproc.workers.registry import MixedRolesError, WorkerRegistry
from extproc.workers.worker import Role, Worker
from tests.builders import make_spec, make_worker

ROLES_OF_A_PD_MODEL: tuple[Role, ...] = ("decode", "prefill", "decode")
A, B, C = (f"http://10.0.0.{n}:8000" for n in (1, 2, 3))


def registry(*workers: Worker) -> WorkerRegistry:
    made = WorkerRegistry()
    for worker in workers:
        made.upsert(worker)
    return made


def snapshot(workers: WorkerRegistry) -> tuple[list[str], dict[str, list[str]]]:
    pools = {
        model: [worker.url for worker in workers.pool_of(model, "plain")] for model in ("m", "n")
    }
    return [worker.url for worker in workers], pools


def test_an_empty_registry_has_no_workers() -> None:
    workers = WorkerRegistry()
    assert len(workers) == 0
    assert workers.pool_of("m", "plain") == ()
    assert workers.get("x") is None
    assert workers.at_address("10.0.0.1:8000") is None
    assert workers.remove("x") is None


def test_a_worker_with_the_same_id_replaces_the_old_one_everywhere() -> None:
    workers = registry(make_worker(A, id="pod", model_ids=("m",)))
    new = make_worker(B, id="pod", model_ids=("n",))
    workers.upsert(new)
    assert len(workers) == 1
    assert workers.pool_of("m", "plain") == ()
    assert workers.pool_of("n", "plain") == (new,)
    assert workers.at_address("10.0.0.1:8000") is None
    assert workers.at_address("10.0.0.2:8000") is new


def test_a_pool_is_in_order_of_registration() -> None:
    a, b, c = (make_worker(url, order=n) for n, url in enumerate((A, B, C)))
    workers = registry(c, a, b)
    assert workers.pool_of("m", "plain") == (a, b, c)
    again = make_worker(A, order=0)
    workers.upsert(again)
    assert workers.pool_of("m", "plain") == (again, b, c)


def test_a_worker_of_several_models_is_in_each_pool() -> None:
    worker = make_worker(A, model_ids=("m", "n"))
    workers = registry(worker)
    assert workers.pool_of("m", "plain") == workers.pool_of("n", "plain") == (worker,)
    workers.remove(worker.id)
    assert workers.pool_of("m", "plain") == workers.pool_of("n", "plain") == ()


def test_a_worker_without_a_model_is_registered_but_in_no_pool() -> None:
    worker = make_worker(A, model_ids=())
    workers = registry(worker)
    assert workers.get(worker.id) is worker
    assert workers.pool_of("", "plain") == ()
    assert workers.at_address("10.0.0.1:8000") is worker


def test_a_worker_without_an_address_is_not_in_the_pool() -> None:
    worker = make_worker("http://name:8000", resolved=False)
    workers = registry(worker)
    assert workers.pool_of("m", "plain") == ()
    worker.address = "10.0.0.9:8000"
    workers.reindex()
    assert workers.pool_of("m", "plain") == (worker,)
    assert workers.at_address("10.0.0.9:8000") is worker


def test_an_ipv6_worker_is_found_by_its_bracketed_address() -> None:
    worker = make_worker("http://[2001:db8:0::1]:8000")
    assert registry(worker).at_address("[2001:db8::1]:8000") is worker


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_workers_of_a_pd_pool_serve_no_plain_request(role: Role) -> None:
    assert registry(make_worker(role=role)).pool_of("m", "plain") == ()


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ("plain", "plain", False),
        ("plain", "prefill", True),
        ("plain", "decode", True),
        ("prefill", "plain", True),
        ("decode", "plain", True),
        ("prefill", "decode", False),
        ("prefill", "prefill", False),
    ],
)
def test_plain_and_pd_workers_of_a_model_do_not_mix(
    first: Role, second: Role, refused: bool
) -> None:
    workers = registry(make_worker(A, role=first))
    before = snapshot(workers)
    joining = make_worker(B, order=1, role=second)
    if not refused:
        workers.upsert(joining)
        assert len(workers) == 2
        return
    with pytest.raises(MixedRolesError) as caught:
        workers.upsert(joining)
    assert caught.value.model == "m"
    assert snapshot(workers) == before
    assert workers.get(joining.id) is None
    assert workers.at_address("10.0.0.2:8000") is None


def test_a_refused_replacement_leaves_the_old_worker() -> None:
    old = make_worker(A, id="pod", order=0, model_ids=("n",))
    workers = registry(old, make_worker(B, order=1, model_ids=("m",)))
    with pytest.raises(MixedRolesError):
        workers.upsert(make_worker(C, id="pod", role="prefill", model_ids=("n", "m")))
    assert workers.get("pod") is old
    assert workers.pool_of("n", "plain") == (old,)


def test_each_role_has_its_pool_in_order_of_registration() -> None:
    d1, p1, d2 = (
        make_worker(url, order=n, role=role)
        for n, (url, role) in enumerate(zip((A, B, C), ROLES_OF_A_PD_MODEL, strict=True))
    )
    workers = registry(d2, p1, d1)
    assert workers.pool_of("m", "decode") == (d1, d2)
    assert workers.pool_of("m", "prefill") == (p1,)
    assert workers.pool_of("m", "plain") == workers.pool_of("n", "decode") == ()
    assert workers.usable(["m"]) == {d1, p1, d2}
    assert workers.usable(["n"]) == set()


def test_a_changed_role_sets_its_bootstrap_port() -> None:
    worker = make_worker(A, role="decode")
    workers = registry(worker)
    workers.set_role(worker, "prefill", 8998)
    assert (worker.role, worker.spec.role, worker.spec.bootstrap_port) == (
        "prefill",
        "prefill",
        8998,
    )
    assert workers.pool_of("m", "prefill") == (worker,)
    assert workers.pool_of("m", "decode") == ()


@pytest.mark.parametrize(
    ("roles", "served"),
    [
        ((), False),
        (("plain",), True),
        (("prefill",), False),
        (("decode", "decode"), False),
        (("prefill", "decode"), True),
    ],
)
def test_a_model_is_served_by_plain_workers_or_by_both_other_roles(
    roles: tuple[Role, ...], served: bool
) -> None:
    workers = registry(
        *(
            make_worker(url, order=n, role=role)
            for n, (url, role) in enumerate(zip((A, B, C), roles, strict=False))
        )
    )
    assert workers.is_served("m") is served
    assert workers.is_disaggregated("m") is ("plain" not in roles and bool(roles))
    assert not workers.is_served("n")


def test_a_worker_without_an_address_does_not_serve_but_makes_its_model_disaggregated() -> None:
    worker = make_worker("http://name:8000", role="prefill", resolved=False)
    workers = registry(worker)
    assert workers.is_disaggregated("m")
    workers.upsert(make_worker(A, order=1, role="decode"))
    assert not workers.is_served("m")
    worker.address = "10.0.0.9:8000"
    workers.reindex()
    assert workers.is_served("m")


def test_an_update_that_is_refused_changes_nothing() -> None:
    worker = make_worker(A, model_ids=("n",))
    workers = registry(worker, make_worker(B, order=1, role="decode", model_ids=("m",)))
    before = snapshot(workers)
    with pytest.raises(MixedRolesError):
        workers.update(worker, make_spec(A, model_ids=("m",)))
    assert worker.model_ids == worker.spec.model_ids == ("n",)
    assert snapshot(workers) == before


def test_roles_of_different_models_are_independent() -> None:
    workers = registry(
        make_worker(A, model_ids=("m",)),
        make_worker(B, order=1, role="prefill", model_ids=("n",)),
        make_worker(C, order=2, role="decode", model_ids=()),
    )
    assert len(workers) == 3


def test_the_only_worker_of_a_model_can_change_its_role() -> None:
    workers = registry(make_worker(A, role="plain"))
    workers.upsert(make_worker(A, role="prefill"))
    assert workers.pool_of("m", "plain") == ()


def test_of_two_workers_at_one_address_the_first_is_found_until_it_leaves() -> None:
    old, new = make_worker(A, id="pod-1", order=0), make_worker(A, id="pod-2", order=1)
    workers = registry(new, old)
    assert workers.at_address("10.0.0.1:8000") is old
    workers.remove("pod-1")
    assert workers.at_address("10.0.0.1:8000") is new


def test_a_pool_that_was_read_does_not_change_later() -> None:
    a = make_worker(A)
    workers = registry(a)
    pool = workers.pool_of("m", "plain")
    workers.remove(a.id)
    assert pool == (a,)


def test_candidates_are_the_workers_whose_breaker_lets_a_request_through() -> None:
    closed, opened = make_worker(A, threshold=1), make_worker(B, order=1, threshold=1)
    workers = registry(closed, opened, make_worker(C, order=2, resolved=False))
    opened.breaker.failure(1000.0)
    assert workers.candidates("m", "plain", 1029.9) == [closed]
    assert workers.candidates("m", "plain", 1030.0) == [closed, opened]
    opened.breaker.claim(1030.0)
    assert workers.candidates("m", "plain", 1030.0) == [closed]
    assert workers.candidates("m", "decode", 1030.0) == []
    assert workers.candidates("n", "plain", 1030.0) == []
