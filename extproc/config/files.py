"""Checks the files that a configuration names, and the environment variable of a token.

Separate from the rules because Envoy's configuration may be rendered on another machine, where
these files do not exist.
"""

import os
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from extproc.config.regular_file import read_regular_file
from extproc.config.rules import API_KEY
from extproc.config.schema import Config
from extproc.config.server import ServerConfig

__all__ = ["file_problems", "read_admin_token", "read_api_key"]

# Certificate bundles of whole systems have about 250 KB.
_FILE_MAX_BYTES: Final = 4 * 1024 * 1024


def file_problems(config: Config) -> list[str]:
    """Each file that the service needs and cannot use, as `key: sentence`."""
    workers, tls = config.workers, config.server.tls
    problems = [
        _file_problem("workers.api_key_file", workers.api_key_file, read_api_key),
        _file_problem("workers.ca_file", workers.ca_file, _load_bundle),
        _file_problem("server.admin_token_file", config.server.admin_token_file, read_api_key),
        _variable_problem(config.server.admin_token_env),
    ]
    if tls is not None:

        def load_pair(path: Path) -> None:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path, tls.key_file)

        problems += [
            _file_problem("server.tls.key_file", tls.key_file, _any),
            _file_problem("server.tls.cert_file", tls.cert_file, load_pair),
            _file_problem("server.tls.client_ca_file", tls.client_ca_file, _load_bundle),
        ]
    for key, name in (
        ("server.unix_socket", config.server.unix_socket),
        ("envoy.endpoints_file", config.envoy.endpoints_file),
    ):
        if name is not None and not _is_folder(folder := Path(name).parent):
            problems.append(f"{key}: the folder {folder} does not exist")
    return [problem for problem in problems if problem is not None]


def read_api_key(path: Path) -> str:
    """Read the token in a file, without blanks around it; raises ValueError or OSError."""
    try:
        key = read_regular_file(path, _FILE_MAX_BYTES).decode("ascii").strip()
    except UnicodeDecodeError:
        raise ValueError("expected printable ASCII") from None
    return _checked(key)


def read_admin_token(
    server: ServerConfig, environment: Mapping[str, str] = os.environ
) -> str | None:
    """Read the token of the admin server, if one is configured.

    Raises ValueError or OSError if it cannot be used, which `file_problems` reports first.
    """
    if server.admin_token_file is not None:
        return read_api_key(Path(server.admin_token_file))
    if server.admin_token_env is not None:
        return _checked(environment.get(server.admin_token_env, ""))
    return None


def _checked(token: str) -> str:
    if not API_KEY.fullmatch(token):
        raise ValueError("expected one token of printable ASCII without blanks")
    return token


def _variable_problem(name: str | None) -> str | None:
    if name is None:
        return None
    if not os.environ.get(name):
        return f"server.admin_token_env: the environment variable {name} is not set"
    if not API_KEY.fullmatch(os.environ[name]):
        return (
            f"server.admin_token_env: the environment variable {name} must hold one token of "
            "printable ASCII without blanks"
        )
    return None


def _any(_: Path) -> None:
    """Any content will do; the certificate is loaded with it."""


def _load_bundle(path: Path) -> None:
    ssl.create_default_context(cafile=path)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _file_problem(key: str, name: str | None, load: Callable[[Path], object]) -> str | None:
    if name is None:
        return None
    try:
        content = read_regular_file(Path(name), _FILE_MAX_BYTES)
        if not load(Path(name)) and not content.strip():
            return f"{key}: {name} is empty"
    except ssl.SSLError:
        return f"{key}: {name} has no usable PEM certificate or key"
    except OSError as error:
        return f"{key}: {name} cannot be read: {error.strerror}"
    except ValueError as error:
        return f"{key}: {name} cannot be used: {error}"
    return None
