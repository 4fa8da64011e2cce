"""One server of the simulated fleet: prompts are read one after the other, completions together.

All completions in flight gain tokens at one pace, that of the number in flight. So a server counts
tokens since its start, `progress`, and a completion is done when that reaches a number known when
it begins: each beginning and end costs O(log of those in flight), whatever the lengths.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass, field

from vtriune_jax.rollout.simulation.speeds import Speeds

ROUNDING = 1e-4
"""Tokens, and 1e-9 s, by which sums of many float pieces may miss their end."""


@dataclass(eq=False)
class Sequence:
    """A completion, begun or not."""

    prompt: int
    """The number of its prompt, in the order of the data."""
    length: int
    """Tokens at which it ends."""
    done: float = 0.0
    """Tokens that it has, up to `mark`."""
    mark: float = 0.0
    """Its server's progress when it was last counted."""
    spans: dict[int, float] = field(default_factory=dict)
    """Version of the weights → tokens of it."""
    finished: float = math.nan
    """When it was complete, and its prompt in a step that is under way."""
    end: float = math.nan
    """The progress of its server at which it is complete; NaN where no server works on it."""


class Server:
    """A server's clock, its queue of prompts and the completions in flight."""

    def __init__(self, speeds: Speeds, token_seconds: list[float]):
        self.version = 0
        self.in_flight = 0
        """Completions that were given to it and are not complete."""
        self.busy = 0.0
        """Seconds in which it read or wrote tokens."""
        self.stamp = 0
        """Goes up with each change; an event foreseen before is void."""
        self._prefill, self._token_seconds = speeds.prefill, token_seconds
        self._now = self._progress = 0.0
        self._paused_until = 0.0
        self._prompts: deque[list] = deque()  # [seconds left to read, what then begins]
        self._running: list[tuple[float, int, Sequence]] = []
        """(end, number, completion); void where the completion has another end by now."""
        self._decoding = 0
        self._order = itertools.count()

    def begin(self, sequences: list[Sequence], prompt_tokens: float) -> None:
        """Give it completions of one prompt, which is read once, and what they have already."""
        tokens = prompt_tokens + sum(sequence.done for sequence in sequences)
        self._prompts.append([tokens / self._prefill, sequences])
        self.in_flight += len(sequences)

    def advance(self, now: float) -> None:
        """Let time pass, at most to the next event."""
        start = min(max(self._now, self._paused_until), now)
        spent, self._now = now - start, now
        if self._prompts:
            self._prompts[0][0] -= spent
            self.busy += spent
        elif self._decoding:
            self._progress += spent / self._token_seconds[self._decoding]
            self.busy += spent

    def next_event(self) -> float:
        """When something ends here, if nothing comes between; infinity if there is nothing."""
        start = max(self._now, self._paused_until)
        if self._prompts:
            return start + max(self._prompts[0][0], 0.0)
        while self._running and self._running[0][0] != self._running[0][2].end:
            heapq.heappop(self._running)
        if not self._running:
            return math.inf
        left = max(self._running[0][0] - self._progress, 0.0)
        return start + left * self._token_seconds[self._decoding]

    def collect(self) -> list[Sequence]:
        """What is complete now; a prompt that is read lets its completions begin."""
        if self._now < self._paused_until:
            return []
        while self._prompts and self._prompts[0][0] <= 1e-9:
            for sequence in self._prompts.popleft()[1]:
                sequence.mark = self._progress
                sequence.end = self._progress + sequence.length - sequence.done
                heapq.heappush(self._running, (sequence.end, next(self._order), sequence))
                self._decoding += 1
        complete = []
        while self._running and self._running[0][0] <= self._progress + ROUNDING:
            end, _, sequence = heapq.heappop(self._running)
            if sequence.end == end:
                self._count(sequence)
                self._leave(sequence)
                complete.append(sequence)
        return complete

    def abort(self, sequence: Sequence) -> None:
        """Takes back a completion that it was given."""
        if not math.isnan(sequence.end):
            self._count(sequence)
            self._leave(sequence)
            return
        for prompt in self._prompts:
            if sequence in prompt[1]:
                prompt[1].remove(sequence)
                self.in_flight -= 1

    def update(self, version: int, until: float, prompt_tokens: float) -> None:
        """New weights, for which it stands still `until` then.

        What is in flight goes on with them, after its tokens so far were read again.
        """
        live = [sequence for end, _, sequence in self._running if sequence.end == end]
        for sequence in live:
            self._count(sequence)
        again = len({sequence.prompt for sequence in live}) * prompt_tokens
        again += sum(sequence.done for sequence in live)
        if live and again < math.inf and self._prefill < math.inf:
            self._prompts.appendleft([again / self._prefill, []])
        self.version, self._paused_until = version, until

    def _count(self, sequence: Sequence) -> None:
        """Books its tokens since `mark` on the present version."""
        tokens = self._progress - sequence.mark
        sequence.spans[self.version] = sequence.spans.get(self.version, 0.0) + tokens
        sequence.done += tokens
        sequence.mark = self._progress

    def _leave(self, sequence: Sequence) -> None:
        sequence.end = math.nan
        self._decoding -= 1
        self.in_flight -= 1
