"""Compiles protos/*.proto into extproc/_protos (modules and type stubs).

Run it after a change of a .proto file: `make protos`. The result is committed, so that an
installation needs no compiler; a test compares the committed descriptors with the sources.
"""

import sys
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

PROTO_DIR = Path(__file__).resolve().parent
OUTPUT_DIR = PROTO_DIR.parent / "extproc" / "_protos"


def compile_protos(output_dir: Path) -> int:
    """Write the Python modules of every .proto file to output_dir; returns protoc's exit code."""
    output_dir.mkdir(parents=True, exist_ok=True)
    well_known_types = files("grpc_tools") / "_proto"
    return int(
        protoc.main(
            [
                "protoc",
                f"--proto_path={PROTO_DIR}",
                f"--proto_path={well_known_types}",
                f"--python_out={output_dir}",
                f"--pyi_out={output_dir}",
                *sorted(str(source) for source in PROTO_DIR.glob("*.proto")),
            ]
        )
    )


if __name__ == "__main__":
    sys.exit(compile_protos(OUTPUT_DIR))
