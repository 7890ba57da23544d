"""The command: its options and exit codes."""

import argparse

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
