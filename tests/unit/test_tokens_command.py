"""`extproc tokens`: ids on standard output, or the reason on standard error."""

import json
from pathlib import Path
from typing import Any

import pytest

from extproc.cli import main
from tests.engines.bodies import all_bodies
from tests.engines.vectors import MODELS, read_vectors, vector_files

CHAT = "/v1/chat/completions"
HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def tokens(body: Path, *more: str, path: str = CHAT, model: str = "tools") -> int:
    command = ["tokens", "--tokenizer", str(MODELS / model), "--path", path, "--body", str(body)]
    return main([*command, *more])


@pytest.fixture
def body(tmp_path: Path) -> Path:
    file = tmp_path / "body.json"
    file.write_text(json.dumps(HELLO))
    return file


@pytest.mark.parametrize("engine", ["vllm", "vllm@0.32.0", "sglang", "sglang@0.5.23"])
def test_the_ids_are_printed_as_an_array(
    body: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokens(body, "--engine", engine) == 0
    out, err = capsys.readouterr()
    ids = json.loads(out)
    assert ids
    assert all(type(one) is int for one in ids)
    assert err == ""


def test_they_are_those_of_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = read_vectors(vector_files("vllm")[-1])["models"]["tools"]["answers"]
    tried = [one for one in all_bodies() if one.name.startswith("tools/")][:20]
    for one in tried:
        answer = answers[one.name]
        if "refused" in answer:
            continue
        file = tmp_path / "body.json"
        file.write_bytes(one.data)
        if tokens(file, "--engine", "vllm", path=one.path) == 0:
            assert json.loads(capsys.readouterr().out) == answer["prompts"][0], one.name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": 5}, "no tokens: malformed"),
        ({"chat_template": "x"}, "no tokens: unsupported, because of chat_template"),
        ({"model": 5}, "no tokens: bad request: `model` must be a string"),
    ],
)
def test_without_tokens_the_reason_is_said_and_the_code_is_3(
    body: Path, change: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    body.write_text(json.dumps(HELLO | change))
    assert tokens(body, "--engine", "vllm") == 3
    assert capsys.readouterr() == ("", f"{said}\n")


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        ([], 2, "--engine"),
        (["--engine", "tgi"], 2, "tgi"),
        (["--engine", "vllm", "--chat-template-kwargs", "["], 2, "--chat-template-kwargs"),
        (["--engine", "vllm", "--chat-template-name", "x"], 1, "x"),
    ],
)
def test_wrong_options_are_named(
    body: Path, more: list[str], code: int, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokens(body, *more) == code
    assert named in capsys.readouterr().err


def test_a_missing_file_or_service_is_named(
    tmp_path: Path, body: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tokens(tmp_path / "none.json", "--engine", "vllm") == 1
    assert "none.json" in capsys.readouterr().err
    asked = ["tokens", "--admin", "http://127.0.0.1:9", "--path", CHAT, "--body", str(body)]
    assert main(asked) == 1
    assert "http://127.0.0.1:9 cannot be asked" in capsys.readouterr().err


def test_options_of_the_template_are_used(body: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokens(body, "--engine", "vllm") == 0
    plain = capsys.readouterr().out
    kwargs = ("--chat-template-kwargs", '{"enable_thinking": false}')
    assert tokens(body, "--engine", "vllm", *kwargs) == 0
    assert capsys.readouterr().out != plain
