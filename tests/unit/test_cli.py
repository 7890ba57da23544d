"""The command line: exit codes, and the contents of standard output and standard error."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from extproc import __version__
from extproc.cli import main
from tests.unit.configs import raw_config, written
from tests.unit.simulator.model_folders import model_folder

BAD = raw_config(
    models=[{"id": "m", "policy": "foo"}], server={"port": 0, "prot": 1}, envoy={"port": 9090}
)
BAD_KEYS = {"models[0].policy", "server.port", "server.prot", "envoy.port"}


def keys(text: str) -> set[str]:
    return {line.partition(": ")[0] for line in text.splitlines()}


def test_the_version_is_printed() -> None:
    command = [sys.executable, "-m", "extproc", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"extproc {__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["serve"], ["check"], ["envoy-config"], ["check", "--config", "f", "--x"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage" in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *(
            [name, "--help"]
            for name in ("serve", "check", "envoy-config", "schema", "simulate", "demo")
        ),
    ],
)
def test_every_command_explains_itself(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert "usage: extproc" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["serve", "check", "envoy-config"])
def test_a_bad_configuration_is_2_and_every_problem_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, "--config", written(tmp_path, BAD)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert keys(captured.err) == BAD_KEYS


@pytest.mark.parametrize("command", ["serve", "check", "envoy-config"])
def test_a_missing_configuration_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    path = str(tmp_path / "none.yaml")
    assert main([command, "--config", path]) == 2
    assert path in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_missing_file_the_service_needs_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    raw = raw_config(
        workers={"api_key_file": str(tmp_path / "key"), "ca_file": str(tmp_path / "ca")}
    )
    assert main([command, "--config", written(tmp_path, raw)]) == 2
    assert keys(capsys.readouterr().err) >= {"workers.api_key_file", "workers.ca_file"}


def test_check_says_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, raw_config())
    assert main(["check", "--config", path]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (f"{path}: good\n", "")


def test_envoy_config_prints_yaml_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["envoy-config", "--config", written(tmp_path, raw_config())]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    documents: list[Any] = list(yaml.safe_load_all(captured.out))
    assert len(documents) == 1
    assert "static_resources" in documents[0]


def test_envoy_config_needs_no_file_the_service_needs(tmp_path: Path) -> None:
    raw = raw_config(workers={"api_key_file": str(tmp_path / "elsewhere")})
    assert main(["envoy-config", "--config", written(tmp_path, raw)]) == 0


def test_envoy_config_writes_a_file_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(tmp_path, raw_config()), tmp_path / "envoy.yaml"
    assert main(["envoy-config", "--config", path]) == 0
    printed = capsys.readouterr().out
    assert main(["envoy-config", "--config", path, "--output", str(out)]) == 0
    assert capsys.readouterr() == ("", "")
    assert out.read_text(encoding="utf-8") == printed


def test_an_output_that_cannot_be_written_ends_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "none" / "envoy.yaml")
    path = written(tmp_path, raw_config())
    assert main(["envoy-config", "--config", path, "--output", out]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert out in captured.err


def test_a_variable_that_no_template_can_get_is_refused_as_a_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {
        "id": "m",
        "tokenizer_path": model_folder(tmp_path),
        "chat_template_kwargs": {"messages": [], "thinking": True, "add_generation_prompt": False},
    }
    assert main(["check", "--config", written(tmp_path, raw_config(models=[model]))]) == 2
    assert capsys.readouterr().err == (
        "models[0].chat_template_kwargs: not for the template: add_generation_prompt, messages\n"
    )
