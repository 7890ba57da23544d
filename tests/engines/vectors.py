"""Reads and writes vectors: what an engine computes for each body. README.md says the format."""

import gzip
import json
from pathlib import Path
from typing import Any, Final

__all__ = ["MODELS", "MODEL_NAMES", "SEEING_NAMES", "read_vectors", "vector_files", "write_vectors"]

_HERE: Final = Path(__file__).parent
MODELS: Final = _HERE / "models"
MODEL_NAMES: Final = ("plain", "tools", "bos", "parts")
# Models that read images.
SEEING_NAMES: Final = ("seeing", "seeing_text")
_VECTORS: Final = _HERE / "vectors"


def vector_files(engine: str, kind: str = "") -> list[Path]:
    """The files of all versions of `engine` (`vllm` or `sglang`), of the `kind` ("media")."""
    return sorted((_VECTORS / kind).glob(f"{engine}-*.json.gz"))


def read_vectors(path: Path) -> dict[str, Any]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        read: dict[str, Any] = json.load(file)
    return read


def write_vectors(vectors: dict[str, Any], kind: str = "") -> Path:
    """The file has no time in it, so that the same vectors are the same bytes."""
    folder = _VECTORS / kind
    folder.mkdir(exist_ok=True)
    path = folder / f"{vectors['engine']}-{vectors['version']}.json.gz"
    text = json.dumps(vectors, separators=(",", ":"), ensure_ascii=True)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path
