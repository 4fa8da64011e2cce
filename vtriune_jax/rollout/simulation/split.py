"""The best split of a number of chips between the trainer and the fleet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from vtriune_jax.rollout.simulation.run import Scenario, simulate, steady

GRID = 16
"""At most so many splits come into question, evenly spread."""


def best_split(
    make: Callable[[int, int], Scenario], chips: int, gpus_per_server: int
) -> tuple[int, int]:
    """(trainer's chips, servers) with the shortest step.

    `make` gives the scenario of such a pair. More servers make the rollout shorter and the update
    longer, so that step times fall and then rise; a search by thirds finds the valley, from runs of
    few steps.
    """
    most = (chips - 1) // gpus_per_server
    choices = sorted({max(1, round(most * k / GRID)) for k in range(1, GRID + 1)})

    @cache
    def seconds(i: int) -> float:
        scenario = make(chips - choices[i] * gpus_per_server, choices[i])
        few = replace(scenario, steps=2 + 2 * scenario.ahead)
        return steady(simulate(few), scenario.ahead)["time/step"]

    low, high = 0, len(choices) - 1
    while high - low > 2:
        first, second = low + (high - low) // 3, high - (high - low) // 3
        if seconds(first) <= seconds(second):
            high = second
        else:
            low = first
    best = min(range(low, high + 1), key=seconds)
    return chips - choices[best] * gpus_per_server, choices[best]
