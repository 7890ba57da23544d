"""LLM request routing behind Envoy.

Envoy terminates HTTP and streaming; for every request it asks this package's gRPC service
(``ext_proc``) which worker should serve it. docs/architecture.md is the map of the packages;
import contracts in pyproject.toml hold their order.
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("llm-extproc")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
