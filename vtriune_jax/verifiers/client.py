"""How the training asks verifier servers for verdicts.

    with VerifierServer() as server, VerifierClient(server.addresses) as verifiers:
        verdicts = verifiers.score(items)          # or .submit(items), a future

A verdict always comes back. When no server gave one before the deadline its status is "timeout" or,
if something failed, "error" with the reason, so that the completion is masked and counted: never a
silent 0, never the end of a run. `in_process.InProcess` has the same methods and needs no server.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Self

import aiohttp

from vtriune_jax.loop import LoopThread
from vtriune_jax.types import Verdict
from vtriune_jax.verifiers.balance import Server, Servers
from vtriune_jax.verifiers.item import Item, encode_items
from vtriune_jax.verifiers.request import TROUBLE, Overloaded, Refused, authorization, is_well, post

BATCH = 128
"""Items in one request."""
DEADLINE = 300.0
"""Seconds from the submission of an item to its verdict, whatever happens."""
UNANSWERED = "no verdict"
"""How the reason begins when no server answered in time, whatever the completion was."""
_BATCH_CHARACTERS = 2**22
"""Text in one request; JSON may need six bytes for a character."""
_IN_FLIGHT = 16
"""Requests to one server at a time: enough to keep it busy, too few for its queue to overflow."""


@dataclass(eq=False)
class _Question:
    """One item on its way."""

    item: Item
    deadline: float
    answer: asyncio.Future[Verdict]

    @property
    def size(self) -> int:
        return len(self.item.completion) + len(self.item.reward.ground_truth)


class VerifierClient:
    """Items in batches to one or several servers, from an event loop on a thread of its own."""

    def __init__(
        self,
        addresses: Sequence[str] | Callable[[], Sequence[str]],
        *,
        deadline: float = DEADLINE,
        timeout: float = 120.0,
        patience: float = 10.0,
        hedge: float = 2.0,
        backoff: float = 0.2,
        batch: int = BATCH,
        linger: float = 0.005,
    ) -> None:
        """`addresses` may be a function, asked before every attempt, as servers may move.

        All in seconds: `deadline` from the submission of an item to its verdict; `timeout` of one
        request; `patience` until a server that has not answered is asked after its health, which
        it must tell within as long; `hedge` until a second server gets the same request, or twice
        the time in which 95 % of the last requests were answered if that is longer; `backoff`, the
        first pause after a failure, doubled with every further one; `linger`, how long an item
        waits for others to share its request, of which there are up to `batch`.
        """
        self._deadline, self._timeout, self._patience = deadline, timeout, patience
        self._hedge, self._backoff, self._batch, self._linger = hedge, backoff, batch, linger
        self._servers = Servers(addresses, most=_IN_FLIGHT, backoff=backoff)
        self._queue: list[_Question] = []
        self._flush: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._durations: deque[float] = deque(maxlen=100)
        self._thread = LoopThread("verifier-client")
        self._thread.run(self._open()).result()

    def submit(self, items: Sequence[Item]) -> Future[list[Verdict]]:
        """Start to judge; the verdicts come in the order of the items."""
        return self._thread.run(self._score(list(items)))

    def score(self, items: Sequence[Item]) -> list[Verdict]:
        """Judge and wait."""
        return self.submit(items).result()

    def close(self) -> None:
        """Cancel what is on its way and close the connections."""
        self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=10),
            connector=aiohttp.TCPConnector(limit=0),  # `Servers` limits them
            headers=authorization(),
        )
        self._keeper = self._loop.create_task(self._keep())

    async def _keep(self) -> None:
        """Closes the connections when the loop ends."""
        async with self._session:
            await asyncio.Event().wait()

    async def _score(self, items: list[Item]) -> list[Verdict]:
        deadline = self._loop.time() + self._deadline
        questions = [_Question(item, deadline, self._loop.create_future()) for item in items]
        self._queue += questions
        self._send(everything=False)
        return await asyncio.gather(*[question.answer for question in questions])

    def _send(self, everything: bool) -> None:
        """Begin requests for the full batches in the queue; what is left goes in a moment."""
        batches = batched(self._queue, self._batch)
        waits = batches and len(batches[-1]) < self._batch and not everything
        self._queue = batches.pop() if waits else []
        for batch in batches:
            self._begin(batch)
        if self._flush:
            self._flush.cancel()
            self._flush = None
        if self._queue:
            self._flush = self._loop.call_later(self._linger, self._send, True)

    def _begin(self, questions: Sequence[_Question]) -> None:
        def end(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (bug := task.exception()):  # who waits should see it
                for question in questions:
                    if not question.answer.done():
                        question.answer.set_exception(bug)

        task = self._loop.create_task(self._judge(questions))
        self._tasks.add(task)
        task.add_done_callback(end)

    async def _judge(self, questions: Sequence[_Question]) -> None:
        """One request, repeated until it is answered or the deadline is over."""
        reason, attempts = "", 0
        try:
            body = encode_items([question.item for question in questions])
            async with asyncio.timeout_at(questions[0].deadline):
                while True:
                    attempts += 1
                    try:
                        verdicts = await self._attempt(body, len(questions))
                        break
                    except TROUBLE as error:
                        reason = f"{type(error).__name__} {error}".strip()
                    await asyncio.sleep(self._backoff * random.uniform(0.5, 1.5))
        except TimeoutError:
            said = f"{UNANSWERED} after {self._deadline:g} s and {attempts} attempts"
            status = "error" if reason else "timeout"
            said = f"{said}; last {reason}" if reason else said
            verdicts = [Verdict(status, reason=said)] * len(questions)
        except (Refused, TypeError, RecursionError) as error:  # or it cannot be JSON
            may_be_one = not isinstance(error, Refused) or error.may_be_one
            if len(questions) > 1 and may_be_one:
                middle = len(questions) // 2
                self._begin(questions[:middle])
                self._begin(questions[middle:])
                return
            verdicts = [Verdict("error", reason=str(error))] * len(questions)
        for question, verdict in zip(questions, verdicts, strict=True):
            if not question.answer.done():
                question.answer.set_result(verdict)

    async def _attempt(self, body: bytes, count: int) -> list[Verdict]:
        """Ask a server and, if it takes long, a second one; the first answer wins."""
        first = await self._servers.take()
        running = {self._loop.create_task(self._ask(first, body, count))}
        try:
            done, _ = await asyncio.wait(running, timeout=self._hedge_after())
            if not done and (second := self._servers.other(first)):
                running.add(self._loop.create_task(self._ask(second, body, count)))
            error: BaseException | None = None
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task, error in [(task, task.exception()) for task in done]:
                    if error is None:
                        return task.result()
            raise error or RuntimeError("no request was made")
        finally:
            for task in running:
                task.cancel()

    def _hedge_after(self) -> float:
        if not self._durations:
            return self._hedge
        usual = sorted(self._durations)[int(0.95 * (len(self._durations) - 1))]
        return max(self._hedge, 2 * usual)

    async def _ask(self, server: Server, body: bytes, count: int) -> list[Verdict]:
        """One request to a server that was taken, and what is learnt of it."""
        began = time.monotonic()
        request = self._loop.create_task(post(self._session, server.address, body, count))
        try:
            while not (await asyncio.wait([request], timeout=self._patience))[0]:
                if not await is_well(self._session, server.address, self._patience):
                    raise TimeoutError(f"{server.address} does not even answer /health")
            verdicts = request.result()
        except Refused:
            self._servers.succeeded(server)
            raise
        except TROUBLE as error:
            rest = error.seconds if isinstance(error, Overloaded) else None
            self._servers.failed(server, rest)
            raise
        except asyncio.CancelledError:
            if server.answered < began:  # another one was faster, and this one gave nobody anything
                self._servers.failed(server)
            raise
        finally:
            request.cancel()
            self._servers.release(server)
        self._servers.succeeded(server)
        self._durations.append(time.monotonic() - began)
        return verdicts


def batched(questions: Sequence[_Question], most: int) -> list[list[_Question]]:
    """Consecutive batches of at most `most` items and about `_BATCH_CHARACTERS` of text."""
    batches: list[list[_Question]] = []
    room = 0
    for question in questions:
        if not batches or len(batches[-1]) == most or question.size > room:
            batches.append([])
            room = _BATCH_CHARACTERS
        batches[-1].append(question)
        room -= question.size
    return batches
