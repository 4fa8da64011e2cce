"""How the training asks for verdicts: of a service, or in its own process; both look the same.

    with VerifierServer() as server, VerifierClient(server.addresses) as verifiers:
        verdicts = verifiers.score(items)          # or .submit(items), a future
    with InProcess() as verifiers: …

A verdict always comes back. When no server answers after all attempts its status is "error" with
the reason, so that the completion is masked and counted: never a silent 0, never the end of a run.
"""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

import aiohttp

from vtriune_jax.errors import UserError
from vtriune_jax.types import Verdict
from vtriune_jax.verifiers.item import Item, decode_verdicts, encode_items
from vtriune_jax.verifiers.pool import child_environment
from vtriune_jax.verifiers.router import TIME_LIMIT, Router

_FINAL = (400, 404, 413, 422)
"""HTTP statuses that another attempt would not change."""
_BATCH_CHARACTERS = 2**22
"""Text in one request; JSON may need six bytes for a character."""


def _batches(items: Sequence[Item], most: int) -> list[list[Item]]:
    """Consecutive batches of at most `most` items and about `_BATCH_CHARACTERS` of text."""
    batches: list[list[Item]] = []
    room = 0
    for item in items:
        size = len(item.completion) + len(item.reward.ground_truth)
        if not batches or len(batches[-1]) == most or size > room:
            batches.append([])
            room = _BATCH_CHARACTERS
        batches[-1].append(item)
        room -= size
    return batches


class InProcess:
    """The verifiers without a server, for small runs and tests."""

    def __init__(self, workers: int = 0, limit: float = TIME_LIMIT) -> None:
        self._router = Router(workers, limit)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="verifiers")

    def submit(self, items: Sequence[Item]) -> Future[list[Verdict]]:
        """Start to judge; the verdicts come in the order of the items."""
        return self._threads.submit(self._router.score, items)

    def score(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge and wait."""
        return self.submit(items).result()

    def close(self) -> None:
        """Finish what was begun and end the workers."""
        self._threads.shutdown()
        self._router.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VerifierClient:
    """Batches of items to one or several servers, from an event loop on a thread of its own."""

    def __init__(
        self,
        addresses: Sequence[str] | Callable[[], Sequence[str]],
        *,
        timeout: float = 120.0,
        attempts: int = 4,
        backoff: float = 0.5,
        batch: int = 32,
    ) -> None:
        """`addresses` may be a function, asked before every attempt, as servers may move.

        `timeout`: seconds for one request of up to `batch` items. Before attempt k + 1, on another
        server when there is one, `backoff` · 2^(k − 1) seconds pass, give or take a half.
        """
        self._addresses = addresses if callable(addresses) else lambda: addresses
        self._timeout, self._attempts, self._backoff = timeout, attempts, backoff
        self._batch = batch
        self._turn = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="verifier-client", daemon=True
        )
        self._thread.start()
        ready.wait()

    def submit(self, items: Sequence[Item]) -> Future[list[Verdict]]:
        """Start to judge; the verdicts come in the order of the items."""
        return asyncio.run_coroutine_threadsafe(self._score(list(items)), self._loop)

    def score(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge and wait."""
        return self.submit(items).result()

    def close(self) -> None:
        """Cancel what is on its way and close the connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, ready: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        limits = aiohttp.ClientTimeout(total=self._timeout, sock_connect=10)
        async with aiohttp.ClientSession(timeout=limits) as self._session:
            ready.set()
            await self._stop.wait()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _score(self, items: list[Item]) -> list[Verdict]:
        parts = _batches(items, self._batch)
        return list(itertools.chain(*await asyncio.gather(*map(self._batch_of, parts))))

    async def _batch_of(self, items: list[Item]) -> list[Verdict]:
        """One request, repeated elsewhere when it fails."""
        turn = next(self._turn)
        reason = ""
        for attempt in range(self._attempts):
            if attempt:
                await asyncio.sleep(self._backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            address = "the verifier service"
            try:
                addresses = await asyncio.to_thread(self._addresses)
                address = addresses[(turn + attempt) % len(addresses)]
                return await self._post(address, items)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                reason = f"{address}: {type(error).__name__} {error}".strip()
        verdict = Verdict(
            "error", reason=f"no verdict after {self._attempts} attempts; last {reason}"
        )
        return [verdict] * len(items)

    async def _post(self, address: str, items: list[Item]) -> list[Verdict]:
        async with self._session.post(
            f"{address}/verify", data=io.BytesIO(encode_items(items))
        ) as answer:
            body = await answer.read()
            if answer.status != 200:
                reason = f"{address}: HTTP {answer.status} {body[:300].decode(errors='replace')}"
                if answer.status in _FINAL:
                    return [Verdict("error", reason=reason)] * len(items)
                raise ValueError(reason)
        verdicts = decode_verdicts(body)
        if len(verdicts) != len(items):
            raise ValueError(f"{len(verdicts)} verdicts for {len(items)} items")
        return verdicts


def check_health(addresses: Sequence[str], timeout: float = 10.0) -> None:
    """Raises UserError naming the first address at which no verifier server answers."""
    for address in addresses:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=timeout):
                pass
        except (OSError, ValueError) as error:
            raise UserError(
                f"verifiers.addresses: no verifier server answers at {address} ({error}); start "
                "one (python -m vtriune_jax.verifiers.server), or leave the addresses empty"
            ) from error


class VerifierServer:
    """The verifier service as a child process, started again when it is found dead.

    It lives until `close`, or until this process ends in whatever way. It prints to `log`.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        workers: int = 0,
        limit: float = TIME_LIMIT,
        log: Path | None = None,
        start_timeout: float = 60.0,
    ) -> None:
        """Start the service and wait for it; `UserError` when it does not come up."""
        self._folder = tempfile.TemporaryDirectory(prefix="vtriune_verifiers_")
        self._ready = Path(self._folder.name) / "address"
        self._log = log or Path(self._folder.name) / "log"
        self._command = [
            *(sys.executable, "-m", "vtriune_jax.verifiers.server", "--host", host),
            *("--port", str(port), "--workers", str(workers), "--limit", str(limit)),
            *("--ready-file", str(self._ready), "--parent", str(os.getpid())),
        ]
        self._start_timeout = start_timeout
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._process = self._start()
        except UserError:
            self._folder.cleanup()
            raise

    def addresses(self) -> tuple[str, ...]:
        """Where it listens now, after a restart if it was dead. May be called from any thread."""
        with self._lock:
            if self._closed:
                raise UserError("the verifier server was closed; start another one")
            if self._process.poll() is not None:
                self._process = self._start()
            return (self._ready.read_text(),)

    def close(self) -> None:
        """Let requests in flight finish, then end it."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        self._ready.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the trainer, which may still want verdicts
                env=child_environment(),
            )
        deadline = time.monotonic() + self._start_timeout
        while not self._ready.exists():
            if process.poll() is not None:
                raise UserError(f"the verifier server did not start: {self._last_line()}")
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise UserError(
                    f"the verifier server was not ready after {self._start_timeout:g} s: "
                    f"{self._last_line()}"
                )
            time.sleep(0.02)
        return process

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"]
        return (
            f"{lines[-1]}; try `{' '.join(self._command[:3])}`, or verifiers.mode='in_process' "
            "to do without a server"
        )
