"""The chart as it was, from which installations are upgraded: its first version."""

import tarfile
from pathlib import Path
from typing import Final

__all__ = ["unpack_earlier_chart"]

_ARCHIVE: Final = Path(__file__).parents[1] / "fixtures" / "chart-0.1.0.tgz"


def unpack_earlier_chart(folder: Path) -> Path:
    """Unpack it into a folder; gives the chart's own, which also has its values files."""
    with tarfile.open(_ARCHIVE) as archive:
        # Early releases of Python 3.11 have no filters for `extractall`.
        for member in archive:
            if (content := archive.extractfile(member)) is not None:
                path = folder / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
    return folder / "llm-extproc"
