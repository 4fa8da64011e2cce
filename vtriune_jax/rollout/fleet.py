"""SGLang servers that come, fail, return and go, as one fleet.

    with Fleet("servers.txt") as fleet:
        fleet.on_return = bring_up_to_date           # before a new or sick server gets work (again)
        fleet.run(update_all(fleet)).result()

    async def update_all(fleet):
        for server in fleet.servers():
            await fleet.post(server, "/pause_generation", {"mode": "retract"})

A loop on a thread of its own watches the list of addresses and the servers' health. Coroutines and
methods that change a server run on that loop (`run` brings them there); `servers`, `stats` and
`published` may be called from anywhere.
"""

from __future__ import annotations

import asyncio
import io
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

import aiohttp
import orjson

from vtriune_jax.errors import UserError
from vtriune_jax.hosts import Share
from vtriune_jax.loop import LoopThread
from vtriune_jax.rollout.addresses import Addresses, read_addresses
from vtriune_jax.rollout.servers import Queue, Server, capacity_of
from vtriune_jax.rollout.trouble import (
    ADMIN_KEY,
    KEY,
    TROUBLE,
    ServerError,
    Unfit,
    named,
    refusal,
)

T = TypeVar("T")

ALONE = Share()
_LONGEST_REST = 15.0
"""Seconds until a sick server is looked at again."""
_TICK = 0.1
"""Seconds from one look around to the next."""
_MOST_FAILURES = 3
"""Failed requests, with none between that did not fail, until a server is quarantined."""


