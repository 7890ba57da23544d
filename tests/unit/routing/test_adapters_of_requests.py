"""Requests for LoRA adapters: which workers may serve them, and by what name."""

import json
from typing import Any

import pytest

from extproc.engines.engine import EngineName
from extproc.errors import RouterError
from extproc.routing.lease import Lease
from extproc.routing.request import ClientHeaders, find_endpoint, parse_body
from extproc.routing.subset import Subset
from extproc.workers.worker import Worker
from tests.builders import Fleet, make_fleet, make_worker

A, B, C = (f"http://10.0.0.{n}:8000" for n in (1, 2, 3))


def worker(url: str, *adapters: str, engine: EngineName | None = "vllm", **more: Any) -> Worker:
    return make_worker(url, order=int(url[-6]), adapters=adapters, engine=engine, **more)


async def ask(
    fleet: Fleet,
    model: str | None,
    path: str = "/v1/completions",
    subset: Subset | None = None,
    **fields: Any,
) -> Lease:
    """Route a request as the session does."""
    body = {"prompt": "p", "text": "t"} | fields | ({} if model is None else {"model": model})
    request = parse_body(
        find_endpoint("POST", path),
        json.dumps(body).encode(),
        lambda: ClientHeaders(path, ()),
        prompt_max_bytes=0,
    )
    request.subset = subset
    lease = await fleet.router.route(request)
    assert isinstance(lease, Lease)
    return lease


async def refused(fleet: Fleet, model: str, **more: Any) -> RouterError:
    with pytest.raises(RouterError) as caught:
        await ask(fleet, model, **more)
    return caught.value


@pytest.mark.parametrize("name", ["sql", "m:sql"])
async def test_only_workers_that_list_the_adapter_serve_it(name: str) -> None:
    fleet = make_fleet([worker(A), worker(B, "sql"), worker(C, "sql", "other")])
    served = set()
    for _ in range(6):
        decision = (await ask(fleet, name)).decision
        assert (decision.model, decision.adapter) == ("m", "sql")
        assert set(decision.destinations) == {"10.0.0.2:8000", "10.0.0.3:8000"}
        served.add(decision.worker_url)
    assert served == {B, C}
    assert fleet.metric("extproc_adapter_requests_total", model="m") == 6


async def test_requests_for_the_model_itself_go_to_all_workers() -> None:
    fleet = make_fleet([worker(A), worker(B, "sql")])
    decision = (await ask(fleet, "m")).decision
    assert decision.adapter is None
    assert len(decision.destinations) == 2
    assert fleet.metric("extproc_adapter_requests_total", model="m") == 0


@pytest.mark.parametrize("name", ["other", "m:other", "n:sql"])
async def test_an_unknown_adapter_is_an_unknown_model(name: str) -> None:
    error = await refused(make_fleet([worker(A, "sql")]), name)
    assert (error.code, error.status) == ("model_not_found", 404)


async def test_a_known_adapter_without_a_worker_is_503() -> None:
    fleet = make_fleet([worker(A), worker(B, "sql")])
    fleet.registry.set_draining(fleet.workers[1], True)
    error = await refused(fleet, "sql")
    assert (error.code, error.status) == ("no_workers_with_adapter", 503)
    fleet.registry.remove(fleet.workers[1].id)
    assert (await refused(fleet, "m:sql")).code == "no_workers_with_adapter"
    fleet.registry.remove(fleet.workers[0].id)
    assert (await refused(fleet, "sql")).code == "no_healthy_workers"


async def test_the_last_resort_is_among_the_workers_with_the_adapter() -> None:
    """The breakers of all are open; the one with the adapter is the last that failed."""
    fleet = make_fleet([worker(url, *adapters) for url, adapters in ((A, ()), (B, ()), (C, ["x"]))])
    for number, one in enumerate(fleet.workers):
        for _ in range(3):
            one.breaker.failure(fleet.clock.monotonic() + number)
    assert (await ask(fleet, "x")).decision.worker_url == C


