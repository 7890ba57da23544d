"""Measures agents with tools against the same agents without, on workers like vLLM.

    python -m benchmarks.tools_workload [--agents 16] [--workers 4] [--turns 6] [--rounds 300]

Each agent has 24 tools. Without tools their JSON is a part of the system prompt, so that both kinds
of prompts have as many tokens, up to a few. Two tables are printed:

* "fleet": agents talk at the same time, behind Envoy. The hit rate is the engines' own (`usage`); a
  turn is moved if another worker serves it than the agent's turn before.
* "path": one client, a request after the other, both kinds in turn. The workers' answers come from
  a fake upstream that costs nothing; the histories are held by workers that publish KV events. The
  ratio is that of the medians.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Final

import aiohttp
from msgspec import Struct

from benchmarks.conversations import Conversations, write_model_folder
from benchmarks.rig import MODEL, Arm, ServerInfo, run_until_signal, running_rig
from benchmarks.simulated import running_workers
from extproc.simulator.vllm_bodies import vllm_readers
from extproc.simulator.vllm_tokens import VllmTokenizer
from extproc.testing.stack import Stack, StackError, wait_until

__all__ = ["main"]

_PATH: Final = "/v1/chat/completions"
_TOOLS: Final = 24
_SYSTEM_BYTES: Final = 4000
_QUESTION_BYTES: Final = 600
_HISTORY_BYTES: Final = 16_000
_HISTORY_TURNS: Final = 4
_CONTEXT_TOKENS: Final = 131_072
_WARM_ROUNDS: Final = 20
_TEMPLATE: Final = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- 'You may call these functions:\\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_WORKER: Final = {
    "--engine": "vllm",
    "--kv-events-port": "0",
    "--page-size": "16",
    "--max-running-requests": "64",
}

Body = dict[str, Any]


class _Kind(Struct, frozen=True):
    """With tools, or with their JSON in the system prompt."""

    name: str
    has_tools: bool

    def body(self, tools: list[Body], messages: list[Body]) -> Body:
        if self.has_tools:
            return {"model": MODEL, "messages": messages, "tools": tools}
        system, *others = messages
        lines = "".join(json.dumps(tool) + "\n" for tool in tools)
        text = f"{system['content']}\n\nYou may call these functions:\n{lines}"
        return {"model": MODEL, "messages": [system | {"content": text}, *others]}


KINDS: Final = (_Kind("without tools", False), _Kind("with tools", True))


class _Served(Struct):
    """What became of the requests of one kind in the fleet."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    claimed_tokens: int = 0
    turns: int = 0
    moved: int = 0


def _tools(text: Conversations) -> list[Body]:
    """Descriptions of tools as agents send them: members in another order than the engine's."""
    return [
        {
            "type": "function",
            "function": {
                "parameters": {
                    "type": "object",
                    "required": ["path"],
                    "properties": {
                        name: {"type": "string", "description": text.text(60)}
                        for name in ("path", "pattern", "content")
                    },
                },
                "description": text.text(200),
                "name": f"tool_{number}",
            },
        }
        for number in range(_TOOLS)
    ]


def _model_folder(folder: Path) -> Path:
    path = folder / "model"
    path.mkdir()
    write_model_folder(path)
    (path / "chat_template.jinja").write_text(_TEMPLATE)
    return path


# -- fleet


async def _fleet(options: argparse.Namespace, folder: Path, model: Path) -> None:
    """Both kinds one after the other, each on a fleet of its own that holds nothing."""
    print(f"{'fleet':16}{'prompt tokens':>15}{'hit rate':>10}{'claimed':>10}{'moved':>12}")
    for kind in KINDS:
        place = folder / kind.name.replace(" ", "-")
        place.mkdir()
        worker = _WORKER | {
            "--prefill-tokens-per-second": "8000",
            "--decode-milliseconds-per-token": "5",
            "--tokenizer-path": str(model),
        }
        settings = {
            "models": [{"id": MODEL, "policy": options.policy, "tokenizer_path": str(model)}],
            "observability": {"debug_headers": True},
        }
        async with (
            running_workers(place, options.workers, worker) as urls,
            Stack(place, urls, settings) as stack,
        ):
            served = await _agents(options, kind, stack)
        hits = served.cached_tokens / served.prompt_tokens
        claimed = served.claimed_tokens / served.prompt_tokens
        moved = f"{served.moved} of {served.turns}"
        print(f"{kind.name:16}{served.prompt_tokens:>15}{hits:>10.1%}{claimed:>10.1%}{moved:>12}")


async def _agents(options: argparse.Namespace, kind: _Kind, stack: Stack) -> _Served:
    served = _Served()
    text = Conversations(7)
    tools = _tools(text)
    plans = [
        [text.text(_SYSTEM_BYTES), *(text.text(_QUESTION_BYTES) for _ in range(options.turns))]
        for _ in range(options.agents)
    ]
    async with aiohttp.ClientSession(headers={"x-extproc-debug": "true"}) as session:

        async def agent(number: int, plan: list[str]) -> None:
            pause = random.Random(number)
            messages: list[Body] = [{"role": "system", "content": plan[0]}]
            before = None
            for question in plan[1:]:
                await asyncio.sleep(pause.uniform(0.2, 1.0))
                messages.append({"role": "user", "content": question})
                body = kind.body(tools, messages) | {"max_tokens": 40}
                async with session.post(f"{stack.url}{_PATH}", json=body) as answer:
                    answer.raise_for_status()
                    said = await answer.json()
                    worker = answer.headers["x-extproc-worker"]
                    claimed = answer.headers["x-extproc-overlap"].partition("/")[0]
                usage = said["usage"]
                served.prompt_tokens += usage["prompt_tokens"]
                served.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
                served.claimed_tokens += int(claimed)
                if before is not None:
                    served.turns += 1
                    served.moved += worker != before
                before = worker
                messages.append(said["choices"][0]["message"])

        async with asyncio.TaskGroup() as group:
            for number, plan in enumerate(plans):
                group.create_task(agent(number, plan))
    return served


