"""How a vLLM server is started on a CPU, with a random model of one of four kinds."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

from tests.engines.live.servers import EngineServer
from tests.engines.vectors import MODELS

__all__ = ["BLOCK", "PORTS", "model_folder", "vllm_server"]

# CPU attention takes multiples of 32.
BLOCK: Final = 32
# HTTP, events, replay, and one for a transfer of pages.
PORTS: Final = 4
_BLOCKS: Final = 400
_MODEL_TOKENS: Final = 2048
_ENVIRONMENT: Final = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
# Every second layer looks back only so many tokens.
_WINDOW_TOKENS: Final = 128
_GEMMA: Final[dict[str, Any]] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window": _WINDOW_TOKENS,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 32,
    "rope_local_base_freq": 10000.0,
}


def model_folder(folder: Path, name: str, *, windowed: bool = False) -> Path:
    """A copy of a model of the vectors; `windowed` makes it one like Gemma 3."""
    path = folder / (f"{name}-windowed" if windowed else name)
    shutil.copytree(MODELS / name, path)
    if windowed:
        config = json.loads((path / "config.json").read_text()) | _GEMMA
        (path / "config.json").write_text(json.dumps(config))
    return path


def vllm_server(
    engine: Path, model: Path, ports: list[int], log: Path, *flags: str, **env: str
) -> EngineServer:
    """A server from the environment in `engine`, which is started later."""
    port, events, replay, transfer = ports
    publisher = {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": f"tcp://*:{events}",
        "replay_endpoint": f"tcp://*:{replay}",
        "topic": "",
    }
    argv = [
        *(str(engine / "bin" / "vllm"), "serve", str(model)),
        *("--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)),
        *("--load-format", "dummy", "--enforce-eager", "--seed", "1"),
        *("--max-model-len", str(_MODEL_TOKENS), "--block-size", str(BLOCK)),
        *("--num-gpu-blocks-override", str(_BLOCKS)),
        *("--enable-prefix-caching", "--enable-prompt-tokens-details"),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
        *("--kv-events-config", json.dumps(publisher)),
        *flags,
    ]
    env = {**_ENVIRONMENT, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(transfer), **env}
    return EngineServer(argv, env, port, log)
