"""Prompts one chunk after the other, of which the last ones can be given back.

A step that draws more than it uses gives the rest back, and the next step begins with it. The
position is two things: where the mixture stood before the first chunk that is not used up, and how
many prompts have been used in all. A run that goes on from there makes that chunk again.

Of several processes, each has only every n-th prompt; numbers and positions count those of all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vtriune_jax.data.feed import Skipped
from vtriune_jax.types import Prompt


@dataclass(frozen=True)
class Chunk:
    """Prompts that were made together."""

    number: int
    """From 0, over the whole stage."""
    prompts: list[Prompt]
    """Those of this process."""
    skipped: list[Skipped]
    """The rows that were passed over on the way."""
    before: Mapping[str, int]
    """Where the mixture stood before this chunk …"""
    after: Mapping[str, int]
    """… and after it."""


Ticket = dict[str, Any]
"""Of one prompt: its `number` in the stage; `data`, where the mixture stood before its chunk."""


class PromptStream:
    """`chunks` of `size` prompts, from the one in which prompt number `taken` lies.

    `data` is where the mixture stands before them. The process has the prompts whose number is
    `index` modulo `count`, which divides `size`. `again` makes the prompt of a ticket.
    """

    def __init__(
        self,
        chunks: Iterator[Chunk],
        size: int,
        taken: int = 0,
        data: Mapping[str, int] = MappingProxyType({}),
        *,
        index: int = 0,
        count: int = 1,
        again: Callable[[Ticket], Prompt] | None = None,
    ):
        self._chunks = chunks
        self.size = size
        self._again = again
        self._taken = self._known = self._before = taken
        self._index, self._count = index, count
        self._held: deque[Chunk] = deque()
        self._data = data

    def take(self, count: int | None = None) -> tuple[list[Prompt], list[Skipped]]:
        """The next prompts, `size` unless said otherwise, and the rows newly passed over.

        Of several processes each gets its own ones among them.
        """
        count = self.size if count is None else count
        if not count:
            return [], []
        end, skipped = self._taken + count, []
        while not self._held or (self._held[-1].number + 1) * self.size < end:
            chunk = next(self._chunks)
            self._held.append(chunk)
            if chunk.number * self.size >= self._known:  # else told before the run was resumed
                skipped += chunk.skipped
        self._before, self._taken = self._taken, end
        first = self._before + self.place()
        start = (first - self._held[0].number * self.size) // self._count
        prompts = [prompt for chunk in self._held for prompt in chunk.prompts]
        return prompts[start : start + len(range(first, end, self._count))], skipped

    def place(self) -> int:
        """Of this process's first prompt among those of all that were taken last; the next ones
        follow in steps of `count`."""
        return (self._index - self._before) % self._count

    def tickets(self, count: int) -> list[Ticket]:
        """By which the last `count` prompts taken can be made again; call it before `position`."""
        before = {chunk.number: dict(chunk.before) for chunk in self._held}
        numbers = range(self._taken - count, self._taken)
        return [{"number": n, "data": before[n // self.size]} for n in numbers]

    def maker(self, count: int) -> Callable[[int], Prompt]:
        """What makes any of the last `count` prompts of all processes again, by its place."""
        again, tickets = self._again, self.tickets(count)
        if again is None:
            raise ValueError("this stream was not told how to make prompts again")
        return lambda place: again(tickets[place])

    def give_back(self, count: int) -> None:
        """The last `count` prompts taken will be taken again; not across a call of `position`."""
        self._taken -= count

    def position(self) -> dict[str, Any]:
        """What a stream must be given to go on here: `taken`, and `data` for the mixture."""
        while self._held and (self._held[0].number + 1) * self.size <= self._taken:
            self._data = self._held.popleft().after
        if self._held:
            self._data = self._held[0].before
        return {"taken": self._taken, "data": dict(self._data)}
