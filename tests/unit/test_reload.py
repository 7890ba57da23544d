"""A changed file is applied as a whole or not at all, and the last change counts."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from extproc.config.loading import load_config
from extproc.config.schema import Config
from extproc.errors import ConfigError
from extproc.metrics.service import Metrics
from extproc.reload import Reloader
from tests.unit.configs import discovery, raw_config, written

DEADLINE_SECONDS = 30.0


class Target:
    """The service: it notes what it is given, and may fail or take its time."""

    def __init__(self) -> None:
        self.used: list[Config] = []
        self.prepared = 0
        self.problem: Exception | None = None
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def prepare(self, config: Config) -> Callable[[], None]:
        self.prepared += 1
        await self.may_go_on.wait()
        if self.problem is not None:
            raise self.problem
        return lambda: self.used.append(config)

    @property
    def models(self) -> list[str]:
        """The models of the configuration in use."""
        return [model.id for model in self.used[-1].models] if self.used else []


class Setup:
    def __init__(self, folder: Path, **sections: Any) -> None:
        self.folder = folder
        # 0: only when asked for.
        self.sections = {"server": {"watch_secs": 0}} | sections
        self.path = Path(self.write())
        self.registry = CollectorRegistry()
        self.target = Target()
        self.reloader = Reloader(
            self.path, load_config(self.path), self.target, Metrics(self.registry)
        )

    def write(self, **changes: Any) -> str:
        return written(self.folder, raw_config(**(self.sections | changes)))

    def outcomes(self, outcome: str) -> float:
        name = "extproc_reloads_total"
        return self.registry.get_sample_value(name, {"outcome": outcome}) or 0.0

    async def ask(self) -> None:
        """Ask for a reload, and wait for its end."""
        before = sum(map(self.outcomes, ("applied", "unchanged", "refused")))
        self.reloader.ask()
        await until(lambda: sum(map(self.outcomes, ("applied", "unchanged", "refused"))) > before)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not check():  # noqa: ASYNC110 (the outcomes are numbers)
            await asyncio.sleep(0.002)


@asynccontextmanager
async def running(setup: Setup) -> AsyncIterator[Setup]:
    task = asyncio.create_task(setup.reloader.run())
    try:
        yield setup
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def test_a_good_file_is_used_and_an_equal_one_changes_nothing(tmp_path: Path) -> None:
    async with running(Setup(tmp_path)) as setup:
        setup.write(models=[{"id": "n"}])
        await setup.ask()
        assert setup.target.models == ["n"]
        assert (setup.reloader.status.applied, setup.outcomes("applied")) == (1, 1)
        await setup.ask()
        assert (setup.reloader.status.applied, setup.outcomes("unchanged")) == (1, 1)
        # Certificates and keys may have changed all the same.
        assert setup.target.prepared == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("models: [", "not valid YAML"),
        ("", "expected a mapping"),
        ("models: []\ndiscovery: {backend: static_urls}\n", "at least one model"),
        (None, "cannot be read"),
    ],
)
async def test_a_bad_file_is_refused_with_its_problems(
    tmp_path: Path, text: str | None, problem: str
) -> None:
    async with running(Setup(tmp_path)) as setup:
        if text is None:
            setup.path.unlink()
        else:
            setup.path.write_text(text)
        await setup.ask()
        status = setup.reloader.status
        assert setup.target.prepared == 0
        assert problem in "\n".join(status.problems)
        assert status.refused_at is not None
        assert setup.registry.get_sample_value("extproc_config_current") == 0
        setup.write()
        await setup.ask()
        assert not status.problems
        assert status.refused_at is None
        assert setup.registry.get_sample_value("extproc_config_current") == 1


async def test_a_key_that_needs_a_restart_refuses_the_whole(tmp_path: Path) -> None:
    async with running(Setup(tmp_path)) as setup:
        setup.write(models=[{"id": "n"}], load={"release": "estimate"}, kv={"max_pages": 2000})
        await setup.ask()
        assert setup.reloader.status.problems == ["load.release: a change of this needs a restart"]
        assert setup.target.prepared == 0


@pytest.mark.parametrize("error", [ConfigError(["models[0]: broken"]), RuntimeError("a fault")])
async def test_what_fails_while_it_is_prepared_is_refused(tmp_path: Path, error: Exception) -> None:
    async with running(Setup(tmp_path)) as setup:
        setup.target.problem = error
        setup.write(models=[{"id": "n"}])
        await setup.ask()
        assert (setup.outcomes("refused"), setup.target.used) == (1, [])
        setup.target.problem = None
        await setup.ask()
        assert setup.target.models == ["n"]


async def test_many_reloads_one_after_the_other_end_with_the_last(tmp_path: Path) -> None:
    async with running(Setup(tmp_path)) as setup:
        setup.target.may_go_on.clear()
        for turn in range(50):
            setup.write(models=[{"id": f"m{turn}"}])
            setup.reloader.ask()
            await asyncio.sleep(0)
        setup.target.may_go_on.set()
        await until(lambda: setup.target.models == ["m49"])
        await asyncio.sleep(0.05)
        assert setup.target.prepared <= 3


async def test_a_change_is_noticed_when_it_has_settled(tmp_path: Path) -> None:
    async with running(Setup(tmp_path, server={"watch_secs": 0.02})) as setup:
        # The first look compares with what is in use: the file may have changed meanwhile.
        await until(lambda: setup.outcomes("unchanged") == 1)
        setup.write(models=[{"id": "n"}])
        await until(lambda: setup.target.models == ["n"])
        # A file that is still being written is left alone.
        setup.target.used.clear()
        whole = setup.path.read_text().replace("id: n", "id: whole")
        for length in range(1, len(whole), 7):
            setup.path.write_text(whole[:length])
            await asyncio.sleep(0.001)
        setup.path.write_text(whole)
        await until(lambda: setup.target.models == ["whole"])


async def test_a_file_that_a_refused_configuration_names_is_watched(tmp_path: Path) -> None:
    async with running(Setup(tmp_path, server={"watch_secs": 0.02})) as setup:
        token = tmp_path / "token"
        setup.write(workers={"api_key_file": str(token)})
        await until(lambda: setup.outcomes("refused") == 1)
        assert "workers.api_key_file" in setup.reloader.status.problems[0]
        token.write_text("secret")
        await until(lambda: bool(setup.target.used))
        assert setup.target.used[-1].workers.api_key_file == str(token)


async def test_a_change_of_what_envoy_has_at_its_start_is_shown(tmp_path: Path) -> None:
    async with running(Setup(tmp_path)) as setup:
        setup.write(models=[{"id": "m", "policy": "random"}])
        await setup.ask()
        assert not setup.reloader.status.envoy_config_outdated
        setup.write(discovery=discovery("http://10.0.0.9:1"))
        await setup.ask()
        assert setup.reloader.status.envoy_config_outdated
        assert setup.registry.get_sample_value("extproc_envoy_config_outdated") == 1
        setup.write()
        await setup.ask()
        assert not setup.reloader.status.envoy_config_outdated


async def test_a_worker_for_which_envoy_has_no_tls_is_refused(tmp_path: Path) -> None:
    envoy = {"endpoints_file": str(tmp_path / "workers.json")}
    async with running(Setup(tmp_path, envoy=envoy)) as setup:
        setup.write(discovery=discovery("http://10.0.0.1:8000", "https://10.0.0.2:1"))
        await setup.ask()
        (problem,) = setup.reloader.status.problems
        assert problem.startswith("discovery.static_urls.urls: a new https worker with an IP")
        # By a name it can come, and does not make Envoy's own file outdated.
        setup.write(discovery=discovery("http://10.0.0.1:8000", "https://w.example:1"))
        await setup.ask()
        assert len(setup.target.used) == 1
        assert not setup.reloader.status.envoy_config_outdated
