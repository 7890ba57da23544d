"""Tests that only the indexer and the subscriptions need ZMQ."""

import subprocess
import sys
from pathlib import Path

import extproc.kv

_SOCKETS = {"indexer", "__init__"}


def test_every_other_module_is_imported_without_zmq() -> None:
    folder = Path(extproc.kv.__file__).parent
    modules = sorted(path.stem for path in folder.glob("*.py") if path.stem not in _SOCKETS)
    assert len(modules) > 10
    script = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(f'extproc.kv.{name}')\n"
        "print(sorted({'zmq', 'aiohttp', 'grpc'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
