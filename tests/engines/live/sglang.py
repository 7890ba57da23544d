"""How an SGLang server is started on a CPU, with a random model."""

import json
from pathlib import Path
from typing import Final

from tests.engines.live.servers import EngineServer

__all__ = ["PORTS", "sglang_server"]

# HTTP, events and replay.
PORTS: Final = 3
_CACHE_TOKENS: Final = 12_800
_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "OMP_NUM_THREADS": "1",
}


def sglang_server(
    engine: Path, model: Path, ports: list[int], log: Path, *flags: str
) -> EngineServer:
    """A server from the environment in `engine`, which is started later."""
    port, events, replay = ports
    publisher = {
        "publisher": "zmq",
        "endpoint": f"tcp://*:{events}",
        "replay_endpoint": f"tcp://*:{replay}",
        "topic": "",
    }
    argv = [
        *(str(engine / "bin" / "python"), "-m", "sglang.launch_server"),
        *("--model-path", str(model), "--served-model-name", "m"),
        *("--host", "127.0.0.1", "--port", str(port), "--load-format", "dummy"),
        *("--device", "cpu", "--attention-backend", "torch_native"),
        *("--sampling-backend", "pytorch", "--disable-overlap-schedule"),
        *("--disable-cuda-graph", "--skip-server-warmup", "--mem-fraction-static", "0.05"),
        *("--max-total-tokens", str(_CACHE_TOKENS), "--enable-cache-report"),
        # Otherwise each of them keeps a core busy.
        "--sleep-on-idle",
        *("--kv-events-config", json.dumps(publisher)),
        *flags,
    ]
    return EngineServer(
        argv, {**_ENVIRONMENT, "LD_LIBRARY_PATH": str(engine / "driver")}, port, log
    )
