"""Makes random LoRA adapters for the small models of the vectors."""

import json
import struct
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["make_adapter"]

_RANK: Final = 8
# Input and output sizes of the layers' projections, of a model of 64 and heads of 32.
_PROJECTIONS: Final = {"q_proj": (64, 128), "v_proj": (64, 64)}
_LAYERS: Final = 2
# The weights of the models are about a thousandth: the adapter must change the answers.
_SPREAD: Final = 30.0


def make_adapter(folder: Path, name: str) -> Path:
    """A folder with an adapter in the form of PEFT; other names have other weights."""
    path = folder / name
    path.mkdir()
    config = {
        "peft_type": "LORA",
        "r": _RANK,
        "lora_alpha": 64,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(_PROJECTIONS),
        "base_model_name_or_path": "m",
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng(list(name.encode()))
    tensors: dict[str, NDArray[np.float32]] = {}
    for layer in range(_LAYERS):
        for projection, (size, out) in _PROJECTIONS.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            for part, shape in (("lora_A", (_RANK, size)), ("lora_B", (out, _RANK))):
                weights = random.normal(0.0, _SPREAD, shape).astype(np.float32)
                tensors[f"{prefix}.{part}.weight"] = weights
    _write(path / "adapter_model.safetensors", tensors)
    return path


def _write(
    path: Path, tensors: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]
) -> None:
    """Write tensors as https://github.com/huggingface/safetensors describes the format."""
    head, at = {}, 0
    for name, one in tensors.items():
        head[name] = {
            "dtype": "F32",
            "shape": list(one.shape),
            "data_offsets": [at, at + one.nbytes],
        }
        at += one.nbytes
    encoded = json.dumps(head).encode()
    path.write_bytes(
        struct.pack("<Q", len(encoded))
        + encoded
        + b"".join(one.tobytes() for one in tensors.values())
    )
