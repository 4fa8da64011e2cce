"""The long tail: a step asks for more prompts than it needs and takes those that end first.

The others are interrupted and come first in the next step that begins: continued from the tokens
they have, if these are not too old, or anew. No prompt is lost, and none is trained on twice; the
last ones of a stage stay in its checkpoint.

Of several processes each asks for its share, and leaves stragglers to itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from vtriune_jax import hosts
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
    """A `PromptStream` that hands out `extra` more prompts than a step needs, over all processes,
    whose number divides both."""

    def __init__(
        self,
        stream: PromptStream,
        extra: int,
        carry: Callable[[Group], bool],
        left: Sequence[tuple[Prompt, Ticket]] = (),
    ):
        """`carry` says whether the tokens of an interrupted group may be continued; `left` are the
        prompts that a run which goes on had begun."""
        self._stream, self._carry = stream, carry
        self._processes = hosts.share().count
        self._needed = stream.size // self._processes
        self._asked = self._needed + extra // self._processes
        self._left = deque(prompt for prompt, _ in left)
        self._open = {id(prompt): (prompt, ticket) for prompt, ticket in left}
        """Prompts that were taken and not trained on."""
        self._begun: dict[int, Group] = {}

    def take(self) -> tuple[list[Prompt], list[Skipped]]:
        """The prompts that were left, then new ones.

        All processes call it together and take equally many of both, so that the next prompt's
        number stays the same for all. What may go wrong comes after they have met.
        """
        known = min(hosts.gather(min(len(self._left), self._asked)))
        again = [self._left.popleft() for _ in range(known)]
        count = (self._asked - known) * self._processes
        new, skipped = self._stream.take(count)
        tickets = self._stream.tickets(count)[self._stream.place() :: self._processes]
        for prompt, ticket in zip(new, tickets, strict=True):
            self._open[id(prompt)] = prompt, ticket
        return [*again, *new], skipped

    def answer(self, submit: Submit, prompts: Sequence[Prompt]) -> list[Group]:
        """As many complete groups as a step needs; the rest is left for the next that begins."""
        begun = [self._begun.pop(id(p)) for p in prompts if id(p) in self._begun]
        known = {id(group.prompt) for group in begun}
        new = [prompt for prompt in prompts if id(prompt) not in known]
        result = submit(new, self._needed, begun).result()
        for group in result.begun:
            if group.completions and self._carry(group):
                self._begun[id(group.prompt)] = group
            self._left.append(group.prompt)
        return list(result.groups)

    def trained(self, groups: Sequence[Group]) -> None:
        """A step trains on these: they will not be asked for again."""
        for group in groups:
            del self._open[id(group.prompt)]

    def place(self) -> int:
        """As `PromptStream.place`; groups that come as they are complete have no order."""
        return 0

    def maker(self, count: int) -> Callable[[int], Prompt]:
        """As `PromptStream.maker`."""
        return self._stream.maker(count)

    def give_back(self, count: int) -> None:
        """As `PromptStream.give_back`, which wants dynamic sampling, which has no tail."""
        self._stream.give_back(count)

    def position(self) -> dict[str, Any]:
        """As of the stream, and the tickets of all prompts that were taken and not trained on.

        Of all processes, which call it together.
        """
        everyone = hosts.gather([ticket for _, ticket in self._open.values()])
        left = sorted((t for theirs in everyone for t in theirs), key=lambda t: t["number"])
        return self._stream.position() | {"left": left}
