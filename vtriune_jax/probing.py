"""What the probe of the rollout servers compares: a run's own rows, by its own model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from vtriune_jax import sharding
from vtriune_jax.data.packing import pack
from vtriune_jax.data.prompts import Prompter
from vtriune_jax.data.rows import Slots
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.policy import make_logps
from vtriune_jax.types import Completion, Group, Sample

TOKENS = 32
"""Of a completion, at most."""


def choose(samples: Sequence[Sample], prompter: Prompter, count: int) -> list[Group]:
    """The first `count` samples, as many with images as without where there are such, with the
    beginning of their demonstrations (or of their ground truths)."""
    kinds = [[s for s in samples if s.images], [s for s in samples if not s.images]]
    half = max(count // 2, count - len(kinds[0]))
    few = kinds[1][:half]
    chosen = [*kinds[0][: count - len(few)], *few]
    ids = [
        prompter.encode_completion(sample.demonstration or sample.reward.ground_truth)
        for sample in chosen
    ]
    return [
        Group(prompter(sample), (Completion(own, np.zeros(len(own), np.float32), "", "stop"),))
        for sample, own in zip(chosen, (each[:TOKENS] for each in ids), strict=True)
    ]


def completion_logps(
    graphdef: nnx.GraphDef, groups: Sequence[Group], pad_id: int, mesh: Mesh
) -> Callable[[Any], list[np.ndarray]]:
    """What gives, of parameters, the log-probs of each group's first completion, at temperature 1.

    All processes call it together, with the same groups.
    """
    rows = -(-len(groups) // sharding.row_shards(mesh)) * sharding.row_shards(mesh)
    filled = [groups[i % len(groups)] for i in range(rows)]
    slots = Slots(
        prompt_tokens=max(len(group.prompt.ids) for group in groups),
        completion_tokens=max(len(group.completions[0].ids) for group in groups),
        windows=max(1, *(len(group.prompt.vision.segments) for group in groups)),
        pad_id=pad_id,
    )
    ones = np.ones((rows, 1), np.float32)
    sources = dict.fromkeys((group.prompt.sample.data_source for group in groups), 0)
    batch = pack(filled, ones, ones, sources, slots)
    logps = make_logps(graphdef, LossConfig(kind="sft"), mesh)

    def of(params: Any) -> list[np.ndarray]:
        found = logps(params, batch)
        if jax.process_count() > 1:
            found = multihost_utils.process_allgather(found, tiled=True)
        table = np.asarray(found)[:, 0]
        return [table[i, : len(group.completions[0].ids)] for i, group in enumerate(groups)]

    return of
