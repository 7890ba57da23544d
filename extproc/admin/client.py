"""Asks the admin port of a running service."""

from typing import Any, Final

import aiohttp
import msgspec

from extproc.errors import ServiceError

__all__ = ["AdminError", "ask_for_tokens"]

_TIMEOUT_SECONDS: Final = 30.0
_SHOWN_CHARS: Final = 500


class AdminError(ServiceError):
    """The service gives no answer that can be used; the text says why."""


class _Answer(msgspec.Struct):
    tokens: list[dict[str, Any]]


async def ask_for_tokens(
    url: str, path: str, body: bytes, token: str | None
) -> list[dict[str, Any]]:
    """The tokens of a request, as an entry for each engine of its model's workers.

    Raises AdminError.
    """
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.post(f"{url.rstrip('/')}/tokens", params={"path": path}, data=body) as response,
        ):
            answer = await response.read()
            if response.status != 200:
                text = answer[:_SHOWN_CHARS].decode(errors="replace")
                raise AdminError(f"{url} answered {response.status}: {text}")
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise AdminError(f"{url} cannot be asked: {error or 'no answer in time'}") from None
    try:
        return msgspec.json.decode(answer, type=_Answer).tokens
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise AdminError(f"{url} answered something else than tokens") from None
