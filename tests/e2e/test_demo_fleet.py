"""The demo's workers: real processes, one for each model and part of its pool."""

from pathlib import Path

import aiohttp
import pytest

from extproc.demo.fleet import Fleet
from extproc.demo.pools import divided_pool, plain_pool
from extproc.demo.tiny_model import write_model_folder
from extproc.testing.stack import StackError


async def test_every_model_has_its_workers(tmp_path: Path) -> None:
    tokenizer = write_model_folder(tmp_path / "model")
    async with Fleet(tmp_path, ["one", "two"], plain_pool(2), tokenizer) as fleet:
        assert len(set(fleet.urls)) == 4
        found = []
        async with aiohttp.ClientSession() as session:
            for url in fleet.urls:
                async with session.get(f"{url}/server_info") as response:
                    found.append(await response.json())
    assert [info["served_model_name"] for info in found] == ["one", "one", "two", "two"]
    assert all(info["kv_events"]["block_size"] == info["page_size"] for info in found)
    assert len({info["kv_events"]["endpoint_port_base"] for info in found}) == 4


async def test_a_divided_pool_has_both_roles(tmp_path: Path) -> None:
    tokenizer = write_model_folder(tmp_path / "model")
    async with Fleet(tmp_path, ["one"], divided_pool(3), tokenizer) as fleet:
        found = []
        async with aiohttp.ClientSession() as session:
            for url in fleet.urls:
                async with session.get(f"{url}/server_info") as response:
                    found.append(await response.json())
    assert [info["disaggregation_mode"] for info in found] == ["prefill", "prefill", "decode"]
    ports = {info["disaggregation_bootstrap_port"] for info in found[:2]}
    assert len(ports) == 2
    assert 0 not in ports


async def test_workers_that_do_not_start_say_why(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="tokenizer_path"):
        async with Fleet(tmp_path, ["one"], plain_pool(1), tmp_path / "none"):
            pass
