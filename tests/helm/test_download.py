"""The init container's command downloads a tokenizer from a hub, and nothing else."""

import asyncio
import hashlib
import os
import sys
from pathlib import Path
from typing import Final

from aiohttp import web

from helm.generate import CHART
from tests.helm.chart import render

REVISION: Final = "0e9e39f249a16976918f6564b8830bc894c89659"
FILES: Final = {
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"eos_token": "<eos>"}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "model-00001-of-00002.safetensors": b"weights",
    "README.md": b"text",
}


class Hub:
    """The part of a hub's API by which files of a revision are found and read."""

    def __init__(self) -> None:
        self.tokens: set[str | None] = set()
        app = web.Application()
        app.router.add_get("/api/models/{owner}/{name}/tree/{revision}", self._tree)
        app.router.add_route("*", "/{owner}/{name}/resolve/{revision}/{path:.+}", self._file)
        self._runner = web.AppRunner(app)

    async def start(self) -> str:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _tree(self, request: web.Request) -> web.Response:
        assert request.match_info["revision"] == REVISION
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
            for name, content in FILES.items()
        ]
        return web.json_response(entries)

    async def _file(self, request: web.Request) -> web.Response:
        assert request.match_info["revision"] == REVISION
        path = request.match_info["path"]
        content = FILES[path]
        self.tokens.add(request.headers.get("authorization"))
        headers = {"etag": f'"{_digest(content)}"', "x-repo-commit": REVISION}
        return web.Response(body=content, headers=headers)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


async def test_the_command_downloads_the_files_of_the_pinned_revision(tmp_path: Path) -> None:
    release, _ = render(CHART / "values" / "sglang-behind-a-gateway.yaml")
    (container,) = release.pod["spec"]["initContainers"]
    hub = Hub()
    address = await hub.start()
    variables = {one["name"]: one.get("value", "") for one in container["env"]}
    variables |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_secret"}
    command = [part.replace("/models", str(tmp_path)) for part in container["command"]]
    try:
        process = await asyncio.create_subprocess_exec(
            Path(sys.executable).parent / command[0],
            *command[1:],
            env={**variables, "PATH": os.environ["PATH"], "HOME": "/nonexistent"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await process.communicate()
    finally:
        await hub.stop()
    assert process.returncode == 0, out.decode()
    folder = tmp_path / "llama"
    found = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }
    assert found == set(FILES) - {"model-00001-of-00002.safetensors", "README.md"}
    assert (folder / "chat_template.jinja").read_bytes() == FILES["chat_template.jinja"]
    assert hub.tokens == {"Bearer hf_secret"}
