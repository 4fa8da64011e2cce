"""What can go wrong with a server of the fleet, and how it is told."""

from __future__ import annotations

import aiohttp
import orjson

KEY, ADMIN_KEY = "VTRIUNE_ROLLOUT_KEY", "VTRIUNE_ROLLOUT_ADMIN_KEY"
"""Environment variables with the servers' --api-key and --admin-api-key."""


class ServerError(Exception):
    """A server did not do what it was asked to."""

    def __init__(self, said: str, status: int = 0) -> None:
        super().__init__(said)
        self.status = status
        """Of HTTP, if that is what it said."""


class Unfit(ServerError):
    """A server has weights that it should not have."""


TROUBLE = (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError, ServerError)
"""What may go wrong with a server."""


def named(error: BaseException) -> str:
    """An error in one line, with its kind."""
    return f"{type(error).__name__} {error}".strip()


def refusal(error: BaseException) -> str:
    """Why a server is not used, with what a person could do where that is known."""
    if isinstance(error, ServerError) and error.status == 401:
        return f"wants a key ({error}); set {KEY} and {ADMIN_KEY} to its keys"
    return named(error)
