"""Notices that the configuration file, or a file that it names, has other content.

The files are polled, and their content is compared. That works for a file that is written in
place, for one that is replaced, and for a Kubernetes ConfigMap or Secret, where only a symbolic
link above the file changes. Notifications of the system miss the last, and a network file system
sends no notifications.
"""

import hashlib
from pathlib import Path
from typing import Final

from msgspec import Struct

from extproc.config.regular_file import read_regular_file
from extproc.config.schema import Config

__all__ = ["Seen", "named_files", "see"]

_CONTENT_MAX_BYTES: Final = 8 * 1024 * 1024
_GONE: Final = "gone"


class Seen(Struct, frozen=True):
    """The files at one moment: a digest by path, or a word for one that cannot be read."""

    digests: tuple[tuple[str, str], ...]


def named_files(path: Path, config: Config) -> tuple[Path, ...]:
    """The configuration file, and the files of certificates and keys that it names.

    Tokenizers are not among them: they are large, and do not change under a name.
    """
    workers, tls = config.workers, config.server.tls
    names = [workers.api_key_file, workers.ca_file]
    if tls is not None:
        names += [tls.cert_file, tls.key_file, tls.client_ca_file]
    return (path, *(Path(name) for name in names if name is not None))


def see(paths: tuple[Path, ...]) -> Seen:
    """Read the files. It blocks, and may run in a thread."""
    return Seen(tuple((str(path), _digest(path)) for path in paths))


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_regular_file(path, _CONTENT_MAX_BYTES)).hexdigest()
    except (OSError, ValueError):
        return _GONE
