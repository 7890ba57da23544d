"""The command: its options and settings."""

import argparse

import pytest

from extproc.cli import main
from extproc.simulator import cli
from extproc.simulator.settings import SimulatorSettings


def test_bad_settings_name_the_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--page-size", "0"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("page_size:")


def test_no_workers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["simulate", "--workers", "0"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "--workers: expected a number from 1 to 256" in captured.err


def test_workers_beyond_the_last_port_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--workers", "2", "--port", "65535"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("port:")


def test_workers_in_a_row_have_ports_in_a_row() -> None:
    settings = SimulatorSettings(port=100, dp_size=4, kv_events_port=200, kv_replay_port=300)
    row = [cli.in_a_row(settings, number) for number in range(3)]
    assert [each.port for each in row] == [100, 101, 102]
    assert [each.kv_events_port for each in row] == [200, 204, 208]
    assert [each.kv_replay_port for each in row] == [300, 304, 308]
    assert [each.kv_load_port for each in row] == [0, 0, 0]
    assert [each.disaggregation_bootstrap_port for each in row] == [8998, 8999, 9000]
    assert [each.nixl_side_channel_port for each in row] == [0, 0, 0]
    free = SimulatorSettings(disaggregation_bootstrap_port=0, nixl_side_channel_port=10)
    assert cli.in_a_row(free, 1).disaggregation_bootstrap_port == 0
    assert cli.in_a_row(free, 1).nixl_side_channel_port == 11


def test_the_defaults_are_those_of_the_settings() -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    given = vars(parser.parse_args([]))
    assert given.pop("workers") == 1
    assert SimulatorSettings(**given) == SimulatorSettings()


@pytest.mark.parametrize(
    "fields",
    [
        {"port": 70_000},
        {"model": ""},
        {"prefill_tokens_per_second": 0},
        {"decode_milliseconds_per_token": -1},
        {"dp_size": 0},
        {"kv_events_port": 70_000},
        {"host_cache_tokens": -1},
        {"disaggregation_bootstrap_port": -1},
        {"nixl_side_channel_port": 70_000},
        {"bootstrap_timeout_seconds": 0},
        {"api_key": ""},
    ],
)
def test_invalid_settings_are_refused(fields: dict[str, object]) -> None:
    (name,) = fields
    with pytest.raises(ValueError, match=name):
        SimulatorSettings(**fields)  # type: ignore[arg-type]
