"""Asks engines through Envoy, and sets beside each other what was believed and what was cached."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import uuid4

import aiohttp

from extproc.testing.stack import Stack, wait_until
from tests.engines.bodies import Body
from tests.engines.live.talks import Talk

__all__ = ["CHAT", "Asked", "House", "check", "open_house", "talk"]

CHAT: Final = "/v1/chat/completions"
_PREDICTED: Final = re.compile(r"event='routed' request_id='([^']+)'.* predicted_tokens=(\d+)")
_REQUEST_SECONDS: Final = 120
_SETTLE_SECONDS: Final = 10
_POLL_SECONDS: Final = 0.03


class Asked(NamedTuple):
    """One request: what the service believed, and what the engine says; all in tokens.

    `prompt` is the engine's count of the prompt, `total` the service's, 0 without tokens.
    """

    worker: str
    reason: str
    believed: int
    total: int
    cached: int
    prompt: int
    text: str
    request_id: str

    @property
    def right(self) -> bool:
        return self.believed == self.cached and self.total == self.prompt


class House:
    """A stack in front of real engines, with a client."""

    def __init__(
        self, stack: Stack, http: aiohttp.ClientSession, urls: Sequence[str], page: int
    ) -> None:
        self.stack = stack
        self.http = http
        self.urls = urls
        self.page = page

    async def ask(
        self, body: Mapping[str, Any], path: str = CHAT, *, settle: bool = True, url: str = ""
    ) -> Asked:
        """Send a request and wait until its pages are known; AssertionError if it fails.

        With `url` it goes to that worker alone, and nothing is believed of it.
        """
        body = {"model": "m", "max_tokens": 4, "temperature": 0, **body}
        request_id = str(uuid4())
        headers = {"x-extproc-debug": "true", "x-request-id": request_id}
        async with self.http.post(
            f"{url or self.stack.url}{path}", json=body, headers=headers
        ) as answer:
            said = await answer.json()
            assert answer.status == 200, said
            asked = _asked(answer.headers, said, request_id)
        if settle:
            await self.settled()
        return asked

    async def chat(self, messages: Sequence[Mapping[str, Any]], **members: Any) -> Asked:
        return await self.ask({"messages": messages, **members})

    async def try_body(self, body: Body) -> Asked | None:
        """Send a body of the vectors, with few tokens to generate.

        None if it is refused, if the answer is a stream, or if there are several prompts.
        """
        headers = {"x-extproc-debug": "true", "content-type": "application/json"}
        url = f"{self.stack.url}{body.path}"
        async with self.http.post(url, data=_shortened(body.data), headers=headers) as answer:
            assert answer.status in (200, 400, 404, 500), await answer.text()
            if answer.status != 200 or answer.content_type != "application/json":
                return None
            asked = _asked(answer.headers, await answer.json(), "")
        await self.settled()
        if not asked.worker:
            # On a busy machine the service may miss a health check, and Envoy does without it.
            return await self.try_body(body)
        return asked

    async def settled(self) -> None:
        """Wait until events arrive no more."""
        seen: list[Any] = []

        async def quiet() -> bool:
            seen.append(await self._pages())
            return len(seen) > 3 and seen[-1] == seen[-2] == seen[-3]

        await asyncio.sleep(_POLL_SECONDS)
        await wait_until(quiet, "no more events arrive", _SETTLE_SECONDS)

    def predicted_tokens(self) -> dict[str, int]:
        """How many tokens were predicted besides, by the request's id; needs the debug log."""
        lines = self.stack.service.log.read_text().splitlines()
        found = (_PREDICTED.search(line) for line in lines)
        return {one[1]: int(one[2]) for one in found if one is not None}

    async def _pages(self) -> list[Any]:
        kv = [one.get("kv", {}) for one in await self.stack.workers()]
        ranks = [rank for one in kv for rank in one.get("ranks", [])]
        return [(rank["pages"], rank["in_flight"]) for rank in ranks]

    async def trusted(self) -> None:
        """Wait until the pages of all workers are known, but for decode workers."""

        async def check() -> bool:
            workers = [one for one in await self.stack.workers() if one["mode"] != "decode"]
            ranks = [one.get("kv", {}).get("ranks", []) for one in workers]
            return len(ranks) == len(self.urls) and all(
                found and all(rank["trusted"] for rank in found) for found in ranks
            )

        await wait_until(check, "the service follows the events of all engines")


def _shortened(data: bytes) -> bytes:
    """The body with `max_tokens`, unless it has a limit of its own."""
    try:
        body = json.loads(data)
    except ValueError:
        return data
    limits = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
    if not isinstance(body, dict) or limits & body.keys():
        return data
    # At the end, so that a member that occurs twice stays as it is.
    return data.rstrip().removesuffix(b"}") + b',"max_tokens":2}'


def _asked(headers: Mapping[str, str], said: dict[str, Any], request_id: str) -> Asked:
    believed, _, total = headers.get("x-extproc-overlap", "0/0").partition("/")
    usage = said["usage"]
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached = details.get("cached_tokens", usage.get("cache_read_input_tokens")) or 0
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    # In /v1/messages what is read from the cache and written to it is not among the others.
    prompt += usage.get("cache_read_input_tokens") or 0
    prompt += usage.get("cache_creation_input_tokens") or 0
    text = ""
    if "choices" in said:
        choice = said["choices"][0]
        text = choice.get("text") or choice.get("message", {}).get("content") or ""
    return Asked(
        headers.get("x-extproc-worker", ""),
        headers.get("x-extproc-reason", ""),
        int(believed),
        int(total),
        cached,
        prompt,
        text,
        request_id,
    )


def check(asked: Sequence[Asked], at_least_cached: int) -> None:
    """All were believed as they were, and enough was cached for that to say something."""
    wrong = [one for one in asked if not one.right]
    assert not wrong, f"{len(wrong)} of {len(asked)} differ: {wrong[:5]}"
    assert sum(one.cached > 0 for one in asked) >= at_least_cached, asked


async def talk(house: House, count: int, turns: int, **members: Any) -> list[Asked]:
    """Conversations whose turns take turns."""
    seed = uuid4().hex[:8]
    talks = [Talk(f"{seed} {number}") for number in range(count)]
    asked = []
    for _ in range(turns):
        for one in talks:
            asked.append(await house.chat(one.question(), **members))
            one.answered(asked[-1].text)
    return asked


@asynccontextmanager
async def open_house(
    folder: Path,
    urls: Sequence[str],
    model: Path,
    page: int,
    *,
    debug_log: bool = False,
    **settings: Any,
) -> AsyncIterator[House]:
    """A stack for these engines, which are found without any configuration of their events.

    `urls` are all workers but decode workers, which `settings` may name.
    """
    timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
    of_model = {"id": "m", "policy": "cache_aware_zmq", "tokenizer_path": str(model)}
    models = [of_model | settings.pop("of_model", {})]
    shown = {"debug_headers": True, "log_level": "debug" if debug_log else "info"}
    settings = {"models": models, "observability": shown, **settings}
    async with (
        Stack(folder, urls, settings) as stack,
        aiohttp.ClientSession(timeout=timeout) as http,
    ):
        house = House(stack, http, urls, page)
        await house.trusted()
        yield house
