"""The completions of the coming steps, begun up to `ahead` steps before their turn.

With ahead = 0 a step samples from the parameters that it trains: the exact on-policy reference.
With ahead = n it trains on completions begun n updates earlier, while a fleet of servers samples
those of later steps; truncated importance sampling weighs the difference. A batch is never older.

Of several processes each collects its own part of a step, in threads in which it meets no other;
they meet where a step is begun and where it is taken, in the main thread.

The in-process sampler has the devices of the update: its completions are drawn at once, when they
are begun, which overlaps nothing, but is the same policy lag, and reproducible.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vtriune_jax import hosts
from vtriune_jax.collect import Collected
from vtriune_jax.data.feed import Skipped
from vtriune_jax.data.stream import PromptStream
from vtriune_jax.tail import TailStream
from vtriune_jax.timeline import Clock
from vtriune_jax.types import Group, Prompt

Prompts = PromptStream | TailStream
Drawn = tuple[list[Prompt], list[Skipped]]
"""Prompts, and the rows passed over on the way to them."""
Collect = Callable[[int, Any, Drawn, Clock], Collected]
"""(step, parameters, the step's first prompts, clock) → its completions."""


@dataclass(frozen=True)
class Begun:
    """A step that samples, or has sampled and waits for its turn."""

    step: int
    clock: Clock
    before: Mapping[str, Any]
    """Where the prompts stood before this step took any, unless they have a tail."""
    future: Future[Collected]


class Ahead:
    """Begins the steps in order and hands them out in order."""

    def __init__(
        self,
        collect: Collect,
        prompts: Prompts,
        clock: Callable[[int], Clock],
        *,
        ahead: int,
        last: int,
        threads: bool,
    ):
        """No step from `last` on is begun. `threads`: collect in the background."""
        self._collect, self._prompts, self._clock = collect, prompts, clock
        self._ahead, self._last = ahead, last
        self._pool = ThreadPoolExecutor(ahead, "rollouts") if threads and ahead else None
        self._begun: deque[Begun] = deque()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:  # after an error its threads end when the engine is closed
            self._pool.shutdown(wait=False, cancel_futures=True)

    def take(self, step: int, params: Any) -> tuple[Collected, Clock]:
        """The completions of `step`; from `params`, the newest, those of later steps are begun."""
        if not self._begun:
            self._begin(step, params)
        begun = self._begun.popleft()
        if self._pool:
            with begun.clock("wait"), hosts.together():
                got = begun.future.result()
        else:
            got = begun.future.result()
        if isinstance(self._prompts, TailStream):
            self._prompts.trained(got.groups)
        for later in range(step + 1 + len(self._begun), min(step + self._ahead + 1, self._last)):
            self._begin(later, params)
        return got, begun.clock

    def position(self) -> tuple[dict[str, Any], list[Group]]:
        """Where a run must go on that has trained on all that was taken, and what waits for it:
        all completions of the next step, in the order drawn, if they have been begun.

        Waits for these. Others are drawn again by a run that goes on: those of later steps, and
        with over-sampling all, since which prompts are complete first is not the same twice. All
        processes call it together; each has its own completions.
        """
        if not self._begun or isinstance(self._prompts, TailStream):
            return self._prompts.position(), []
        following = self._begun[0]
        with hosts.together():
            return dict(following.before), following.future.result().all_groups

    def _begin(self, step: int, params: Any) -> None:
        has_tail = isinstance(self._prompts, TailStream)
        before, clock = {} if has_tail else self._prompts.position(), self._clock(step)
        with hosts.together():
            first = self._prompts.take()
        if self._pool:
            future = self._pool.submit(self._collect, step, params, first, clock)
        else:
            future = Future()
            future.set_result(self._collect(step, params, first, clock))
        self._begun.append(Begun(step, clock, before, future))
