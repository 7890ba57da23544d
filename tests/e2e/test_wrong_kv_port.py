"""A wrong port for KV events is reported, and costs no request."""

from pathlib import Path
from typing import Any

from extproc.simulator.http import RunningSimulator
from extproc.testing.stack import wait_until
from tests.e2e.conftest import Launch
from tests.unit.simulator.model_folders import model_folder


async def test_the_http_port_of_a_worker_is_not_trusted_for_kv_events(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    path = model_folder(tmp_path / "model")

    def settings(workers: list[RunningSimulator]) -> dict[str, Any]:
        entry = {"endpoint": f"tcp://*:{workers[0].port}", "block_size": 16}
        model = {"id": "m", "policy": "min_ttft", "tokenizer_path": path, "kv_events": [entry]}
        return {"models": [model]}

    running = await launch(1, settings=settings)

    async def noticed() -> bool:
        (worker,) = await running.stack.workers()
        (rank,) = worker["kv"]["ranks"]
        assert not rank["trusted"]
        assert not rank["connected"]
        return bool(rank["reason"] == "malformed" and rank["malformed"] > 0)

    await wait_until(noticed, "the wrong port is noticed")
    assert "kv_events_malformed" in running.stack.service.log.read_text()
    async with running.chat(tokens=1) as response:
        assert response.status == 200
