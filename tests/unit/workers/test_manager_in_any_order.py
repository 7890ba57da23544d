"""After any sequence of events, the registry has the roles that the engines have."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.workers.engine_calls import EngineAnswer
from extproc.workers.source import Added, Removed, RoleChanged
from extproc.workers.worker import Role
from tests.builders import make_spec

from .manager_setup import INTERVAL_SECONDS, RETRY_SECONDS, ManagerSetup, running

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


async def _play(setup: ManagerSetup, steps: list[Any]) -> tuple[set[str], dict[str, Role]]:
    """The workers that are present in the end, and the roles of the engines."""
    present: set[str] = set()
    roles: dict[str, Role] = {}

    def become(url: str, role: Role) -> None:
        roles[url] = role
        fields = {"disaggregation_mode": _WORDS[role], "disaggregation_bootstrap_port": 8998}
        setup.client.tell(url, "m", **fields)

    for url in _URLS:
        become(url, "plain")
    for step in steps:
        match step:
            case "add", url:
                present.add(url)
                setup.source.push(Added(make_spec(url)))
            case "remove", url:
                present.discard(url)
                setup.source.push(Removed(url))
            case "engine", url, role:
                become(url, role)
            case "silent", url:
                setup.client.script(url, "/server_info", EngineAnswer(503, b""))
            case "discovery", url, role:
                setup.source.push(RoleChanged(url, role))
            case "recheck", url:
                if worker := setup.registry.get(url):
                    setup.manager.recheck(worker)
            case "wait", seconds:
                await setup.clock.advance(seconds)
    for url, role in roles.items():
        become(url, role)  # in the end every engine answers
    return present, roles


@settings(max_examples=60, deadline=None)
@given(steps=_STEPS)
async def test_the_registry_ends_up_with_the_roles_of_the_engines(steps: list[Any]) -> None:
    async with running(ManagerSetup(interval_seconds=INTERVAL_SECONDS)) as setup:
        present, roles = await _play(setup, steps)
        await setup.clock.advance(2 * (INTERVAL_SECONDS + RETRY_SECONDS))
        registered = {worker.id: worker.role for worker in setup.registry}
        assert registered.keys() <= present
        assert registered == {url: roles[url] for url in registered}
        kinds = {role == "plain" for role in registered.values()}
        assert len(kinds) <= 1
        # Only workers whose role does not fit are refused, and they are not the most.
        assert len(present - registered.keys()) <= len(registered)
        for url in present - registered.keys():
            assert kinds == {roles[url] != "plain"}
        for role in _WORDS:
            pool = sorted(url for url in registered if registered[url] == role)
            assert sorted(setup.pool(role=role)) == pool
