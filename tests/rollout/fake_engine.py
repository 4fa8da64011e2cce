"""The scheduler of the fake server: continuous batching, pauses, updates, aborts, versions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.rollout.fake_models import Line


@dataclass(eq=False)
class Request:
    """A completion that the scheduler knows of."""

    rid: str
    line: Line
    interval: int
    """Tokens from one streamed chunk to the next."""
    updates: list[tuple[str, int]] = field(default_factory=list)
    """(version, tokens that it and those before have drawn)."""
    finish: dict[str, Any] | None = None
    ran: bool = False
    retractions: int = 0
    prompt_logps: list[Any] | None = None
    began: float = field(default_factory=time.monotonic)
    chunks: asyncio.Queue[bool] = field(default_factory=asyncio.Queue)
    """Something to send; True: the end."""


class Engine:
    """Draws a token for every running request, again and again."""

    def __init__(
        self,
        source: Any,
        *,
        version: str,
        model_path: str,
        token_seconds: float,
        capacity: int,
    ):
        self.source, self.version, self.model_path = source, version, model_path
        self.token_seconds, self.capacity = token_seconds, capacity
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.known: dict[str, Request | None] = {}
        """By rid, from the arrival of the HTTP request on."""
        self.paused = ""
        """The mode, while paused."""
        self.hung = 0
        """Requests that will never be answered."""
        self.tokens = self.aborted = self.most_running = 0
        self._readers = 0
        self._changed = asyncio.Condition()
        self._work = asyncio.Event()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """While an HTTP request generates; it begins when nothing is paused or updated."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self.paused and self._readers >= 0)
            self._readers += 1
        try:
            yield
        finally:
            async with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    def submit(self, request: Request) -> None:
        """Put a request into the queue."""
        self.known[request.rid] = request
        self.waiting.append(request)
        self._work.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._work.wait()
            if self.paused or not (self.running or self.waiting):
                self._work.clear()
                continue
            while self.waiting and len(self.running) < self.capacity:
                self.running.append(self.waiting.pop(0))
            self.most_running = max(self.most_running, len(self.running))
            await self.source.refresh([r.line for r in self.running])
            for request in self.running:
                if not request.finish:  # it may have been aborted
                    self._advance(request)
            self.running = [request for request in self.running if not request.finish]
            await asyncio.sleep(self.token_seconds)

    def _advance(self, request: Request) -> None:
        line, draw = request.line, request.line.draw
        request.ran = True
        if draw.max_new_tokens > 0:
            chosen, logp = self.source.step(line)
            line.ids.append(chosen)
            line.logps.append(logp)
            self.tokens += 1
        count = len(line.ids)
        if line.ids and line.ids[-1] in draw.stop:
            request.finish = {"type": "stop", "matched": line.ids[-1]}
        elif count >= draw.max_new_tokens:
            request.finish = {"type": "length", "length": count}
        if request.finish or count == 1 or count % request.interval == 0:
            self._tell(request)

    def _tell(self, request: Request) -> None:
        if request.finish:
            self.known.pop(request.rid, None)
        request.chunks.put_nowait(bool(request.finish))

    def abort(self, rid: str = "", everything: bool = False) -> None:
        """End one request, or all, with what it has."""
        chosen = list(self.known) if everything else [rid] if self.known.get(rid) else []
        for request in [self.known[each] for each in chosen]:
            if request is None or request.finish:
                continue
            if request.ran:
                request.finish = {
                    "type": "abort",
                    "message": "Aborted",
                    "status_code": None,
                    "err_type": None,
                }
            else:
                request.finish = {"type": "abort", "message": "Abort in waiting queue"}
            self.aborted += 1
            for queue in (self.running, self.waiting):
                if request in queue:
                    queue.remove(request)
            self._tell(request)

    async def pause(self, mode: str) -> None:
        """Stop drawing: with all aborted, retracted, or as they are."""
        self.paused = mode
        if mode == "retract":
            for request in self.running:
                request.retractions += 1
            self.waiting = self.running + self.waiting
            self.running = []
        while mode == "abort":
            self.abort(everything=True)
            if not self._readers and not self.hung:
                return
            await asyncio.sleep(0.05)

    async def resume(self) -> None:
        """Go on."""
        async with self._changed:
            self.paused = ""
            self._changed.notify_all()
        self._work.set()

    def flush(self) -> bool:
        """Whether the cache could be emptied."""
        return not self.running and (bool(self.paused) or not self.waiting)

    async def update(self, folder: str, version: str | None, flush: bool, abort: bool) -> None:
        """Other weights; unless paused, after all requests under way."""
        if abort:
            self.abort(everything=True)
        if self.paused:
            await self._update(folder, version, flush)
            return
        async with self._changed:
            await self._changed.wait_for(lambda: not self._readers)
            self._readers = -1
        try:
            await self._update(folder, version, flush)
        finally:
            async with self._changed:
                self._readers = 0
                self._changed.notify_all()

    async def _update(self, folder: str, version: str | None, flush: bool) -> None:
        await asyncio.to_thread(self.source.load, Path(folder))
        if flush and not self.flush():
            raise RuntimeError("Cache flush failed after updating weights")
        self.model_path = folder
        if version is not None:
            for request in self.running + self.waiting:
                if request.line.ids:
                    request.updates.append((self.version, len(request.line.ids)))
            self.version = version

    def output(self, request: Request, wants_logps: bool) -> dict[str, Any]:
        """The answer on a request as it stands."""
        line, prompt = request.line, request.line.prompt
        prompt_logps = request.prompt_logps
        finish, count = request.finish, len(request.line.ids)
        meta: dict[str, Any] = {"id": request.rid, "finish_reason": finish}
        if request.ran:
            meta |= {
                "prompt_tokens": len(prompt.ids),
                "num_retractions": request.retractions,
                "reasoning_tokens": 0,
                "cached_tokens": 0 if prompt_logps else max(0, len(prompt.ids) - 1),
                "cached_tokens_details": None,
                "image_tokens": prompt.image_tokens,
                "dp_rank": None,
            }
        meta |= {"weight_version": self.version, "completion_tokens": count}
        if finish:
            meta |= {"e2e_latency": time.monotonic() - request.began}
        if finish and request.ran:
            ends = [*request.updates, (self.version, count)]
            starts = [0, *(end for _, end in ends)]
            meta["weight_versions"] = [
                {"version": version, "start": start, "end": end}
                for start, (version, end) in zip(starts, ends, strict=False)
                if end > start or not count
            ]
        if wants_logps:
            meta |= {
                "input_token_logprobs": prompt_logps or [],
                "output_token_logprobs": [
                    [logp, i, None] for logp, i in zip(line.logps, line.ids, strict=True)
                ],
                "output_token_logprobs_length": count,
            }
        text = "".join(f" {i}" for i in line.ids)
        return {"text": text, "output_ids": list(line.ids), "meta_info": meta}
