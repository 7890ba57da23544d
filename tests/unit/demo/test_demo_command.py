"""The command: its options, and a short round of it on the real Envoy."""

import argparse
import asyncio
import signal
import sys

import pytest

from extproc.cli import main
from extproc.demo import cli
from extproc.testing.stack import StackError


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_defaults() -> None:
    given = options()
    assert (given.once, given.policy, given.workers, given.seconds) == (False, None, 4, 24)
    assert not given.pd


def test_policies_are_repeated() -> None:
    given = options("--policy", "random", "--policy", "min_ttft", "--workers", "2")
    assert (given.policy, given.workers) == (["random", "min_ttft"], 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workers", "0"],
        ["--workers", "17"],
        ["--workers", "two"],
        ["--seconds", "0"],
        ["--seconds", "1.5"],
        ["--policy", "fastest"],
        ["--policy"],
        ["now"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--pd", "--workers", "1"], ["--workers", "1", "--pd"]])
def test_pairs_need_two_workers(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *arguments])
    assert caught.value.code == 2
    assert "--workers: with --pd at least 2" in capsys.readouterr().err


def test_a_part_that_does_not_start_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def demo(_: argparse.Namespace) -> int:
        raise StackError("envoy is not ready")

    monkeypatch.setattr(cli, "_demo", demo)
    assert cli.run(options()) == 1
    assert capsys.readouterr().err == "envoy is not ready\n"


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


async def test_a_round_with_pairs_ends_well() -> None:
    process = await demo("--pd", "--once", seconds=4)
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
