"""A client steers neither of the two workers of a pair: their bodies have only our members."""

import json

import pytest

from extproc.routing.json_members import with_members
from extproc.steering import STEERING_MEMBERS
from tests.unit.routing.pd.pd_fleet import KV, PdFleet

ROOMS = ["bootstrap_host", "bootstrap_port", "bootstrap_room"]
KEPT = ["model", "prompt"]


def steered(name: str) -> bytes:
    """The member in two spellings, before and behind the client's others."""
    spelled = f'"{name}":1,"\\u{ord(name[0]):04x}{name[1:]}":"evil"'
    return f'{{{spelled},"model":"m","prompt":"x",{spelled}}}'.encode()


def names(body: bytes) -> list[str]:
    found: list[str] = json.loads(body, object_pairs_hook=lambda pairs: [n for n, _ in pairs])
    return found


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("name", sorted(STEERING_MEMBERS))
async def test_both_workers_get_only_the_rooms_of_the_service(name: str, inline: bool) -> None:
    fleet = PdFleet(inline=inline)
    pair = await fleet.pair(steered(name))
    (post,) = fleet.prefill_client.posts
    assert names(post.body) == KEPT + ROOMS
    assert post.fields["bootstrap_host"] == "10.0.0.1"
    assert names(b"{%b}" % pair.decision.body_members) == ROOMS
    pair.close()


@pytest.mark.parametrize("name", sorted(STEERING_MEMBERS))
async def test_with_nixl_both_get_only_the_parameters_of_the_service(name: str) -> None:
    fleet = PdFleet(protocols={"m": "nixl"})
    task = await fleet.waiting(steered(name))
    (post,) = fleet.prefill_client.posts
    sent = names(post.body)
    assert sent[:2] == KEPT
    assert [one for one in sent if one in STEERING_MEMBERS] == ["kv_transfer_params"]
    assert post.fields["kv_transfer_params"]["do_remote_decode"] is True
    fleet.prefill_client.calls[0].respond(200, b'{"kv_transfer_params":%b}' % KV)
    lease = await task
    decode = with_members(b'{"model":"m"}', lease.decision.body_members)
    assert names(decode) == ["model", "kv_transfer_params"]
    lease.close()
