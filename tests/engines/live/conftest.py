"""Real engines for all tests of this folder; `make test-engines` installs them and runs these."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest

from tests.engines.live.servers import Pair, Servers, start_together
from tests.engines.live.sglang import PORTS as SGLANG_PORTS
from tests.engines.live.sglang import sglang_server
from tests.engines.live.vllm import PORTS, model_folder, vllm_server
from tests.engines.vectors import MODELS

_VLLM: Final = os.environ.get("ENGINE_VLLM")
_SGLANG: Final = os.environ.get("ENGINE_SGLANG")
# Without that command there is nothing to test against.
collect_ignore_glob = [
    pattern
    for engine, pattern in ((_VLLM, "test_vllm_*.py"), (_SGLANG, "test_sglang_*.py"))
    if not engine
]


_PAIRS = pytest.StashKey[dict[str, Pair]]()
_SERVERS = pytest.StashKey[Servers]()
_FOLDER = pytest.StashKey[TemporaryDirectory[str]]()


def _vllm_pair(
    name: str, *flags: str, windowed: bool = False, **env: str
) -> Callable[[Servers, Path], Pair]:
    def make(servers: Servers, folder: Path) -> Pair:
        model = model_folder(folder, name, windowed=windowed)
        engine = Path(_VLLM or "")
        two = [
            servers.add(
                PORTS, lambda ports, log: vllm_server(engine, model, ports, log, *flags, **env)
            )
            for _ in range(2)
        ]
        return Pair(model, two)

    return make


def _sglang_pair(name: str, *flags: str) -> Callable[[Servers, Path], Pair]:
    def make(servers: Servers, folder: Path) -> Pair:
        model, engine = MODELS / name, Path(_SGLANG or "")
        two = [
            servers.add(
                SGLANG_PORTS, lambda ports, log: sglang_server(engine, model, ports, log, *flags)
            )
            for _ in range(2)
        ]
        return Pair(model, two)

    return make


# By the parameter of `pair`.
_MAKERS: Final = {
    "qwen": _vllm_pair("tools"),
    # With its endpoints that render.
    "llama": _vllm_pair("bos", "--enable-scale-out"),
    "gemma": _vllm_pair("parts", windowed=True),
    "adapters": _vllm_pair(
        "plain",
        *("--enable-lora", "--max-loras", "2", "--max-cpu-loras", "8"),
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
    ),
    "pages-of-16": _sglang_pair(
        "tools",
        *("--page-size", "16", "--tool-call-parser", "qwen25", "--reasoning-parser", "qwen3"),
    ),
    "pages-of-1": _sglang_pair("bos", "--page-size", "1", "--tool-call-parser", "qwen25"),
}


def pytest_collection_finish(session: pytest.Session) -> None:
    """Before the first test: what a test opens belongs to that test."""
    calls = (getattr(item, "callspec", None) for item in session.items)
    needed = {call.params["pair"] for call in calls if call and "pair" in call.params}
    if not needed or session.config.option.collectonly:
        return
    stash = session.config.stash
    folder = stash[_FOLDER] = TemporaryDirectory(prefix="engines-")
    servers = stash[_SERVERS] = Servers(Path(folder.name))
    pairs = {name: _MAKERS[name](servers, Path(folder.name)) for name in sorted(needed)}
    start_together([server for pair in pairs.values() for server in pair.servers])
    stash[_PAIRS] = pairs


def pytest_unconfigure(config: pytest.Config) -> None:
    if _SERVERS in config.stash:
        config.stash[_SERVERS].close()
    if _FOLDER in config.stash:
        config.stash[_FOLDER].cleanup()


@pytest.fixture
def own_servers(tmp_path: Path) -> Iterator[Servers]:
    """Servers for one test alone, which it starts itself; they are stopped at its end."""
    folder = tmp_path / "engines"
    folder.mkdir()
    with Servers(folder) as servers:
        yield servers


@pytest.fixture
def vllm_engine() -> Path:
    """The environment in which vLLM is installed."""
    return Path(_VLLM or "")


@pytest.fixture
def sglang_engine() -> Path:
    """The environment in which SGLang is installed."""
    return Path(_SGLANG or "")


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    """Two servers with the model that the test names, as `parametrize(..., indirect=True)`."""
    return request.config.stash[_PAIRS][request.param]
