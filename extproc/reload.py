"""Applies a changed configuration to the running service, or says why it cannot.

A reload is all or nothing. The new file is read and checked as at the start; a key that needs a
restart, or a file that cannot be used, refuses the whole of it, and the configuration in use stays.
Separate from the application, which knows what to do with a good configuration.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import structlog

from extproc.config.changes import compare
from extproc.config.files import file_problems
from extproc.config.loading import load_config
from extproc.config.schema import Config
from extproc.config.status import ReloadStatus
from extproc.config.watch import Seen, named_files, see
from extproc.envoy_config import render_bootstrap, tls_contexts
from extproc.errors import ConfigError
from extproc.metrics.service import Metrics

__all__ = ["ReloadTarget", "Reloader"]

_log = structlog.get_logger()


class ReloadTarget(Protocol):
    """The service that is reconfigured."""

    async def prepare(self, config: Config) -> Callable[[], None]:
        """Do everything that may fail, and return what puts the configuration into use.

        Nothing changes before that is called. Raises ConfigError.
        """
        ...


class Reloader:
    """Follows the configuration file. One reload runs at a time, and the last change counts."""

    def __init__(self, path: Path, config: Config, target: ReloadTarget, metrics: Metrics) -> None:
        """`config` is the one in use, which was read from `path`."""
        self._path = path
        self._config = config
        self._target = target
        self._metrics = metrics
        self._asked = asyncio.Event()
        self._watched = named_files(path, config)
        # As it was when Envoy's file was rendered, as far as this service knows.
        self._config_at_start = config
        self._rendered_at_start = _rendered(config)
        self._seen: Seen | None = None
        self.status = ReloadStatus(file=str(path), loaded_at=time.time())

    def ask(self) -> None:
        """Read the file again at once, whether it seems changed or not."""
        self._asked.set()

    async def run(self) -> None:
        """Reload on `ask` and on changes of the files, for ever.

        A change is acted on when two looks in a row see the same: a file that is being written may
        be valid and yet only half of it.
        """
        pending: Seen | None = None
        while True:
            asked = await self._wait(self._config.server.watch_secs)
            now = await asyncio.to_thread(see, self._watched)
            if not asked:
                if now == self._seen:
                    pending = None
                    continue
                if now != pending:
                    pending = now
                    continue
            pending = None
            first = self._seen is None and not asked
            # Seen before the file is read, so that a change in between is noticed.
            self._seen = now
            await self._reload(quiet=first)

    async def _wait(self, seconds: float) -> bool:
        """Return True when a reload was asked for, False after this time; 0: never."""
        try:
            async with asyncio.timeout(seconds or None):
                await self._asked.wait()
        except TimeoutError:
            return False
        self._asked.clear()
        return True

    async def _reload(self, *, quiet: bool) -> None:
        try:
            config = await asyncio.to_thread(self._read)
            changes = compare(self._config, config)
            problems = [f"{key}: a change of this needs a restart" for key in changes.restart]
            if problems := [*problems, *self._not_for_envoy(config)]:
                raise ConfigError(problems)
            commit = await self._target.prepare(config)
        except ConfigError as error:
            self._refuse(error.problems)
            return
        except Exception as error:
            _log.exception("reload_failed")
            self._refuse([f"{self._path}: unexpected {type(error).__name__}"])
            return
        commit()
        self._config = config
        self.status.problems, self.status.refused_at = [], None
        self._metrics.config_current.set(1)
        if not changes:
            # Certificates and keys have been read again, all the same.
            self._metrics.reloads("unchanged").inc()
            if not quiet:
                _log.info("config_unchanged", file=str(self._path))
            return
        self.status.loaded_at = time.time()
        self.status.applied += 1
        self._metrics.reloads("applied").inc()
        _log.info("config_reloaded", file=str(self._path), changed=",".join(changes.live))
        self._compare_envoy(config)

    def _read(self) -> Config:
        """Read and check the file as at the start; raises ConfigError."""
        try:
            config = load_config(self._path)
        except ConfigError:
            self._watched = named_files(self._path, self._config)
            raise
        # Also those of a configuration that is refused: it may be good when they are mended.
        self._watched = named_files(self._path, config)
        if problems := file_problems(config):
            raise ConfigError(problems)
        return config

    def _not_for_envoy(self, config: Config) -> list[str]:
        """The workers that Envoy would find in its file of endpoints without TLS for them."""
        if config.envoy.endpoints_file is None:
            return []
        if tls_contexts(config).keys() <= tls_contexts(self._config_at_start).keys():
            return []
        return [
            "discovery.static_urls.urls: a new https worker with an IP address needs a restart, "
            "and Envoy's file rendered again"
        ]

    def _refuse(self, problems: list[str]) -> None:
        self.status.refused += 1
        self.status.refused_at = time.time()
        self.status.problems = problems
        self._metrics.config_current.set(0)
        self._metrics.reloads("refused").inc()
        for problem in problems:
            _log.error("config_refused", file=str(self._path), error=problem)

    def _compare_envoy(self, config: Config) -> None:
        outdated = _rendered(config) != self._rendered_at_start
        if outdated and not self.status.envoy_config_outdated:
            _log.warning(
                "envoy_config_outdated",
                fix="render Envoy's file again with `extproc envoy-config`, and restart Envoy",
            )
        self.status.envoy_config_outdated = outdated
        self._metrics.envoy_config_outdated.set(outdated)


def _rendered(config: Config) -> dict[str, Any] | None:
    """Envoy's file; None for a configuration that is only for another gateway."""
    try:
        return render_bootstrap(config)
    except ConfigError:
        return None
