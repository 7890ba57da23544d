"""Lets only requests with the token through to the admin pages.

Separate from the pages because it decides about all of them, also about those that come later.
"""

import hmac

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from extproc.config.schema import Config

__all__ = ["require_token", "token_problem"]


def token_problem(config: Config) -> str | None:
    """What to do where no token is asked for; None where each request has had it."""
    if config.server.admin_token_file is None and config.server.admin_token_env is None:
        return "set server.admin_token_file or server.admin_token_env, and restart"
    return None


def require_token(token: str, *, without: frozenset[str]) -> Middleware:
    """A middleware that answers 401 without `authorization: Bearer TOKEN`.

    The paths in `without` need no token.
    """
    expected = token.encode()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path not in without:
            scheme, _, sent = request.headers.get("authorization", "").partition(" ")
            # In constant time, or the time of an answer would tell how much of a guess is right.
            same = hmac.compare_digest(sent.strip().encode(errors="surrogateescape"), expected)
            if not same or scheme.lower() != "bearer":
                return web.Response(status=401, headers={"www-authenticate": "Bearer"})
        return await handler(request)

    return check
