"""The commands by which the pages begin, as lists of arguments."""

import re
import shlex
from pathlib import Path
from typing import Final

__all__ = ["ROOT", "START", "commands_in"]

ROOT: Final = Path(__file__).parents[2]
# Pages, and the heading above their commands.
START: Final = {
    "README.md": "## Kubernetes: a start in five commands",
    "helm/llm-extproc/README.md": "## From no release to an answered request",
}


def commands_in(page: str) -> list[list[str]]:
    """The commands of the first block below the page's heading, without prompts and comments."""
    _, _, text = (ROOT / page).read_text(encoding="utf-8").partition(START[page])
    found = re.search(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found is not None, page
    lines = [line.removeprefix("$ ") for line in found[1].splitlines()]
    return [shlex.split(line, comments=True) for line in lines]
