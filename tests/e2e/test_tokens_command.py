"""`extproc tokens --admin`: a running service says the tokens by which it routes."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Launch
from tests.engines.vectors import MODELS

CHAT = "/v1/chat/completions"
TOKEN = "let-me-see-tokens"
BODY = {"model": "m", "messages": [{"role": "user", "content": "héllo"}]}


async def command(*arguments: str, token: str | None = TOKEN) -> tuple[int, str, str]:
    """Run `extproc tokens`; returns its exit code, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "extproc", "tokens", *arguments),
        env={} if token is None else {"EXTPROC_ADMIN_TOKEN": token},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_service_says_the_tokens_that_it_makes(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    path = str(MODELS / "tools")
    running = await launch(
        1,
        worker={"page_size": 16, "kv_events_port": 0, "tokenizer_path": path},
        settings={
            "models": [{"id": "m", "policy": "min_ttft", "tokenizer_path": path}],
            "server": {"admin_token_env": "ADMIN_TOKEN"},
        },
    )
    file = tmp_path / "body.json"
    file.write_text(json.dumps(BODY))
    asked = ["--admin", running.stack.admin_url, "--path", CHAT, "--body", str(file)]
    code, out, err = await command(*asked)
    assert (code, err) == (0, "")
    made = ["--tokenizer", path, "--engine", "sglang", "--path", CHAT, "--body", str(file)]
    assert await command(*made, token=None) == (0, out, "")

    code, _, err = await command(*asked, "--engine", "vllm")
    assert (code, "no workers with vllm" in err) == (2, True)
    file.write_text(json.dumps(BODY | {"messages": 5}))
    assert await command(*asked) == (3, "", "no tokens: malformed\n")
    file.write_text(json.dumps(BODY | {"model": "other"}))
    code, _, err = await command(*asked)
    assert (code, "answered 404" in err) == (1, True)
    code, _, err = await command(*asked, token="wrong")
    assert (code, "answered 401" in err) == (1, True)


async def test_without_a_token_the_page_is_closed(launch: Launch, tmp_path: Path) -> None:
    running = await launch(1)
    file = tmp_path / "body.json"
    file.write_text(json.dumps(BODY))
    code, _, err = await command(
        "--admin", running.stack.admin_url, "--path", CHAT, "--body", str(file)
    )
    assert code == 1
    assert "answered 403" in err
    assert "admin_token_file" in err
