"""Whatever discovery says and engines do, the registry comes to what the engines are."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.workers.engine_calls import EngineAnswer
from extproc.workers.source import Added, Removed, RoleChanged
from extproc.workers.worker import Role
from tests.fakes import make_spec

from .house import INTERVAL_SECONDS, RETRY_SECONDS, House, running

_URLS = [f"http://10.0.0.{n}:8000" for n in range(1, 5)]
_WORDS: dict[Role, str] = {"plain": "null", "prefill": "prefill", "decode": "decode"}
_URL = st.sampled_from(_URLS)
_ROLE = st.sampled_from(sorted(_WORDS))
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), _URL),
        st.tuples(st.just("remove"), _URL),
        st.tuples(st.just("engine"), _URL, _ROLE),
        st.tuples(st.just("silent"), _URL),
        st.tuples(st.just("discovery"), _URL, _ROLE),
        st.tuples(st.just("recheck"), _URL),
        st.tuples(st.just("wait"), st.sampled_from([0.3, 2.0, 10.0, 40.0])),
    ),
    max_size=25,
)


async def _play(house: House, steps: list[Any]) -> tuple[set[str], dict[str, Role]]:
    """Who is there in the end, and the engines' roles."""
    present: set[str] = set()
    roles: dict[str, Role] = {}

    def become(url: str, role: Role) -> None:
        roles[url] = role
        fields = {"disaggregation_mode": _WORDS[role], "disaggregation_bootstrap_port": 8998}
        house.client.tell(url, "m", **fields)

    for url in _URLS:
        become(url, "plain")
    for step in steps:
        match step:
            case "add", url:
                present.add(url)
                house.source.push(Added(make_spec(url)))
            case "remove", url:
                present.discard(url)
                house.source.push(Removed(url))
            case "engine", url, role:
                become(url, role)
            case "silent", url:
                house.client.script(url, "/server_info", EngineAnswer(503, b""))
            case "discovery", url, role:
                house.source.push(RoleChanged(url, role))
            case "recheck", url:
                if worker := house.registry.get(url):
                    house.manager.recheck(worker)
            case "wait", seconds:
                await house.clock.advance(seconds)
    for url, role in roles.items():
        become(url, role)  # none is silent in the end
    return present, roles


@settings(max_examples=60, deadline=None)
@given(steps=_STEPS)
async def test_the_registry_ends_up_with_the_roles_of_the_engines(steps: list[Any]) -> None:
    async with running(House(interval_seconds=INTERVAL_SECONDS)) as house:
        present, roles = await _play(house, steps)
        await house.clock.advance(2 * (INTERVAL_SECONDS + RETRY_SECONDS))
        registered = {worker.id: worker.role for worker in house.registry}
        assert registered.keys() <= present
        assert registered == {url: roles[url] for url in registered}
        kinds = {role == "plain" for role in registered.values()}
        assert len(kinds) <= 1
        # Only those of the other kind are kept out.
        for url in present - registered.keys():
            assert kinds == {roles[url] != "plain"}
        for role in _WORDS:
            pool = sorted(url for url in registered if registered[url] == role)
            assert sorted(house.pool(role=role)) == pool
