"""Prefill and decode workers of vLLM, which hand pages over with NIXL."""

import re
from pathlib import Path
from typing import Any, Final

import pytest

from tests.engines.live.asking import CHAT, House, open_house
from tests.engines.live.servers import Servers, start_together
from tests.engines.live.talks import Talk
from tests.engines.live.vllm import BLOCK, PORTS, model_folder, vllm_server

pytestmark = pytest.mark.timeout(1200)
_NIXL: Final = '{"kv_connector": "NixlConnector", "kv_role": "kv_both"}'
_HITS: Final = re.compile(r"^vllm:prefix_cache_hits_total\{[^}]*\} ([0-9.e+]+)$", re.M)


async def _hits(house: House, url: str) -> float:
    """Tokens that a server has read from its cache since its start."""
    async with house.http.get(f"{url}/metrics") as answer:
        return sum(float(one) for one in _HITS.findall(await answer.text()))


async def _alone(house: House, url: str, body: dict[str, Any]) -> str:
    """The text that a server gives without a partner."""
    async with house.http.post(f"{url}{CHAT}", json={"model": "m", **body}) as answer:
        said = await answer.json()
        assert answer.status == 200, said
        return str(said["choices"][0]["message"]["content"])


async def test_pages_are_handed_over_and_prefill_workers_are_chosen_by_theirs(
    own_servers: Servers, vllm_engine: Path, tmp_path: Path
) -> None:
    model = model_folder(tmp_path, "tools")
    flags = ("--kv-transfer-config", _NIXL)
    servers = [
        own_servers.add(
            PORTS, lambda ports, log: vllm_server(vllm_engine, model, ports, log, *flags)
        )
        for _ in range(3)
    ]
    start_together(servers)
    first, second, decode = [server.url for server in servers]
    roles = {"prefill_urls": [first, second], "decode_urls": [decode]}
    async with open_house(
        tmp_path,
        [first, second],
        model,
        BLOCK,
        of_model={"pd": {"protocol": "nixl"}},
        discovery={"static_urls": {"urls": [first, second, decode], **roles}},
        envoy={"fail_open": False},
    ) as house:
        # On a CPU this engine cannot receive pages before it has computed something.
        await _alone(house, decode, {"messages": Talk("first").question(), "max_tokens": 4})
        believed = []
        for talk in [Talk(f"pair {number}") for number in range(4)]:
            for _ in range(4):
                body = {"messages": talk.question(), "max_tokens": 8, "temperature": 0}
                before = {url: await _hits(house, url) for url in (first, second)}
                asked = await house.ask(body)
                cached = await _hits(house, asked.worker) - before[asked.worker]
                believed.append((asked.believed, cached))
                assert asked.total == asked.prompt
                assert asked.text == await _alone(house, decode, body)
                talk.answered(asked.text)
        assert [one for one in believed if one[0] != one[1]] == []
        assert sum(cached > 0 for _, cached in believed) >= 12