# -- path


async def _path(options: argparse.Namespace, folder: Path, model: Path) -> None:
    text = Conversations(11)
    tools = _tools(text)
    histories = [text.messages(_HISTORY_TURNS, _HISTORY_BYTES) for _ in range(options.agents)]
    place = folder / "path"
    place.mkdir()
    worker = _WORKER | {
        "--prefill-tokens-per-second": "1e9",
        "--decode-milliseconds-per-token": "0",
        "--tokenizer-path": str(model),
    }
    settings = {"policy": options.policy, "tokenizer_path": str(model), "token_proof": "off"}
    async with running_workers(place, options.workers, worker) as urls:
        infos = await _hold(urls, [kind.body(tools, one) for kind in KINDS for one in histories])
        async with running_rig(place, model=settings, kv_blocks=(), others=infos) as rig:
            await wait_until(lambda: _knows_all(rig.admin_url, len(urls)), "histories are known")
            times = await _alternate(options, rig.urls, text, tools, histories)
    tokens = _tokens_of(model, text, tools, histories[0])
    print(f"\n{'path':16}{'prompt tokens':>15}{'p50':>12}{'no filter':>12}")
    for kind in KINDS:
        ours, bare = (median(times[kind.name, arm]) * 1e6 for arm in (Arm.OURS, Arm.NONE))
        print(f"{kind.name:16}{tokens[kind.name]:>15}{ours:>9.0f} us{bare:>9.0f} us")
    plain, tooled = (median(times[kind.name, Arm.OURS]) for kind in KINDS)
    print(f"with tools / without: {tooled / plain:.2f}")


async def _alternate(
    options: argparse.Namespace,
    urls: Mapping[Arm, str],
    text: Conversations,
    tools: list[Body],
    histories: list[list[Body]],
) -> dict[tuple[str, Arm], list[float]]:
    """Seconds of each request, by kind and arm; a round has one request of each."""
    times: dict[tuple[str, Arm], list[float]] = {
        (kind.name, arm): [] for kind in KINDS for arm in (Arm.OURS, Arm.NONE)
    }
    headers = {"content-type": "application/json"}
    order = random.Random(0)
    async with aiohttp.ClientSession(headers=headers) as session:
        for number in range(_WARM_ROUNDS + options.rounds):
            question = {"role": "user", "content": text.text(_QUESTION_BYTES)}
            messages = [*histories[number % len(histories)], question]
            for name, arm in order.sample([*times], len(times)):
                kind = next(one for one in KINDS if one.name == name)
                data = json.dumps(kind.body(tools, messages) | {"max_tokens": 1}).encode()
                begun = perf_counter()
                async with session.post(f"{urls[arm]}{_PATH}", data=data) as answer:
                    await answer.read()
                    answer.raise_for_status()
                if number >= _WARM_ROUNDS:
                    times[name, arm].append(perf_counter() - begun)
    return times


async def _hold(urls: Sequence[str], bodies: Sequence[Body]) -> list[ServerInfo]:
    """Let each worker serve a share of the bodies; what a fake upstream says in their place."""
    infos: list[ServerInfo] = []
    async with aiohttp.ClientSession() as session:
        for number, body in enumerate(bodies):
            url = urls[number % len(urls)]
            async with session.post(f"{url}{_PATH}", json=body | {"max_tokens": 1}) as answer:
                answer.raise_for_status()
        for url in urls:
            answers: dict[str, Any] = {}
            for path in ("/v1/models", "/kv_event_sources", "/metrics"):
                async with session.get(url + path) as answer:
                    said = await answer.text()
                    answers[path] = said if path == "/metrics" else json.loads(said)
            infos.append({"served_model_name": MODEL, "answers": answers})
    return infos


async def _knows_all(admin_url: str, workers: int) -> bool:
    async with aiohttp.ClientSession() as session, session.get(f"{admin_url}/workers") as answer:
        found = (await answer.json())["workers"]
    ranks = [rank for worker in found for rank in worker["kv"].get("ranks", ())]
    return len(ranks) == workers and all(rank["trusted"] and rank["pages"] for rank in ranks)


def _tokens_of(
    model: Path, text: Conversations, tools: list[Body], history: list[Body]
) -> dict[str, int]:
    """The prompt tokens of a request of each kind, as a worker computes them."""
    tokenizer = VllmTokenizer(str(model), _CONTEXT_TOKENS)
    messages = [*history, {"role": "user", "content": text.text(_QUESTION_BYTES)}]
    counts = {}
    for kind in KINDS:
        asked = vllm_readers[_PATH](json.dumps(kind.body(tools, messages)).encode())
        counts[kind.name] = len(tokenizer.encode_prompt(asked.prompts[0]))
    return counts


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--turns", type=int, default=6, help="of each agent")
    parser.add_argument("--rounds", type=int, default=300, help="requests of each kind in `path`")
    parser.add_argument("--policy", default="min_ttft", choices=("min_ttft", "cache_aware_zmq"))
    parser.add_argument("--part", choices=("fleet", "path"), help="only this one")
    return parser.parse_args(arguments)


async def main(options: argparse.Namespace) -> int:
    """Print the tables; 1 if a part does not start."""
    try:
        with tempfile.TemporaryDirectory(prefix="extproc-benchmark-") as name:
            folder = Path(name)
            model = _model_folder(folder)
            if options.part != "path":
                await _fleet(options, folder, model)
            if options.part != "fleet":
                await _path(options, folder, model)
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(run_until_signal(main(_options(None)))))
