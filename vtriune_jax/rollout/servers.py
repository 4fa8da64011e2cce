"""What is known of each server of a fleet, and which gets the next request.

Plain bookkeeping for one event loop, without I/O: `Fleet` feeds it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["new", "ready", "quarantined", "gone"]


@dataclass(eq=False)
class Server:
    """One server; times are of `time.monotonic`."""

    address: str
    state: State = "new"
    """`new` and `quarantined` ones get no work until they are well and up to date, `gone` ones
    (no longer in the list of addresses) none at all."""
    reason: str = "has not answered yet"
    """Why it gets no work; of a ready one, its last failure."""
    paused: bool = False
    """Between /pause_generation and /continue_generation."""
    version: str = ""
    """Of its weights, as it said last."""
    capacity: int = 1
    """Completions that it can work on at a time."""
    in_flight: int = 0
    """Completions asked for and not yet answered."""
    failures: int = 0
    """Requests that failed since one did not."""
    rests: int = 0
    """Quarantines since then."""
    next_probe: float = 0.0
    heard: float = field(default_factory=time.monotonic)
    """When it last sent anything."""
    tokens: int = 0
    """Received from it, in all."""
    requests: set[asyncio.Task[None]] = field(default_factory=set)
    """What reads its answers; cancelled when it is quarantined."""
    checking: bool = False
    """Whether a look after its health is under way."""

    @property
    def works(self) -> bool:
        """Whether it may be given work."""
        return self.state == "ready" and not self.paused


@dataclass(eq=False)
class _Waiter:
    count: int
    prefer: str
    avoid: str
    given: asyncio.Future[Server]


class Queue:
    """Gives servers to requests, first come, first served, never more than a server's capacity."""

    def __init__(self) -> None:
        self.servers: dict[str, Server] = {}
        self._waiting: deque[_Waiter] = deque()

    async def take(self, count: int, prefer: str = "", avoid: str = "") -> Server:
        """A server with room for `count` completions, which are to be given back.

        If possible that of the address to `prefer`, which knows the prompt; not that to `avoid`,
        unless no other works.
        """
        given: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(count, prefer, avoid, given)
        self._waiting.append(waiter)
        self.assign()
        try:
            return await waiter.given
        except asyncio.CancelledError:
            if waiter.given.done() and not waiter.given.cancelled():
                self.give_back(waiter.given.result(), count)
            raise

    def give_back(self, server: Server, count: int) -> None:
        """`count` completions are answered, or will not be."""
        server.in_flight -= count
        self.assign()

    def assign(self) -> None:
        """Serve those who wait; called whenever something has become free or well."""
        while self._waiting:
            waiter = self._waiting[0]
            if not waiter.given.done():
                server = self._best(waiter)
                if server is None:
                    return
                server.in_flight += waiter.count
                waiter.given.set_result(server)
            self._waiting.popleft()

    @property
    def waiting(self) -> int:
        """Requests without a server."""
        return sum(not waiter.given.done() for waiter in self._waiting)

    def _best(self, waiter: _Waiter) -> Server | None:
        working = [server for server in self.servers.values() if server.works]
        others = [server for server in working if server.address != waiter.avoid]
        able = [
            server
            for server in others or working
            if server.in_flight + waiter.count <= server.capacity or not server.in_flight
        ]
        for server in able:
            if server.address == waiter.prefer:
                return server
        return min(able, key=_load, default=None)


def _load(server: Server) -> tuple[float, float]:
    return server.in_flight / server.capacity, random.random()


def capacity_of(info: dict[str, Any], tokens_per_completion: int) -> int:
    """Completions at a time, from /server_info: what it may run and what its cache can hold."""
    states = info.get("internal_states") or [{}]
    running = sum(state.get("effective_max_running_requests_per_dp") or 0 for state in states)
    running = running or info.get("max_running_requests") or 64
    if tokens_per_completion and info.get("max_total_num_tokens"):
        running = min(running, info["max_total_num_tokens"] // tokens_per_completion)
    return max(1, running)
