"""The long tail: a step asks for more prompts than it needs and takes those that end first.

The others are interrupted and come first in the next step that begins: continued from the tokens
they have, if these are not too old, or anew. No prompt is lost, and none is trained on twice; the
last ones of a stage stay in its checkpoint.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from vtriune_jax.data.feed import Skipped
from vtriune_jax.data.stream import PromptStream, Ticket
from vtriune_jax.types import Group, Prompt


class Result(Protocol):
    """Groups that are complete, and those that are not."""

    @property
    def groups(self) -> Sequence[Group]: ...  # noqa: D102
    @property
    def begun(self) -> Sequence[Group]: ...  # noqa: D102


Submit = Callable[[Sequence[Prompt], int, Sequence[Group]], Future[Any]]
"""(new prompts, how many groups are needed, groups to be continued) → their `Result`."""


class TailStream:
    """A `PromptStream` that hands out `extra` more prompts than a step needs."""

    def __init__(
        self,
        stream: PromptStream,
        extra: int,
        carry: Callable[[Group], bool],
        left: Sequence[tuple[Prompt, Ticket]] = (),
    ):
        """`carry` says whether the tokens of an interrupted group may be continued; `left` are the
        prompts that a run which goes on had begun."""
        self._stream, self._extra, self._carry = stream, extra, carry
        self._left = deque(left)
        self._tickets: dict[int, Ticket] = {}
        self._begun: dict[int, Group] = {}

    def take(self) -> tuple[list[Prompt], list[Skipped]]:
        """The prompts that were left, then new ones."""
        again = [self._left.popleft() for _ in range(len(self._left))]
        count = max(0, self._stream.size + self._extra - len(again))
        new, skipped = self._stream.take(count)
        tickets = self._stream.tickets(count)
        for prompt, ticket in [*again, *zip(new, tickets, strict=True)]:
            self._tickets[id(prompt)] = ticket
        return [*(prompt for prompt, _ in again), *new], skipped

    def answer(self, submit: Submit, prompts: Sequence[Prompt]) -> list[Group]:
        """As many complete groups as a step needs; the rest is left for the next."""
        begun = [self._begun.pop(id(p)) for p in prompts if id(p) in self._begun]
        known = {id(group.prompt) for group in begun}
        new = [prompt for prompt in prompts if id(prompt) not in known]
        result = submit(new, self._stream.size, begun).result()
        for group in result.groups:
            del self._tickets[id(group.prompt)]
        for group in result.begun:
            if group.completions and self._carry(group):
                self._begun[id(group.prompt)] = group
            self._left.append((group.prompt, self._tickets.pop(id(group.prompt))))
        return list(result.groups)

    def place(self) -> int:
        """As `PromptStream.place`, for a process without others."""
        return 0

    def maker(self, count: int) -> Callable[[int], Prompt]:
        """As `PromptStream.maker`."""
        return self._stream.maker(count)

    def give_back(self, count: int) -> None:
        """As `PromptStream.give_back`, which wants dynamic sampling, which has no tail."""
        self._stream.give_back(count)

    def position(self) -> dict[str, Any]:
        """As of the stream, and the tickets of the prompts that are left."""
        left = [ticket for _, ticket in self._left]
        return self._stream.position() | {"left": left}
