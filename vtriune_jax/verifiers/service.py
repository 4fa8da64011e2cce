"""What a verifier server does, HTTP aside: it admits batches, answers repetitions from its cache
and has the rest judged in the pool. It lives on one event loop and never blocks it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vtriune_jax.types import Verdict
from vtriune_jax.verifiers import known_verifiers
from vtriune_jax.verifiers.cache import Cache, content
from vtriune_jax.verifiers.item import Item
from vtriune_jax.verifiers.pool import Answer
from vtriune_jax.verifiers.router import Router
from vtriune_jax.verifiers.telemetry import Telemetry
from vtriune_jax.verifiers.worker import describe

CACHE = 2**14
"""Verdicts that are kept; one of boxes takes about 3 kB."""
QUEUE = 4096
"""Completions that may be in work or wait."""
_JUDGE = "vtriune_jax.verifiers.judge"


class Refused(Exception):
    """Not now: `status` is 429 (too much to do) or 503 (ending); come back after some seconds."""

    def __init__(self, status: int, retry_after: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after


class Service:
    """The state of one server."""

    def __init__(
        self,
        router: Router,
        *,
        cache: int = CACHE,
        queue: int = QUEUE,
        compat: bool = False,
        iou_threshold: str | float = "dynamic",
    ) -> None:
        """`compat` and `iou_threshold` are for `judge`; the router has its own defaults."""
        self.telemetry = Telemetry()
        self.draining = False
        self.pending = 0
        """Completions admitted and not answered yet."""
        self._router, self._cache, self._queue = router, Cache(cache), queue
        self._judge_as = {"compat": compat, "iou_threshold": iou_threshold}
        self._compat = compat
        self._pace = 0.0
        """Seconds per completion, averaged over the last few requests under load."""
        self._answered = time.monotonic()

    def admit(self, count: int) -> None:
        """Raises `Refused` when there is no room for `count` more completions.

        One request is always admitted when nothing else is there, however large.
        """
        if self.draining:
            raise Refused(503, 1, "the server is ending; ask another one")
        if self.pending and self.pending + count > self._queue:
            wait = min(max(round(self._pace * self.pending), 1), 30)
            raise Refused(
                429, wait, f"{self.pending} completions wait, {self._queue} may; try again later"
            )

    async def verify(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per item, in order. Cancelled, it cancels what no worker has yet."""
        self.admit(len(items))
        start = time.monotonic()
        verdicts = await self._counted(len(items), self._verdicts(items))
        self.telemetry.took(time.monotonic() - start)
        known = known_verifiers()
        for item, verdict in zip(items, verdicts, strict=True):
            name = item.reward.verifier
            name = name if name in known else "unknown"
            self.telemetry.completions[name, verdict.status] += 1
        return verdicts

    async def judge(self, request: Mapping[str, Any]) -> dict[str, Any] | str:
        """V-Triune's wire: the response, or what is wrong with the request."""
        self.admit(1)
        return await self._counted(1, self._judgement(request))

    def metrics(self) -> str:
        """The counters, for Prometheus."""
        return self.telemetry.text(
            gauges={
                "pending": self.pending,
                "waiting": self._router.pool.waiting,
                "workers": self._router.pool.size,
                "cached": len(self._cache),
                "draining": self.draining,
            },
            counters={"workers_replaced_total": self._router.pool.replaced},
        )

    def close(self) -> None:
        """End the workers."""
        self._router.close()

    async def _counted(self, count: int, work: Any) -> Any:
        """Await while `count` completions are pending."""
        if not self.pending:
            self._answered = time.monotonic()
        self.pending += count
        try:
            return await work
        finally:
            self.pending -= count
            now = time.monotonic()
            self._pace += 0.2 * ((now - self._answered) / max(count, 1) - self._pace)
            self._answered = now

    async def _verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        if not self._cache.size:
            return await self._scored(items)
        keys = [content(item) for item in items]
        found = {key: verdict for key in keys if (verdict := self._cache.get(key))}
        new = {key: item for key, item in zip(keys, items, strict=True) if key not in found}
        self.telemetry.cache[("miss",)] += len(new)
        self.telemetry.cache[("hit",)] += len(items) - len(new)
        for key, verdict in zip(new, await self._scored(list(new.values())), strict=True):
            self._cache.put(key, verdict)
            found[key] = verdict
        return [found[key] for key in keys]

    async def _scored(self, items: Sequence[Item]) -> list[Verdict]:
        answers = await asyncio.wrap_future(self._router.submit(items))
        return self._router.collect(items, answers)

    async def _judgement(self, request: Mapping[str, Any]) -> dict[str, Any] | str:
        judged = await self._called("judge", request, **self._judge_as)
        if isinstance(judged, str) and judged.startswith("UserError: "):
            return judged.removeprefix("UserError: ")
        status = "ok" if isinstance(judged, Mapping) else "error"
        if not isinstance(judged, Mapping):
            if isinstance(judged, TimeoutError):
                status = "timeout"
            reason = judged if isinstance(judged, str) else describe(judged)
            judged = await self._called("unjudged", request, reason, compat=self._compat)
        self.telemetry.completions["judge", status] += 1
        return dict(judged) if isinstance(judged, Mapping) else str(judged)

    async def _called(self, function: str, *args: Any, **keywords: Any) -> Answer:
        """What a function of `judge` returns in a worker."""
        call = self._router.pool.call(_JUDGE, function, *args, **keywords)
        return (await asyncio.wrap_future(call))[0]
