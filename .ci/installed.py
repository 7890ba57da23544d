"""Checks the installed package: the files that git tracks, no others, and every module imports.

usage: python -I installed.py FILE   (FILE has the tracked files of the package, one a line)
"""

import importlib
import pkgutil
import sys
from importlib.metadata import files
from pathlib import Path

import extproc

installed = {
    str(path)
    for path in files("llm-extproc") or ()
    if path.suffix != ".pyc" and ".dist-info" not in path.parts[0] and path.parts[0] != ".."
}
tracked = set(Path(sys.argv[1]).read_text().split())
if installed != tracked:
    sys.exit(f"the wheel lacks {tracked - installed} and has besides {installed - tracked}")

modules = [module.name for module in pkgutil.walk_packages(extproc.__path__, "extproc.")]
for name in modules:
    if not name.endswith(".__main__"):
        importlib.import_module(name)
sys.stdout.write(f"wheel: {len(tracked)} files, {len(modules)} modules import\n")
