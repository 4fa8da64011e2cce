"""Groups that were drawn on one host and are trained on by another.

Dynamic sampling keeps some of the groups of each host, here more and there fewer, while each host
trains on equally many. What one has too many of goes to those that have too few: the completions
and verdicts as they are; the prompts, which are large, are made again there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vtriune_jax import hosts
from vtriune_jax.types import Completion, Group, Prompt, Verdict

Held = Mapping[int, tuple[Group, Sequence[Verdict]]]
"""Number of a group, counted over all hosts → the group and its verdicts."""


def shares(
    order: Sequence[int], minibatches: int, owned: Sequence[Sequence[int]]
) -> list[list[int]]:
    """The groups that each host trains on, of those that it has `owned` as many as may be.

    `order` has the groups of one minibatch behind those of the other. Each host gets equally many
    of every minibatch, so that they are the same as if there were one host.
    """
    size, quota = len(order) // minibatches, len(order) // minibatches // len(owned)
    found: list[list[int]] = [[] for _ in owned]
    for k in range(minibatches):
        part = order[k * size : (k + 1) * size]
        own = [[number for number in part if number in set(theirs)] for theirs in owned]
        spare = [number for theirs in own for number in theirs[quota:]]
        for mine, theirs in zip(found, own, strict=True):
            missing = max(0, quota - len(theirs))
            mine += [*theirs[:quota], *spare[:missing]]
            spare = spare[missing:]
    return found


def exchanged(
    given: Sequence[Sequence[int]], held: Held, again: Callable[[int], Prompt]
) -> list[tuple[Group, Sequence[Verdict]]]:
    """This host's groups of those `given` to each, out of what every host has `held`.

    `again` makes the prompt of a group by its number. All hosts call it together.
    """
    mine = given[hosts.share().index]
    elsewhere = {number for theirs in given for number in theirs}.difference(mine)
    sent = [[n, _plain(*held[n])] for n in sorted(elsewhere.intersection(held))]
    received = {n: row for theirs in hosts.gather(sent) for n, row in theirs}

    def rebuilt(number: int) -> tuple[Group, Sequence[Verdict]]:
        completions, verdicts = received[number]
        group = Group(again(number), tuple(map(_completion, completions)))
        return group, [Verdict(**verdict) for verdict in verdicts]

    with hosts.together():
        return [held[n] if n in held else rebuilt(n) for n in mine]


def _plain(group: Group, verdicts: Sequence[Verdict]) -> list[Any]:
    completions = [
        {"ids": c.ids.tolist(), "logps": c.logps.tolist(), "text": c.text, "finish": c.finish}
        for c in group.completions
    ]
    return [completions, [asdict(verdict) for verdict in verdicts]]


def _completion(row: Mapping[str, Any]) -> Completion:
    ids, logps = np.array(row["ids"], np.int32), np.array(row["logps"], np.float32)
    return Completion(ids=ids, logps=logps, text=row["text"], finish=row["finish"])
