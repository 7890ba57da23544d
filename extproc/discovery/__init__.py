"""Discovery backends: where the workers of an installation come from.

Each module is a backend: a class with the protocol `workers.source.WorkerSource`, which delivers
events about workers that appear and disappear. Begin with `static_urls`, the list in the
configuration. A new backend is added here and chosen in `build.build_manager`.
"""

__all__ = ["static_urls"]
