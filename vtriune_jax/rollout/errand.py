"""One prompt on its way through the fleet, until all of its completions are there.

Completions that a request brought stay when it fails half-way: only the others are asked for again,
under another request id, so that nothing is answered twice.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import orjson

from vtriune_jax.errors import UserError
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.fleet import Fleet
from vtriune_jax.rollout.servers import Server
from vtriune_jax.rollout.tally import Tally
from vtriune_jax.rollout.trouble import TROUBLE, ServerError, named, refusal
from vtriune_jax.rollout.wire import (
    WirePrompt,
    WrongAnswer,
    WrongPrompt,
    completion,
    joined,
    request_body,
    split_events,
    without_banned,
)
from vtriune_jax.types import Completion, Group, Prompt

_GRACE = 10.0
"""Seconds for a server to hand over what it has of aborted completions."""
_MOST_REFUSALS = 3
"""Requests of one prompt that may be answered by a refusal, or misread, before we believe it."""
_numbers = itertools.count()


class Refused(Exception):
    """A server will never do this."""


@dataclass(frozen=True)
class Manner:
    """How all prompts are completed."""

    stop_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]
    decode_text: Callable[[Sequence[int]], str]
    backoff: float
    name: str
    """Of the client, in request ids."""


class Errand:
    """The completions of one prompt."""

    def __init__(
        self,
        fleet: Fleet,
        manner: Manner,
        tally: Tally,
        prompt: Prompt,
        sampling: Sampling,
        begun: Sequence[Completion] = (),
        server: str = "",
    ) -> None:
        self.prompt, self._sampling = prompt, sampling
        self._fleet, self._manner, self._tally = fleet, manner, tally
        self._drawn = [ended(drawn, sampling.max_tokens) for drawn in begun]
        self._drawn += [_NOTHING] * (sampling.n - len(begun))
        self._name = f"{manner.name}-{next(_numbers)}"
        self._live: dict[int, Callable[[], None]] = {}
        """Number → how to abort it, of those that a server is drawing."""
        self._reader: asyncio.Task[None] | None = None
        """Of the request under way."""
        self._stopping = False
        self._refusals = self._held = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self.server = server
        """The address of the one that has seen the prompt last."""
        self.complaint = ""
        """The last failure."""

    @property
    def open(self) -> list[int]:
        """Numbers of the completions that have not come to their end."""
        return [k for k, drawn in enumerate(self._drawn) if drawn.finish == "abort"]

    def group(self) -> Group:
        """What there is now, with the texts."""
        return Group(self.prompt, tuple(self._with_text(drawn) for drawn in self._drawn))

    async def run(self, convert: Callable[[], Awaitable[WirePrompt]]) -> None:
        """Until nothing is open, or `stop`. Raises UserError for what no server will do.

        `convert` is awaited when a server takes the prompt, as its images should not be in memory
        for longer.
        """
        prompt, failed, failures = None, "", 0
        for attempt in itertools.count():
            wanted = self.open
            if not wanted or self._stopping:
                return
            chosen = await self._fleet.queue.take(len(wanted), prefer=self.server, avoid=failed)
            self.server, failed = chosen.address, ""
            self._tally.requests += 1
            self._held = len(wanted)
            try:
                prompt = prompt or await convert()
                await self._request(chosen, prompt, wanted, f"{self._name}-{attempt}")
                failures = 0
            except Refused as error:
                raise self._give_up(f"{self.server} refuses it: {error}") from error
            except (*TROUBLE, WrongAnswer) as error:
                self.server, failed = "", chosen.address
                self.complaint = f"{failed} {refusal(error)}"
                self._tally.retries += 1
                self._blame(chosen, error)
                failures += 1
            finally:
                self._fleet.queue.give_back(chosen, self._held)
            if self.open and not self._stopping:
                pause = min(self._manner.backoff * 2.0 ** min(failures, 30), 5.0)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))

    def stop(self, task: asyncio.Task[None]) -> None:
        """Abort what is drawn now, and keep it; `task` is the one that runs this errand."""
        self._stopping = True
        if self._reader is None or not self._live:
            task.cancel()
            return
        for abort in self._live.values():
            abort()
        asyncio.get_running_loop().call_later(_GRACE, self._reader.cancel)

    async def _request(
        self, server: Server, prompt: WirePrompt, wanted: list[int], rid: str
    ) -> None:
        begun = [self._drawn[k].ids for k in wanted]
        manner = self._manner
        body = request_body(rid, prompt, begun, self._sampling, manner.stop_ids, manner.banned_ids)
        self._reader = asyncio.create_task(self._read(server, prompt, wanted, body))
        server.requests.add(self._reader)
        try:
            await asyncio.wait([self._reader])
            if not self._reader.cancelled():
                self._reader.result()
            elif not self._stopping:
                raise ServerError(server.reason)
        finally:
            self._reader.cancel()
            server.requests.discard(self._reader)
            self._reader = None
            self._live.clear()

    async def _read(
        self, server: Server, prompt: WirePrompt, wanted: list[int], body: bytes
    ) -> None:
        """Send the request and take in the completions as they come."""
        version = server.version
        left = set(range(len(wanted)))
        async with self._fleet.open(server, "/generate", body) as answer:
            if answer.status != 200:
                said = (await answer.text(errors="replace"))[:300]
                raise answer_error(answer.status, said)
            rest = b""
            async for data in answer.content.iter_any():
                self._fleet.heard(server)
                events, rest = split_events(rest + data)
                for event in events:
                    number, output = read_event(event, len(wanted))
                    meta = output["meta_info"]
                    if number not in left:
                        continue  # it has come to its end
                    if not meta["finish_reason"]:
                        self._live[wanted[number]] = partial(self._abort, server, meta["id"])
                        if self._stopping:
                            self._abort(server, meta["id"])
                        continue
                    self._live.pop(wanted[number], None)
                    left.discard(number)
                    self._take(server, wanted[number], output, prompt, version)
                if self._stopping and not self._live:
                    return  # what is left has no token yet
        if left:
            raise WrongAnswer(f"{len(left)} of {len(wanted)} completions are missing")

    def _take(
        self, server: Server, k: int, output: dict[str, Any], prompt: WirePrompt, version: str
    ) -> None:
        """Check and keep what a server has drawn of completion `k`."""
        before = self._drawn[k]
        finish = output["meta_info"]["finish_reason"]
        if isinstance(finish, dict) and finish.get("status_code"):
            raise answer_error(finish["status_code"], str(finish.get("message")))
        room = self._sampling.max_tokens - len(before.ids)
        more = completion(output, prompt.tokens + len(before.ids), room)
        if more.versions:
            self._fleet.check_version(server, version, str(more.versions[-1][0]))
        self._tally.received(server, more, self._fleet)
        self._fleet.answered(server)
        more, hit = without_banned(more, self._manner.banned_ids)
        self._tally.banned += hit
        drawn = joined(before, more) if len(before.ids) else more
        if not len(drawn.ids):  # nothing is left of it: draw another one
            drawn = _NOTHING
        whole = drawn.finish != "abort"
        self._drawn[k] = self._with_text(drawn) if whole else drawn
        if whole:
            self._tally.completions += 1
            self._held -= 1
            self._fleet.queue.give_back(server, 1)
        elif self._stopping:
            self._tally.aborted += 1

    def _blame(self, server: Server, error: Exception) -> None:
        """Tell the fleet of a failure; UserError if it is rather the prompt that is wrong."""
        self._fleet.failed(server, error)
        misread = isinstance(error, WrongPrompt)
        refused = isinstance(error, ServerError) and error.status == 500
        self._refusals += misread or refused
        if self._refusals < _MOST_REFUSALS:
            return
        advice = ""
        if misread:
            advice = (
                "; give the servers a checkpoint whose preprocessor_config.json has limits of "
                "pixels no narrower than data.min_pixels and data.max_pixels"
            )
        raise self._give_up(f"{self.complaint}{advice}") from error

    def _give_up(self, why: str) -> UserError:
        return UserError(
            f"rollout: {self.prompt.sample.place} cannot be completed: {why}; the server's log "
            "may say more"
        )

    def _abort(self, server: Server, rid: str) -> None:
        async def abort() -> None:
            try:
                await self._fleet.post(server, "/abort_request", {"rid": rid}, timeout=_GRACE)
            except TROUBLE as error:
                self.complaint = f"{server.address} does not abort: {named(error)}"
                if self._reader:
                    self._reader.cancel()  # the server then ends it, and nothing is kept

        task = asyncio.create_task(abort())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _with_text(self, drawn: Completion) -> Completion:
        if drawn.text or not len(drawn.ids):
            return drawn
        ids = drawn.ids[:-1] if drawn.finish == "stop" else drawn.ids
        return replace(drawn, text=self._manner.decode_text(ids.tolist()))


_NOTHING = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), "", "abort")


def ended(drawn: Completion, max_tokens: int) -> Completion:
    """A completion that was interrupted at its last token has come to its end."""
    if drawn.finish == "abort" and len(drawn.ids) >= max_tokens:
        return replace(drawn, finish="length")
    return drawn


def read_event(event: bytes, count: int) -> tuple[int, dict[str, Any]]:
    """(number of the completion, its state); Refused, ServerError or WrongAnswer for others."""
    try:
        output = orjson.loads(event)
        if "error" in output:
            error = output["error"]
            raise answer_error(error.get("code") or 500, str(error.get("message")))
        number, _ = output["index"], output["meta_info"]["finish_reason"]
    except (KeyError, TypeError, AttributeError, orjson.JSONDecodeError) as error:
        raise WrongAnswer(f"cannot be read ({named(error)})") from error
    if not (isinstance(number, int) and 0 <= number < count):
        raise WrongAnswer(f"a completion {number} of {count}")
    return number, output


def answer_error(status: int, said: str) -> Exception:
    """What an HTTP status means for the request: nothing to do about 400, else another try."""
    if status in (400, 404, 413, 422):
        return Refused(f"HTTP {status} {said[:300]}")
    return ServerError(f"/generate: HTTP {status} {said[:300]}", status)
