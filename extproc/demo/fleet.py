"""Starts the demo's simulated workers: one process for each part of each model's pool."""

import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from extproc.demo.pools import Part, Pool
from extproc.testing.stack import ManagedProcess

__all__ = ["Fleet"]

_READY: Final = re.compile(r"^simulator ready url=(\S+)", re.MULTILINE)


class Fleet:
    """The same pool for every model; an async context manager that starts them on entry."""

    def __init__(self, folder: Path, models: Sequence[str], pool: Pool, tokenizer: Path) -> None:
        self._processes = [
            (part.name, _process(folder, model, part, tokenizer), part.workers)
            for model in models
            for part in pool.parts
        ]

    @property
    def urls(self) -> list[str]:
        """The URLs of all workers, model after model."""
        return [url for _, process, _ in self._processes for url in _urls(process)]

    def urls_of(self, part: str) -> list[str]:
        """The URLs of the workers of that part, model after model."""
        return [
            url for name, process, _ in self._processes if name == part for url in _urls(process)
        ]

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(
                *(_start(process, workers) for _, process, workers in self._processes)
            )
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(process.stop() for _, process, _ in self._processes))


def _process(folder: Path, model: str, part: Part, tokenizer: Path) -> ManagedProcess:
    return ManagedProcess(
        f"{part.name} workers of {model}".lstrip(),
        [
            *(sys.executable, "-m", "extproc.simulator", "--model", model),
            *("--workers", str(part.workers), "--tokenizer-path", str(tokenizer)),
            *(word for option in part.options.items() for word in option),
        ],
        folder / f"{model}-{part.name or 'plain'}.log",
    )


async def _start(process: ManagedProcess, workers: int) -> None:
    async def all_listen() -> bool:
        return len(_urls(process)) == workers

    await process.start()
    await process.wait_ready(all_listen)


def _urls(process: ManagedProcess) -> list[str]:
    return _READY.findall(process.log.read_text("utf-8")) if process.log.exists() else []
