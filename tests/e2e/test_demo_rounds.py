"""Short rounds of `extproc demo` in a process of its own, on the real Envoy."""

import asyncio
import signal
import sys

import pytest


async def demo(*arguments: str, seconds: int = 2) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "extproc", "demo", "--seconds", str(seconds), "--workers", "2"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_the_demo_ends_after_one_round_with_once() -> None:
    process = await demo("--once")
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    text = out.decode()
    assert "\x1b" not in text
    rows = [line.split() for line in text.splitlines() if "/" in line and "%" in line]
    assert [row[0] for row in rows] == ["round_robin", "cache_aware_zmq", "min_ttft"]
    for row in rows:
        done, _, planned = row[1].partition("/")
        assert done == planned
        assert row[2] == "0"
    assert "still serving" not in text


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
async def test_a_round_with_pairs_ends_well(engine: str) -> None:
    process = await demo("--pd", "--once", "--engine", engine, seconds=4)
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    text = out.decode()
    rows = [line.split() for line in text.splitlines() if "/" in line and "%" in line]
    assert [row[0] for row in rows] == ["round_robin", "cache_aware_zmq", "min_ttft"]
    answered = 0
    for row in rows:
        done, _, planned = row[1].partition("/")
        assert done == planned
        answered += int(done)
        # One prefill worker has all the prompts, and finds what was said before.
        assert row[3] != "0.0%"
        assert row[-1] == "1.00"
    assert f"pairs of workers: {answered} ok; decode workers picked: {answered} same_host" in text
    assert "0 requests went elsewhere than decided; load left over: 0" in text


async def test_workers_like_vllm_need_no_configuration() -> None:
    process = await demo("--engine", "vllm", "--once", seconds=4)
    out, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
    text = out.decode()
    rows = {line.split()[0]: line.split() for line in text.splitlines() if "%  " in line}
    assert [*rows] == ["round_robin", "cache_aware_zmq", "min_ttft"]
    hits = {policy: float(row[3].rstrip("%")) for policy, row in rows.items()}
    # Load alone would give every policy the hits of round_robin.
    assert hits["cache_aware_zmq"] > hits["round_robin"]


async def test_without_once_the_demo_serves_until_a_signal() -> None:
    process = await demo("--policy", "round_robin")
    assert process.stdout is not None
    lines = []
    async for line in process.stdout:
        lines.append(line.decode())
        if "/metrics" in lines[-1]:
            break
    assert any("curl -i -N" in line for line in lines)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")
