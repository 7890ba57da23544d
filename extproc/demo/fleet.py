"""The simulated workers of the demo: for each model one process that holds all of them."""

import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

from extproc.demo.stack import ManagedProcess

__all__ = ["Fleet"]

# Slow enough that waiting for prefill decides the time to the first token, and a cache that
# does not hold everything everybody says: as with real engines, on another scale.
_OPTIONS: Final = {
    "--prefill-tokens-per-second": "3000",
    "--decode-milliseconds-per-token": "15",
    "--max-total-num-tokens": "16000",
    "--page-size": "16",
    "--kv-events-port": "0",
}
_READY: Final = re.compile(r"^simulator ready url=(\S+)", re.MULTILINE)


class Fleet:
    """As many workers for every model; an async context manager, started when it is entered."""

    def __init__(self, folder: Path, models: Sequence[str], workers: int, tokenizer: Path) -> None:
        self._workers = workers
        options = [part for pair in _OPTIONS.items() for part in pair]
        self._processes = [
            ManagedProcess(
                f"workers of {model}",
                [
                    *(sys.executable, "-m", "extproc.simulator", "--model", model),
                    *("--workers", str(workers), "--tokenizer-path", str(tokenizer), *options),
                ],
                folder / f"{model}.log",
            )
            for model in models
        ]

    @property
    def urls(self) -> list[str]:
        """Where all the workers are, model after model."""
        return [url for process in self._processes for url in _urls(process)]

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(self._start(process) for process in self._processes))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(process.stop() for process in self._processes))

    async def _start(self, process: ManagedProcess) -> None:
        async def all_listen() -> bool:
            return len(_urls(process)) == self._workers

        await process.start()
        await process.wait_ready(all_listen)


def _urls(process: ManagedProcess) -> list[str]:
    return _READY.findall(process.log.read_text("utf-8")) if process.log.exists() else []