async def test_a_subset_without_the_adapter_is_503() -> None:
    fleet = make_fleet([worker(A), worker(B, "sql")])
    error = await refused(fleet, "sql", subset=Subset.of(["10.0.0.1"]))
    assert error.code == "no_workers_in_subset"
    assert (await ask(fleet, "sql", subset=Subset.of(["10.0.0.2"]))).decision.worker_url == B


@pytest.mark.parametrize(
    ("engine", "asked", "sent"),
    [
        ("vllm", "sql", None),
        ("vllm", "m:sql", "sql"),
        ("sglang", "m:sql", None),
        ("sglang", "sql", "m:sql"),
        (None, "sql", None),
        (None, "m:sql", "sql"),
    ],
)
async def test_the_engine_gets_the_name_that_it_takes(
    engine: EngineName | None, asked: str, sent: str | None
) -> None:
    fleet = make_fleet([worker(A, "sql", engine=engine)])
    members = (await ask(fleet, asked)).decision.body_members
    assert (json.loads(b"{%b}" % members).get("model") if members else None) == sent


async def test_other_engines_are_no_fallbacks_if_they_take_another_name() -> None:
    fleet = make_fleet([worker(A, "sql"), worker(B, "sql", engine="sglang"), worker(C, "sql")])
    for _ in range(6):
        decision = (await ask(fleet, "sql")).decision
        is_sglang = decision.worker_url == B
        assert len(decision.destinations) == (1 if is_sglang else 2)


async def test_sglang_reads_the_adapter_from_lora_path() -> None:
    fleet = make_fleet([worker(A, engine="sglang"), worker(B, "sql", engine="sglang")])
    for _ in range(3):
        decision = (await ask(fleet, "m", lora_path="sql")).decision
        assert (decision.worker_url, decision.adapter) == (B, "sql")
        assert decision.body_members == b""
        decision = (await ask(fleet, None, "/generate", lora_path="sql")).decision
        assert (decision.worker_url, decision.body_members) == (B, b"")
        decision = (await ask(fleet, "sql", "/generate")).decision
        assert (decision.worker_url, decision.body_members) == (B, b'"lora_path":"sql"')


@pytest.mark.parametrize("value", ["other", ["sql"], None, 5, ""])
async def test_engines_decide_about_other_values_of_lora_path(value: Any) -> None:
    fleet = make_fleet([worker(A, engine="sglang"), worker(B, "sql", engine="sglang")])
    served = {(await ask(fleet, "m", lora_path=value)).decision.worker_url for _ in range(4)}
    assert served == {A, B}


async def test_a_configured_model_may_be_an_adapter_of_its_workers() -> None:
    own = make_worker(A, adapters=("sql",), engine="sglang", model_ids=("base", "sql"))
    fleet = make_fleet([own], models=("sql", "m"))
    decision = (await ask(fleet, "sql")).decision
    assert (decision.model, decision.adapter) == ("sql", "sql")
    assert decision.body_members == b'"model":"base:sql"'


@pytest.mark.parametrize(("status", "asked_again"), [(404, True), (400, True), (422, False)])
async def test_a_worker_that_refuses_an_adapter_is_asked_again(
    status: int, asked_again: bool
) -> None:
    fleet = make_fleet([worker(A, "sql")])
    lease = await ask(fleet, "sql")
    lease.responded(status, "10.0.0.1:8000", "via_upstream", False)
    assert bool(fleet.rechecked) is asked_again


async def test_a_worker_that_refuses_a_request_for_the_model_is_not() -> None:
    fleet = make_fleet([worker(A, "sql")])
    (await ask(fleet, "m")).responded(400, "10.0.0.1:8000", "via_upstream", False)
    assert not fleet.rechecked


async def test_a_request_from_before_a_reload_keeps_its_model() -> None:
    fleet = make_fleet([worker(A, "sql")])
    fleet.registry.names.serve(["n"])
    assert (await ask(fleet, "m")).decision.model == "m"
    assert (await refused(fleet, "n")).code == "model_not_found"