class Fleet:
    """The servers, their health, and the way to talk to each."""

    def __init__(
        self,
        addresses: Addresses,
        *,
        key: str | None = None,
        admin_key: str | None = None,
        patience: float = 20.0,
        health_timeout: float = 25.0,
        backoff: float = 0.5,
        reread: float = 2.0,
        return_timeout: float = 600.0,
        tokens_per_completion: int = 0,
        share: Share = ALONE,
        on_return: Callable[[Server], Awaitable[None]] | None = None,
    ) -> None:
        """`addresses`: URLs, a file with one a line (# begins a comment), or a function.

        A file and a function are asked again every `reread` seconds: servers may join and leave.
        `patience`, the seconds in which a server with work may be silent before its health is
        asked for; `health_timeout`, to say so (SGLang may take 20 to say no); `backoff`, the first
        rest of a sick one, doubled each time; `return_timeout`, for `on_return`, which is awaited
        with every new or recovered server before it gets work, and must raise if that is not to
        be. Without it, a server must have the version that was `published` last.
        `tokens_per_completion`, if known, bounds the completions on a server by its cache. Of
        several processes that use the same servers, each takes its `share` of a server's capacity;
        the first one looks after the servers, also while it has no work for them, and the others,
        guests, leave weights and pauses alone. The keys are those of the environment unless given.
        """
        self.share = share
        self.on_return = on_return
        self._key = os.environ.get(KEY, "") if key is None else key
        self._admin_key = os.environ.get(ADMIN_KEY, "") if admin_key is None else admin_key
        self._addresses, self._reread = addresses, reread
        self._patience, self._health_timeout = patience, health_timeout
        self._backoff, self._return_timeout = backoff, return_timeout
        self._tokens_per_completion = tokens_per_completion
        self._versions: dict[str, int] = {}
        """Published ones → their place in time."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._complaint = ""
        self._published = 0
        self.version: str | None = None
        """What was published last."""
        self.queue = Queue()
        self.quarantines = 0
        """So far."""
        for address in read_addresses(addresses):
            self.queue.servers[address] = Server(address)
        self._thread = LoopThread("rollout-fleet")
        self.run(self._open()).result()

    # ------------------------------------------------------------------------- from any thread

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine on the fleet's loop."""
        return self._thread.run(work)

    def servers(self) -> list[Server]:
        """All that are in the list of addresses, sick ones too."""
        return [server for server in list(self.queue.servers.values()) if server.state != "gone"]

    def published(self, version: str) -> None:
        """From now on, `version` is what servers should have; to be said before any gets it."""
        self._versions[version] = self._published = self._published + 1
        self.version = version

    def lag(self, version: str) -> int:
        """How many versions were published after this one; 0 for one that never was."""
        return self._published - self._versions.get(version, self._published)

    def wait_ready(self, seconds: float) -> None:
        """Until a server can be used; UserError with what each said if none can."""
        until = time.monotonic() + seconds
        while not any(server.works for server in self.servers()):
            if time.monotonic() > until:
                raise UserError(
                    f"rollout.addresses: no server is ready after {seconds:g} s: "
                    f"{self.describe()}; start them (launch/rollouts.sh) or mend the list"
                )
            time.sleep(0.05)

    def describe(self) -> str:
        """Each server's state, for errors."""
        said = [
            f"{each.address} is {'paused' if each.paused else each.state}"
            + (f" ({each.reason})" if each.reason else "")
            for each in self.servers()
        ]
        return "; ".join([*said, *([self._complaint] if self._complaint else [])]) or "no servers"

    @property
    def is_guest(self) -> bool:
        """Whether another process changes the servers' weights."""
        return self.share.index > 0

    def close(self) -> None:
        """Drop all connections and end the thread."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------- on the loop

    async def post(
        self,
        server: Server,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        admin: bool = True,
        timeout: float = 60.0,
    ) -> Any:
        """The JSON (or text) of a control endpoint; `admin` chooses the key.

        Raises one of TROUBLE, ServerError if the status is not 200. That a server is paused, goes
        on or has other weights is noted.
        """
        body = body or {}
        if path == "/pause_generation":
            server.paused = True  # and so it is from now on, whatever the answer
        data = await self._request("POST", server, path, orjson.dumps(body), admin, timeout)
        if path == "/continue_generation":
            server.paused, server.heard = False, time.monotonic()
            self.queue.assign()
        elif path == "/update_weights_from_disk":
            server.version = body.get("weight_version") or server.version
        elif path == "/update_weight_version":
            server.version = body["new_version"]
        return data

    async def get(self, server: Server, path: str, *, timeout: float = 10.0) -> Any:
        """The same for what only tells something."""
        return await self._request("GET", server, path, None, False, timeout)

    def open(self, server: Server, path: str, body: bytes) -> Any:
        """A POST whose answer is read as it comes, as an async context manager."""
        large = len(body) > 2**20  # aiohttp warns of such bytes, but not of files
        return self._session.post(
            server.address + path,
            data=io.BytesIO(body) if large else body,
            headers=self._headers(admin=False),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        )

    def quarantine(self, server: Server, reason: str) -> None:
        """Give it no work, and what it has to others, until it is well and up to date again."""
        server.reason = reason
        if server.state == "gone":
            return
        if server.state == "ready":
            self.quarantines += 1
        server.state = "quarantined"
        rest = min(self._backoff * 2.0 ** min(server.rests, 30), _LONGEST_REST)
        server.next_probe = time.monotonic() + rest
        server.rests += 1
        for request in list(server.requests):
            request.cancel()

    def release(self, server: Server) -> None:
        """It is well and has the right weights: give it work."""
        if server.state == "new":
            server.reason = ""
        if server.state != "gone":
            server.state, server.heard = "ready", time.monotonic()
        self.queue.assign()

    def failed(self, server: Server, error: Exception) -> None:
        """A request to it failed: look after its health, or quarantine it if that is enough."""
        server.reason = refusal(error)
        server.failures += 1
        if server.state != "ready":
            return
        unfit = isinstance(error, Unfit) or getattr(error, "status", 0) in (401, 403)
        if unfit or server.failures >= _MOST_FAILURES:
            self.quarantine(server, server.reason)
        elif not server.checking and server.works:
            server.checking = True
            self._spawn(self._check(server))

    def heard(self, server: Server) -> None:
        """It has sent something."""
        server.heard = time.monotonic()

    def answered(self, server: Server) -> None:
        """A completion came from it as it should."""
        server.failures = server.rests = 0

    def check_version(self, server: Server, before: str, drawn: str) -> None:
        """Unfit if the last token of a completion was drawn with older weights than the
        server had `before` the request: it was restarted, say."""
        if before not in self._versions or drawn == server.version:
            return
        if drawn not in self._versions or self.lag(drawn) > self.lag(before):
            raise Unfit(f"has weights {drawn!r} again, after {before!r}")

    async def _request(
        self,
        method: str,
        server: Server,
        path: str,
        body: bytes | None,
        admin: bool,
        timeout: float,
    ) -> Any:
        limits = aiohttp.ClientTimeout(total=timeout, sock_connect=10)
        async with self._session.request(
            method,
            server.address + path,
            data=body,
            headers=self._headers(admin),
            timeout=limits,
        ) as answer:
            text = await answer.read()
            server.heard = time.monotonic()
            if answer.status != 200:
                said = text[:300].decode(errors="replace")
                raise ServerError(f"{path}: HTTP {answer.status} {said}", answer.status)
        if answer.content_type != "application/json":
            return text.decode(errors="replace")
        return orjson.loads(text)

    def _headers(self, admin: bool) -> dict[str, str]:
        key = (self._admin_key or self._key) if admin else self._key
        headers = {"Content-Type": "application/json"}
        return headers | ({"Authorization": f"Bearer {key}"} if key else {})

    async def _open(self) -> None:
        # SGLang closes an idle connection after 5 seconds; to use it then would cost a request.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
        self._session = aiohttp.ClientSession(connector=connector)
        self._spawn(self._watch())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch(self) -> None:
        """Look around for ever: addresses, sick servers, silent ones."""
        next_read = time.monotonic() + self._reread
        keeper = self.share.count > 1 and not self.is_guest
        async with self._session:
            while True:
                now = time.monotonic()
                if now >= next_read and not isinstance(self._addresses, (list, tuple)):
                    await self._read()
                    next_read = time.monotonic() + self._reread
                for server in self.servers():
                    if server.checking:
                        continue
                    silent = now - server.heard > self._patience
                    if server.works and silent and (server.in_flight or keeper):
                        server.checking = True
                        self._spawn(self._check(server))
                    elif server.state in ("new", "quarantined") and now >= server.next_probe:
                        server.checking, server.next_probe = True, now + _LONGEST_REST
                        self._spawn(self._admit(server))
                await asyncio.sleep(_TICK)

    async def _read(self) -> None:
        """The list of addresses; the last one stays while it cannot be read."""
        try:
            addresses = await asyncio.to_thread(read_addresses, self._addresses)
        except (UserError, OSError) as error:
            self._complaint = str(error)
            return
        self._complaint = ""
        known = self.queue.servers
        for address in addresses:
            if address not in known or known[address].state == "gone":
                known[address] = Server(address)
        for address, server in known.items():
            if address not in addresses and server.state != "gone":
                server.state, server.reason = "gone", "is no longer in the list of addresses"

    async def _check(self, server: Server) -> None:
        """Whether a server that has been silent, or failed, is still there, and the same one."""
        before = server.version
        try:
            await self.get(server, "/health", timeout=self._health_timeout)
            found = str((await self.get(server, "/model_info"))["weight_version"])
            if found != before == server.version and server.works:
                self.quarantine(server, f"has weights {found!r} again, after {before!r}")
        except (*TROUBLE, KeyError, TypeError) as error:
            if server.works:  # it may have been paused meanwhile
                self.quarantine(server, f"does not say that it is well: {named(error)}")
        finally:
            server.checking = False

    async def _admit(self, server: Server) -> None:
        """Give work to a new or sick server if it is well and has the right weights."""
        try:
            await self._wake(server)
            server.version = str((await self.get(server, "/model_info"))["weight_version"])
            info = await self.get(server, "/server_info")
            capacity = capacity_of(info, self._tokens_per_completion)
            server.capacity = max(1, capacity // self.share.count)
            if self.on_return:
                async with asyncio.timeout(self._return_timeout):
                    await self.on_return(server)
            elif self.version and server.version != self.version:
                raise Unfit(f"has weights {server.version!r}, not {self.version!r}")
            self.release(server)
        except (*TROUBLE, UserError, KeyError, TypeError) as error:
            self.quarantine(server, refusal(error))
        finally:
            server.checking = False

    async def _wake(self, server: Server) -> None:
        """See that it is well; one that was left paused, by us or others, says that it is not."""
        try:
            if self.is_guest or not server.paused:
                await self.get(server, "/health", timeout=self._health_timeout)
                return
        except ServerError as error:
            if self.is_guest or error.status != 503:
                raise
        await self.post(server, "/continue_generation")
        await self.get(server, "/health", timeout=self._health_timeout)
