"""Measures routing by tokens and KV pages, from the body to the decision.

    python -m benchmarks.kv_path [--pairs 5] [--seconds 10] [--policy min_ttft]

Every request is the next turn of a conversation of 33 KB. One of the workers holds its history;
its question, 2 KB by default, is new. The arms are those of extproc_overhead. Simulated workers
that served the history once publish the KV events. The requests go to a fake upstream that
costs nothing.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks.conversations import Conversations, write_model_folder
from benchmarks.extproc_overhead import Plan, publish, run_once
from benchmarks.figures import Run, Setting, pair_order
from benchmarks.rig import MODEL, KvBlock, run_until_signal, running_rig
from benchmarks.wrk import WrkError, conversation_script, find_wrk
from extproc.testing.stack import ManagedProcess, StackError, free_ports, wait_until

_WORKERS: Final = 3
_TURNS: Final = 7
_SENTENCES: Final = 400
_TAIL: Final = json.dumps({"model": MODEL, "max_tokens": 64})[1:]


async def measure(options: argparse.Namespace, plan: Plan, folder: Path) -> list[Run]:
    model_folder = folder / "model"
    model_folder.mkdir()
    write_model_folder(model_folder)
    text = Conversations()
    (size,) = plan.body_bytes
    histories = [
        text.messages(_TURNS, size - options.question_bytes) for _ in range(options.conversations)
    ]
    script_file = folder / "conversations.lua"
    script_file.write_text(
        conversation_script(
            [_head(history) for history in histories],
            [json.dumps(text.text(60))[1:-1] for _ in range(_SENTENCES)],
            '"}],' + _TAIL,
            options.question_bytes,
        )
    )
    runs: list[Run] = []
    model = {"policy": options.policy, "tokenizer_path": str(model_folder)}
    async with (
        _holders(folder, model_folder, histories) as blocks,
        running_rig(folder, model=model, kv_blocks=blocks) as rig,
    ):
        await wait_until(lambda: _knows_all(rig.admin_url), "the service knows the histories")
        for pair in range(plan.pairs):
            for connections in plan.concurrency:
                setting = Setting(size, connections)
                for arm in pair_order(pair):
                    runs.append(await run_once(rig, arm, setting, script_file, pair, plan.seconds))
        print(await _decisions(rig.admin_url))
    return runs


def _head(history: Sequence[dict[str, Any]]) -> str:
    """A body up to the text of its last message."""
    messages = [*history, {"role": "user", "content": ""}]
    return json.dumps({"messages": messages}).removesuffix('"}]}')


@contextlib.asynccontextmanager
async def _holders(
    folder: Path, model_folder: Path, histories: Sequence[Sequence[dict[str, Any]]]
) -> AsyncIterator[list[KvBlock]]:
    """Start simulated workers that each hold a share of the histories; yields their KV settings."""
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        urls: list[str] = []
        blocks: list[KvBlock] = []
        for port in free_ports(_WORKERS):
            argv = [
                *(sys.executable, "-m", "extproc", "simulate", "--model", MODEL),
                *("--port", str(port), "--kv-events-port", "0"),
                *("--tokenizer-path", str(model_folder)),
                *("--prefill-tokens-per-second", "1e9"),
                *("--decode-milliseconds-per-token", "0"),
            ]
            holder = ManagedProcess(f"holder {port}", argv, folder / f"holder-{port}.log")
            stack.push_async_callback(holder.stop)
            await holder.start()
            url = f"http://127.0.0.1:{port}"
            urls.append(url)

            async def announces(url: str = url) -> bool:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{url}/server_info") as answer:
                        blocks.append((await answer.json())["kv_events"])
                        return True
                return False

            await holder.wait_ready(announces)
        for number, history in enumerate(histories):
            body = {"model": MODEL, "messages": history, "max_tokens": 1}
            url = urls[number % _WORKERS]
            async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
        yield blocks


async def _knows_all(admin_url: str) -> bool:
    async with aiohttp.ClientSession() as session, session.get(f"{admin_url}/workers") as answer:
        workers = (await answer.json())["workers"]
    ranks = [rank for worker in workers for rank in worker["kv"].get("ranks", ())]
    return len(ranks) == _WORKERS and all(rank["trusted"] and rank["pages"] for rank in ranks)


async def _decisions(admin_url: str) -> str:
    """Reasons and hit rate, to show that the intended path was measured."""
    async with aiohttp.ClientSession() as session, session.get(f"{admin_url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    wanted = ("extproc_decisions_total{", "extproc_prompt_tokens_t", "extproc_cached_tokens_t")
    return "\n".join(line for line in lines if line.startswith(wanted))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="runs of each arm and setting")
    parser.add_argument("--seconds", type=int, default=10, help="length of a run")
    parser.add_argument("--body-bytes", type=int, default=33_000)
    parser.add_argument("--question-bytes", type=int, default=2000, help="new in every request")
    parser.add_argument("--conversations", type=int, default=48)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--policy", default="min_ttft", choices=("min_ttft", "cache_aware_zmq"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all runs")
    return parser.parse_args(arguments)


async def _main(options: argparse.Namespace) -> int:
    plan = Plan(
        pairs=options.pairs,
        seconds=options.seconds,
        body_bytes=[options.body_bytes],
        concurrency=options.concurrency,
    )
    try:
        find_wrk()
        with tempfile.TemporaryDirectory(prefix="extproc-benchmark-") as folder:
            runs = await measure(options, plan, Path(folder))
    except (WrkError, StackError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    publish(plan, runs, options.json)
    return 0 if all(run.valid for run in runs) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(run_until_signal(_main(_options(None)))))
