"""Which of several servers is asked next: the one with the least to do among those that are well.

A server that failed rests for a while, longer each time, unless there is no other.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_LONGEST_REST = 10.0
"""Seconds until a server that keeps failing is tried again."""


@dataclass(eq=False)
class Server:
    """What is known of one server; times are of `time.monotonic`."""

    address: str
    requests: int = 0
    """On their way."""
    failures: int = 0
    """Since it answered last."""
    rests_until: float = 0.0
    answered: float = 0.0


class Servers:
    """The servers at some addresses, for one event loop."""

    def __init__(
        self,
        addresses: Sequence[str] | Callable[[], Sequence[str]],
        *,
        most: int,
        backoff: float,
    ) -> None:
        """At most `most` requests at a time to each; `backoff` seconds for the first rest."""
        self._addresses, self._most, self._backoff = addresses, most, backoff
        self._servers: Mapping[str, Server] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self) -> Server:
        """The best server, once it has room; it must be `release`d.

        What the function for the addresses raises goes through, UserError if there is no address.
        """
        while True:
            await self._refresh()
            now = time.monotonic()
            if server := self._least_busy(now):
                server.requests += 1
                return server
            rests = [s.rests_until - now for s in self._servers.values() if s.rests_until > now]
            freed = asyncio.get_running_loop().create_future()
            self._waiting.append(freed)
            await asyncio.wait([freed], timeout=min([1.0, *rests]))
            freed.cancel()

    def other(self, than: Server) -> Server | None:
        """A second server that could be asked at once, taken, if there is one."""
        server = self._least_busy(time.monotonic(), than)
        if server:
            server.requests += 1
        return server

    def release(self, server: Server) -> None:
        """A request has come to its end."""
        server.requests -= 1
        while self._waiting:
            if not (freed := self._waiting.popleft()).done():
                freed.set_result(None)
                return

    def succeeded(self, server: Server) -> None:
        """It has answered: it is well."""
        server.failures, server.rests_until, server.answered = 0, 0.0, time.monotonic()

    def failed(self, server: Server, rest: float | None = None) -> None:
        """Leave it alone for `rest` seconds if it asked for that, else for longer each time."""
        now = time.monotonic()
        if rest is None:
            if server.rests_until > now:  # one failure, of which several requests tell
                return
            longest = min(self._backoff * 2.0**server.failures, _LONGEST_REST)
            rest = longest * random.uniform(0.5, 1.0)
            server.failures = min(server.failures + 1, 30)
        server.rests_until = max(server.rests_until, now + rest)

    async def _refresh(self) -> None:
        addresses = self._addresses
        if callable(addresses):
            addresses = await asyncio.to_thread(addresses)
        self._servers = {each: self._servers.get(each) or Server(each) for each in addresses}
        if not self._servers:
            raise ValueError("there is no verifier server: the list of addresses is empty")

    def _least_busy(self, now: float, but: Server | None = None) -> Server | None:
        able = [
            server
            for server in self._servers.values()
            if server.rests_until <= now and server.requests < self._most and server is not but
        ]
        return min(able, key=lambda server: (server.requests, random.random()), default=None)
