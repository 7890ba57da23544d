"""What became of the last change of the configuration file, for operators.

Separate from the code that reloads, since the admin server shows it and stands below that.
"""

from msgspec import Struct

__all__ = ["ReloadStatus"]


class ReloadStatus(Struct, kw_only=True):
    """The configuration in use, and why the file on disk is another one, if it is.

    `loaded_at` and `refused_at` are in seconds since 1970; `problems` are those of the refused
    file, each led by its key. `envoy_config_outdated` is true if Envoy's file would be rendered
    differently than at the start of this service.
    """

    file: str
    loaded_at: float
    applied: int = 0
    refused: int = 0
    refused_at: float | None = None
    problems: list[str] = []
    envoy_config_outdated: bool = False
