"""The training loop as discrete events: who waits for whom, and how old what is trained on is.

The loop is that of `train` and `ahead`: a step takes its completions, begins those of later steps
up to `ahead` steps early, updates and publishes the weights. Prompts go to the server with the
fewest completions in flight, first come, first served; all completions of one together.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vtriune_jax.errors import UserError
from vtriune_jax.rollout.simulation.server import Sequence, Server
from vtriune_jax.rollout.simulation.speeds import Speeds

Lengths = Callable[[np.random.Generator, int], np.ndarray]
"""(generator, n) → tokens of n completions, at least 1 each."""

TAIL = 0.9
"""The long tail of a step begins when this part of its completions is complete."""


@dataclass(frozen=True)
class Scenario:
    """One run to simulate."""

    speeds: Speeds
    lengths: Lengths
    servers: int
    prompts: int
    """Per step."""
    samples: int
    """Completions per prompt."""
    prompt_tokens: float
    steps: int = 20
    ahead: int = 0
    over_sampling: float = 0.0
    """Prompts that are begun beyond those of a step, as a part of them; when enough are complete,
    the others are interrupted, and come first in the next step that begins."""
    carry: int = 0
    """Versions that the tokens of an interrupted prompt may be behind to be kept; 0: never."""
    seed: int = 0


@dataclass(eq=False)
class Prompt:
    """A prompt and its completions."""

    number: int
    sequences: list[Sequence]
    batch: Batch | None = None
    server: Server | None = None


@dataclass(eq=False)
class Batch:
    """The prompts of one step."""

    begun: float
    chosen: list[Prompt] = field(default_factory=list)
    """Complete, in this order; these are trained on."""
    interrupted: int = 0
    rollout: float = math.nan
    """When enough of them were complete."""
    judged: float = math.inf
    """When the last one was judged."""


class Run:
    """The state of a simulation; `run` gives a record per step, by the names of the metrics."""

    def __init__(self, scenario: Scenario):
        self._s = scenario
        if scenario.speeds.capacity < 1 or scenario.servers < 1:
            raise UserError(
                f"{scenario.servers} servers for {scenario.speeds.capacity} completions each: "
                "at least one of both is needed"
            )
        seconds = scenario.speeds.token_seconds()
        # One prompt may be larger than a server's capacity, and then has it for itself.
        seconds += [seconds[-1]] * max(scenario.samples - scenario.speeds.capacity, 0)
        self._servers = [Server(scenario.speeds, seconds) for _ in range(scenario.servers)]
        self._rng = np.random.default_rng(scenario.seed)
        self._events: list[tuple[float, int, Callable[[], None], Server | None, int]] = []
        self._order = itertools.count()
        self._now = 0.0
        self._fresh = itertools.count()
        self._returned: deque[Prompt] = deque()
        self._waiting: deque[Prompt] = deque()
        self._batches: dict[int, Batch] = {}
        self._open: dict[int, Prompt] = {}
        self._workers = [0.0] * max(scenario.speeds.verify_workers, 1)
        self._step = self._next = 0
        self._wanted: int | None = None
        self._took = self._got = 0.0
        self._busy = 0.0
        self.records: list[dict[str, float]] = []
        self.trained: list[int] = []
        """Numbers of the prompts, in the order in which they were trained on."""

    def run(self) -> list[dict[str, float]]:
        """Simulates all steps."""
        self._take()
        while self._step < self._s.steps:
            self._now, _, what, server, stamp = heapq.heappop(self._events)
            if server is None or server.stamp == stamp:
                what()
        return self.records

    # ------------------------------------------------------------------------------- trainer

    def _take(self) -> None:
        """The trainer wants the completions of its step."""
        self._took = self._now
        if self._next == self._step:
            self._begin()
        self._wanted = self._step
        self._ready()

    def _ready(self) -> None:
        """Goes on if the completions that the trainer waits for are judged."""
        if self._wanted is None or not self._batches[self._wanted].judged <= self._now:
            return
        self._wanted, self._got = None, self._now
        while self._next <= min(self._step + self._s.ahead, self._s.steps - 1):
            self._begin()
        self._at(self._now + self._s.speeds.update + self._s.speeds.publish, self._published)

    def _published(self) -> None:
        """Every server reads the weights."""
        until = self._now + self._s.speeds.load
        for server in self._servers:
            server.advance(self._now)
            server.update(self._step + 1, until, self._s.prompt_tokens)
            self._foresee(server)
        self._at(until, self._finish)

    def _finish(self) -> None:
        """The step is over."""
        batch = self._batches.pop(self._step)
        self.trained += [prompt.number for prompt in batch.chosen]
        self.records.append(self._record(batch))
        self._step += 1
        if self._step < self._s.steps:
            self._take()

    def _record(self, batch: Batch) -> dict[str, float]:
        speeds, seconds = self._s.speeds, self._now - self._took
        sequences = [each for prompt in batch.chosen for each in prompt.sequences]
        ends = sorted(each.finished for each in sequences)
        tail = batch.rollout - ends[math.ceil(TAIL * len(ends)) - 1]
        ages = [
            (self._step - version, tokens)
            for each in sequences
            for version, tokens in each.spans.items()
            if tokens > 0
        ]
        tokens = sum(each.length for each in sequences)
        for server in self._servers:
            server.advance(self._now)
        busy = sum(server.busy for server in self._servers)
        idle = 1 - (busy - self._busy) / (len(self._servers) * seconds) if seconds else 0.0
        self._busy = busy
        return {
            "time/step": seconds,
            "time/rollout": batch.rollout - batch.begun,
            "time/verify": batch.judged - batch.rollout,
            "time/wait": self._got - self._took,
            "time/update": speeds.update,
            "time/sync": speeds.publish + speeds.load,
            "time/tail": tail,
            "idle/trainer": (self._got - self._took) / seconds if seconds else 0.0,
            "idle/fleet": idle,
            "staleness/mean": sum(age * n for age, n in ages) / max(sum(n for _, n in ages), 1e-9),
            "staleness/max": float(max((age for age, _ in ages), default=0)),
            "tokens": float(tokens),
            "interrupted_prompts": float(batch.interrupted),
        }

    # --------------------------------------------------------------------------------- fleet

    def _begin(self) -> None:
        """Sends the prompts of the next step to the fleet."""
        batch = self._batches[self._next] = Batch(self._now)
        extra = math.ceil(self._s.over_sampling * self._s.prompts)
        for _ in range(self._s.prompts + extra):
            prompt = self._returned.popleft() if self._returned else self._draw()
            prompt.batch = batch
            self._open[prompt.number] = prompt
            self._waiting.append(prompt)
        self._next += 1
        self._assign(self._servers)

    def _draw(self) -> Prompt:
        number, lengths = next(self._fresh), self._s.lengths(self._rng, self._s.samples)
        return Prompt(number, [Sequence(number, int(length)) for length in lengths])

    def _assign(self, servers: list[Server]) -> None:
        """Gives waiting prompts to those of the servers that have room, the emptiest first."""
        if not self._waiting:
            return
        rooms = [(server.in_flight, i) for i, server in enumerate(servers)]
        heapq.heapify(rooms)
        while self._waiting and rooms:
            in_flight, i = rooms[0]
            prompt, server = self._waiting[0], servers[i]
            todo = [each for each in prompt.sequences if math.isnan(each.finished)]
            if in_flight and in_flight + len(todo) > self._s.speeds.capacity:
                return  # the emptiest has no room: none has
            self._waiting.popleft()
            prompt.server = server
            server.advance(self._now)
            server.begin(todo, self._s.prompt_tokens)
            heapq.heapreplace(rooms, (server.in_flight, i))
            self._foresee(server)

    def _foresee(self, server: Server) -> None:
        """Puts the server's next event in the queue, in place of an earlier one."""
        server.stamp += 1
        when = server.next_event()
        if when < math.inf:
            self._at(when, lambda: self._progress(server), server, server.stamp)

    def _progress(self, server: Server) -> None:
        """Something ended at a server."""
        server.advance(self._now)
        for sequence in server.collect():
            self._complete(sequence)
        self._assign([server])
        self._foresee(server)

    def _complete(self, sequence: Sequence) -> None:
        """A completion has ended; in the same moment its prompt may have been taken back."""
        prompt = self._open.get(sequence.prompt)
        if prompt is None or prompt.batch is None:
            return
        sequence.finished = self._now
        if any(math.isnan(each.finished) for each in prompt.sequences):
            return
        del self._open[prompt.number]
        prompt.batch.chosen.append(prompt)
        if len(prompt.batch.chosen) == self._s.prompts:
            self._close(prompt.batch)

    def _close(self, batch: Batch) -> None:
        """Enough of a batch is complete: the rest is taken back, and the verdicts are awaited."""
        batch.rollout = self._now
        for prompt in [each for each in self._open.values() if each.batch is batch]:
            self._take_back(prompt)
            batch.interrupted += 1
        if batch.interrupted:
            self._assign(self._servers)
        for _ in range(self._s.prompts * self._s.samples if self._s.speeds.verify else 0):
            verdict = max(self._workers[0], self._now) + self._s.speeds.verify
            heapq.heapreplace(self._workers, verdict)
        batch.judged = max(max(self._workers), self._now)
        self._at(batch.judged, self._ready)

    def _take_back(self, prompt: Prompt) -> None:
        del self._open[prompt.number]
        prompt.batch = None
        if prompt.server is None:
            self._waiting.remove(prompt)
        else:
            prompt.server.advance(self._now)
            for sequence in prompt.sequences:
                if math.isnan(sequence.finished):
                    prompt.server.abort(sequence)
            self._foresee(prompt.server)
            prompt.server = None
        oldest = min((v for each in prompt.sequences for v in each.spans), default=0)
        if not self._s.carry or self._servers[0].version - oldest > self._s.carry:
            for sequence in prompt.sequences:
                sequence.done, sequence.finished = 0.0, math.nan
                sequence.spans.clear()
        self._returned.append(prompt)

    def _at(
        self, when: float, what: Callable[[], None], server: Server | None = None, stamp: int = 0
    ) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, server, stamp))


def simulate(scenario: Scenario) -> list[dict[str, float]]:
    """A record per step, by the names of the metrics of a run."""
    return Run(scenario).run()


def steady(records: list[dict[str, float]], ahead: int) -> dict[str, float]:
    """The mean step without the first ones and the last ones, in which fewer are on their way;
    of staleness/max the largest."""
    first = min(ahead + 1, len(records) - 1) if ahead else 0
    middle = records[first : max(len(records) - ahead, first + 1)]
    found = {name: sum(r[name] for r in middle) / len(middle) for name in middle[0]}
    most = [record["staleness/max"] for record in middle if "staleness/max" in record]
    return found | ({"staleness/max": max(most)} if most else {})
