"""Loads the scripts that the chart puts into pods; they are not part of a package."""

import importlib.util
from types import ModuleType

from helm.generate import CHART

__all__ = ["load_script"]


def load_script(name: str) -> ModuleType:
    path = CHART / "files" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
