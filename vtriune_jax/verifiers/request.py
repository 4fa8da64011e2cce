"""One request to one verifier server: the client's end of the wire, and the kinds of failure."""

from __future__ import annotations

import io
import os
import random
import urllib.error
import urllib.request
from collections.abc import Sequence

import aiohttp

from vtriune_jax.errors import UserError
from vtriune_jax.types import Verdict
from vtriune_jax.verifiers.item import TOKEN, decode_verdicts

_TOO_MUCH = (413, 422)
_FINAL = (400, 401, 403, 404, *_TOO_MUCH)
"""HTTP statuses that another attempt would not change."""
_BUSY = (429, 503)
_LONGEST_RETRY_AFTER = 30.0


class Refused(Exception):
    """The server will not judge this, now or later."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.may_be_one = status in _TOO_MUCH
        """Whether a single item may be to blame: the others could still be judged."""


class Overloaded(Exception):
    """The server asks to come back after some seconds (None: it did not say when)."""

    def __init__(self, reason: str, seconds: float | None) -> None:
        super().__init__(reason)
        self.seconds = seconds


TROUBLE = (aiohttp.ClientError, TimeoutError, OSError, ValueError, Overloaded)
"""What another attempt may overcome."""


def authorization() -> dict[str, str]:
    """The header with the token of the environment, if there is one."""
    token = os.environ.get(TOKEN)
    return {"Authorization": f"Bearer {token}"} if token else {}


async def post(
    session: aiohttp.ClientSession, address: str, body: bytes, count: int
) -> list[Verdict]:
    """`count` verdicts on the items in `body`, or `Refused`, or one of `TROUBLE`."""
    # a file: aiohttp warns of large bytes
    async with session.post(f"{address}/verify", data=io.BytesIO(body)) as answer:
        text = await answer.read()
        if answer.status == 200:
            verdicts = decode_verdicts(text)
            if len(verdicts) != count:
                raise ValueError(f"{address}: {len(verdicts)} verdicts for {count} items")
            return verdicts
        reason = f"{address}: HTTP {answer.status} {text[:300].decode(errors='replace')}"
        if answer.status in _FINAL:
            raise Refused(answer.status, reason)
        if answer.status in _BUSY:
            raise Overloaded(reason, _seconds(answer.headers.get("Retry-After")))
        raise ValueError(reason)


async def is_well(session: aiohttp.ClientSession, address: str, patience: float) -> bool:
    """Whether the server tells its health within `patience` seconds."""
    limits = aiohttp.ClientTimeout(total=patience)
    try:
        async with session.get(f"{address}/health", timeout=limits) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


def check_health(addresses: Sequence[str], timeout: float = 10.0) -> None:
    """Raises UserError naming the first address at which no verifier server would serve us."""
    for address in addresses:
        try:
            request = urllib.request.Request(f"{address}/ready", headers=authorization())
            with urllib.request.urlopen(request, timeout=timeout):
                pass
        except (OSError, ValueError) as error:
            status = error.code if isinstance(error, urllib.error.HTTPError) else None
            if status in _BUSY:
                continue
            if status == 401:
                raise UserError(
                    f"verifiers.addresses: {address} wants a token; set {TOKEN} to the server's"
                ) from error
            raise UserError(
                f"verifiers.addresses: no verifier server answers at {address} ({error}); start "
                "one (python -m vtriune_jax.verifiers.server), or leave the addresses empty"
            ) from error


def _seconds(retry_after: str | None) -> float | None:
    """The header Retry-After, unless a date, with a little jitter lest all come at once."""
    if retry_after is None or not retry_after.isdecimal():
        return None
    return min(float(retry_after), _LONGEST_RETRY_AFTER) * random.uniform(1.0, 1.2)
