"""The token of the admin server, over a real socket."""

from pathlib import Path
from typing import Any

import pytest
import structlog

from extproc.config.files import file_problems
from extproc.config.server import ServerConfig
from tests.unit.admin.test_admin_http import running
from tests.unit.configs import at, config, problem_of

TOKEN = "s3cret-token"
PAGES = ["/metrics", "/workers", "/config", "/not-a-page"]


def token_file(folder: Path, text: str = f"{TOKEN}\n") -> str:
    path = folder / "token"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "sent",
    [
        None,
        "Bearer",
        "Bearer ",
        "Bearer s3cret-toke",
        "Bearer s3cret-tokenn",
        "Basic s3cret-token",
        "s3cret-token",
        "Bearer s3cret-tok\u00e9n",
        "Bearer " + "x" * 8000,
    ],
)
@pytest.mark.parametrize("page", PAGES)
async def test_pages_need_the_token(tmp_path: Path, page: str, sent: str | None) -> None:
    async with running(admin_token_file=token_file(tmp_path)) as admin:
        headers = {} if sent is None else {"authorization": sent}
        async with admin.session.get(page, headers=headers) as response:
            assert (response.status, await response.read()) == (401, b"")
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_the_token_opens_the_pages(tmp_path: Path, scheme: str) -> None:
    async with running(admin_token_file=token_file(tmp_path)) as admin:
        seen = []
        for page in PAGES:
            headers = {"authorization": f"{scheme} {TOKEN}"}
            async with admin.session.get(page, headers=headers) as response:
                seen.append(response.status)
        assert seen == [200, 200, 200, 404]


async def test_the_token_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_TOKEN", TOKEN)
    async with running(admin_token_env="ADMIN_TOKEN") as admin:
        assert (await admin.get("/workers"))[0] == 401
        headers = {"authorization": f"Bearer {TOKEN}"}
        async with admin.session.get("/workers", headers=headers) as response:
            assert response.status == 200


async def test_probes_need_no_token(tmp_path: Path) -> None:
    async with running(admin_token_file=token_file(tmp_path)) as admin:
        admin.ready = True
        assert [(await admin.get(path))[0] for path in ("/healthz", "/readyz")] == [200, 200]


async def test_without_a_token_in_the_configuration_all_pages_are_open() -> None:
    async with running() as admin:
        assert [(await admin.get(page))[0] for page in PAGES] == [200, 200, 200, 404]


@pytest.mark.parametrize(
    ("host", "with_token", "warned"),
    [
        ("127.0.0.1", False, False),
        ("localhost", False, False),
        ("0.0.0.0", False, True),
        ("0.0.0.0", True, False),
    ],
)
async def test_an_open_server_that_others_can_reach_is_warned_of(
    tmp_path: Path, host: str, with_token: bool, warned: bool
) -> None:
    settings: dict[str, Any] = {"admin_host": host}
    if with_token:
        settings["admin_token_file"] = token_file(tmp_path)
    with structlog.testing.capture_logs() as logs:
        async with running(**settings):
            pass
    assert [log["event"] for log in logs] == ["admin_port_without_token"] * warned


def test_the_admin_server_listens_on_loopback_by_default() -> None:
    assert not ServerConfig().admin_is_exposed


@pytest.mark.parametrize("text", ["", "\n", "two words", "caf\u00e9"])
def test_a_file_without_a_usable_token_is_a_problem(tmp_path: Path, text: str) -> None:
    server = {"admin_token_file": token_file(tmp_path, text)}
    (problem,) = file_problems(config(server=server))
    assert problem.startswith("server.admin_token_file: ")
    assert text.strip() not in problem or not text.strip()


def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    (problem,) = file_problems(config(server={"admin_token_file": str(tmp_path / "none")}))
    assert problem.startswith("server.admin_token_file: ")


@pytest.mark.parametrize("text", [None, "", "two words"])
def test_a_variable_without_a_usable_token_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    monkeypatch.delenv("ADMIN_TOKEN", raising=False)
    if text is not None:
        monkeypatch.setenv("ADMIN_TOKEN", text)
    (problem,) = file_problems(config(server={"admin_token_env": "ADMIN_TOKEN"}))
    assert problem.startswith("server.admin_token_env: the environment variable ADMIN_TOKEN ")


def test_only_one_source_of_the_token_can_be_given() -> None:
    raw = at("server.admin_token_file", "/a")
    raw["server"]["admin_token_env"] = "A"
    assert problem_of(raw).startswith("server.admin_token_env: ")
