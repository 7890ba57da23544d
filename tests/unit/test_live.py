"""Another configuration is put into use around what the parts know, or not at all."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from extproc.app import App
from extproc.config.schema import Config
from extproc.encoders import load_encoders
from extproc.errors import ConfigError
from extproc.live import LiveParts
from extproc.routing.rank_chooser import RankChooser
from extproc.routing.token_proof.comparison import Difference
from extproc.routing.token_proof.proofs import TokenProof
from extproc.routing.token_proof.traits import TEXT
from tests.builders import make_worker
from tests.fakes import settle
from tests.unit.configs import config
from tests.unit.simulator.model_folders import model_folder

Make = Callable[[Config], LiveParts]


@pytest.fixture
async def live() -> AsyncIterator[Make]:
    """Parts that are made in the test and closed at its end."""
    made: list[LiveParts] = []

    def make(first: Config) -> LiveParts:
        parts = LiveParts(first, load_encoders(first), None)
        made.append(parts)
        return parts

    yield make
    for parts in made:
        parts.close()
        await parts.server.stop()
        await parts.kv.ranks.indexer.close()


async def use(parts: LiveParts, other: Config) -> None:
    (await parts.prepare(other))()


def models(*entries: dict[str, Any], **sections: Any) -> Config:
    return config(models=list(entries), **sections)


async def test_a_model_keeps_its_tokenizer_and_what_is_known_of_its_speed(
    live: Make, tmp_path: Path
) -> None:
    model = {"id": "m", "policy": "min_ttft", "tokenizer_path": str(model_folder(tmp_path))}
    parts = live(models(model))
    placement = parts.kv.placements["m"]
    placement.model_speed.observe(10_000, 1.0)
    learnt = placement.model_speed.tokens_per_second
    before = parts.routing.choosers["m"]
    assert isinstance(before, RankChooser)
    await use(parts, models(model | {"policy": "cache_aware_zmq"}, {"id": "n"}))
    assert parts.kv.placements["m"] is placement
    assert placement.policy.name == "cache_aware_zmq"
    assert placement.model_speed.tokens_per_second == learnt
    await use(parts, models({"id": "n"}))
    assert dict(parts.kv.placements) == {}
    assert parts.routing.router.model_ids == ["n"]


async def test_tokenizers_are_loaded_for_new_settings_only(live: Make, tmp_path: Path) -> None:
    path = str(model_folder(tmp_path))
    parts = live(models({"id": "m", "tokenizer_path": path}))
    encoder = parts._encoders["m"]
    await use(
        parts, models({"id": "m", "tokenizer_path": path}, {"id": "n", "tokenizer_path": path})
    )
    assert parts._encoders == {"m": encoder, "n": encoder}
    await use(parts, models({"id": "m", "tokenizer_path": path}, tokenization={"threads": 3}))
    assert parts._encoders["m"] is not encoder
    # A request that began before may still use it.
    assert await encoder.tokenize("a")


async def test_what_cannot_be_loaded_changes_nothing(live: Make, tmp_path: Path) -> None:
    first = models({"id": "m"})
    parts = live(first)
    routing = parts.routing
    bad = {"id": "n", "tokenizer_path": str(tmp_path / "none")}
    with pytest.raises(ConfigError, match=r"models\[1\]\.tokenizer_path"):
        await parts.prepare(models({"id": "m", "policy": "random"}, bad))
    with pytest.raises(ConfigError, match="cannot be used"):
        await parts.prepare(models({"id": "m"}, workers={"api_key_file": str(tmp_path / "none")}))
    assert parts.config is first
    assert parts.routing is routing


async def test_what_must_outlive_a_configuration_is_the_same_object(live: Make) -> None:
    parts = live(models({"id": "m"}))
    before = parts.routing
    await use(parts, models({"id": "m"}, proxy={"fallback_workers": 0}, kv={"max_pages": 1000}))
    after = parts.routing
    assert after.router is not before.router
    assert after.choosers["m"] is before.choosers["m"]
    assert after.pd.pairs is before.pd.pairs
    assert after.lease_parts.outcomes is before.lease_parts.outcomes
    assert after.lease_parts.gateway is before.lease_parts.gateway
    assert after.lease_parts.registry is before.lease_parts.registry
    assert parts.server.streams.decider is after.router
    assert parts.kv.ranks.indexer.index.max_pages == 1000
    await use(parts, models({"id": "m", "policy": "random"}))
    assert parts.routing.choosers["m"] is not before.choosers["m"]


async def test_a_model_may_be_without_workers_if_it_says_so() -> None:
    app = App(models({"id": "m"}, {"id": "rare", "ready_without_workers": True}), {})
    try:
        assert not app.is_ready(), "discovery has not named the first workers"
        app._manager.first_round_done = True
        assert not app.is_ready()
        app.workers.upsert(make_worker("http://10.0.0.1:8000"))
        app.workers.upsert(make_worker("http://10.0.0.2:8000", order=1, model_ids=("rare",)))
        app.workers_changed()
        assert app.is_ready()
        app.workers.remove("http://10.0.0.2:8000")
        app.workers_changed()
        assert app.is_ready()
        app.workers.remove("http://10.0.0.1:8000")
        app.workers_changed()
        assert not app.is_ready()
        (await app.prepare(models({"id": "m", "ready_without_workers": True})))()
        assert app.is_ready()
        await settle()
    finally:
        await app._manager._tasks.close()
        await app.server.stop()
        await app.ranks.indexer.close()


async def test_a_model_that_is_added_does_not_make_a_ready_service_unready() -> None:
    app = App(models({"id": "m"}), {})
    try:
        app._manager.first_round_done = True
        app.workers.upsert(make_worker("http://10.0.0.1:8000"))
        app.workers_changed()
        assert app.is_ready()
        (await app.prepare(models({"id": "m"}, {"id": "new"})))()
        assert app.is_ready()
        # From the moment when it is served it counts.
        app.workers.upsert(make_worker("http://10.0.0.2:8000", order=1, model_ids=("new",)))
        app.workers_changed()
        app.workers.remove("http://10.0.0.2:8000")
        app.workers_changed()
        assert not app.is_ready()
        (await app.prepare(models({"id": "m"})))()
        assert app.is_ready()
        await settle()
    finally:
        await app._manager._tasks.close()
        await app.server.stop()
        await app.ranks.indexer.close()


async def test_a_changed_model_is_proven_again_and_one_that_says_so_is_not(
    live: Make, tmp_path: Path
) -> None:
    model = {"id": "m", "policy": "min_ttft", "tokenizer_path": str(model_folder(tmp_path))}
    parts = live(models(model))
    worker = make_worker("http://10.0.0.1:8000", engine="vllm")
    parts.shared.registry.upsert(worker)
    parts.prover.joined(worker)
    proofs = parts.kv.truth.proofs

    def differs() -> None:
        difference = Difference("text", TEXT, 0, 1, 1, "a", "b", first_only=False)
        proofs.put("m", worker, TokenProof(state="differs", differences=(difference,)))

    differs()
    await use(parts, models(model, proxy={"fallback_workers": 0}))
    assert proofs.of(worker)["m"].state == "differs"
    assert proofs.differing("m")
    await use(parts, models(model | {"token_proof": "warn"}))
    assert proofs.of(worker)["m"].state == "differs"
    assert not proofs.differing("m")
    await use(parts, models(model | {"chat_template_kwargs": {"thinking": False}}))
    assert proofs.of(worker)["m"].state == "pending"
    differs()
    assert proofs.differing("m")
    await use(parts, models(model | {"token_proof": "off"}))
    assert proofs.of(worker) == {}
    assert not parts.kv.truth.engines.asks("m")
    await use(parts, models({"id": "m", "policy": "min_ttft", "tokens_from": "engine"}))
    assert parts.kv.truth.engines.asks("m")
    assert isinstance(parts.routing.choosers["m"], RankChooser)
