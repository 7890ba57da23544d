"""Pairs of workers for a LoRA adapter: both must have loaded it."""

import json

import pytest

from extproc.engines.engine import EngineName
from extproc.routing.json_members import with_members
from extproc.routing.pd.decode_order import DecodeOrder
from tests.unit.routing.pd.pd_fleet import ADDRESSES, PREFILLS, PdFleet

BODY = b'{"model":"sql","prompt":"x"}'


def adapted(fleet: PdFleet, engine: EngineName = "sglang") -> None:
    """The last two prefill and decode workers have the adapter."""
    for worker in (*fleet.prefills, *fleet.decodes):
        names = ("sql",) if worker not in (fleet.prefills[0], fleet.decodes[0]) else ()
        fleet.load_adapters(worker, *names, engine=engine)


@pytest.mark.parametrize("inline", [False, True])
async def test_both_workers_of_a_pair_have_the_adapter(inline: bool) -> None:
    fleet = PdFleet(inline=inline)
    adapted(fleet)
    for _ in range(6):
        pair = await fleet.pair(BODY, model="sql")
        assert pair.leg.worker.url in PREFILLS[1:]
        order = pair.decision.decode_order
        named = pair.decision.destinations if inline else DecodeOrder.from_header(order).addresses
        assert set(named) == set(ADDRESSES[1:])
        assert pair.decision.adapter == "sql"
        if not inline:
            assert fleet.pick(pair).claim.worker.url != fleet.decodes[0].url
        pair.close()


@pytest.mark.parametrize("asked", ["sql", "m:sql"])
async def test_both_engines_get_the_name_that_they_take(asked: str) -> None:
    fleet = PdFleet()
    adapted(fleet)
    body = json.dumps({"model": asked, "prompt": "x"}).encode()
    pair = await fleet.pair(body, model=asked)
    (post,) = fleet.prefill_client.posts
    assert post.fields["model"] == "m:sql"
    decode = json.loads(with_members(body, pair.decision.body_members))
    assert decode["model"] == "m:sql"
    assert decode["bootstrap_room"] == post.fields["bootstrap_room"]
    pair.close()


@pytest.mark.parametrize("lacks", ["prefills", "decodes"])
async def test_a_pair_without_the_adapter_on_one_side_is_503(lacks: str) -> None:
    fleet = PdFleet()
    adapted(fleet)
    for worker in getattr(fleet, lacks):
        fleet.load_adapters(worker, engine="sglang")
    error = await fleet.refused(BODY, model="sql")
    assert (error.code, error.status) == ("no_workers_with_adapter", 503)
    assert not fleet.prefill_client.posts


async def test_an_adapter_of_no_worker_is_an_unknown_model() -> None:
    assert (await PdFleet().refused(BODY, model="sql")).code == "model_not_found"
