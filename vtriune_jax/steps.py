"""What one step of a stage does, each line of the loop as a function.

A supervised stage goes the same way as one that samples: its completions are the demonstrations,
nobody judges them, and each has advantage 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from vtriune_jax import hosts, sharding
from vtriune_jax.assemble import Parts
from vtriune_jax.data.packing import minibatch, pack, padding
from vtriune_jax.data.rows import KINDS, Needs, choose, needs
from vtriune_jax.evaluate import items
from vtriune_jax.optim import make_optimizer, partition
from vtriune_jax.rewards.shaping import soft_overlong
from vtriune_jax.rl.advantages import group_advantages
from vtriune_jax.rl.normalise import Sums, add_sums
from vtriune_jax.rl.policy import make_logps
from vtriune_jax.rl.update import init_state, make_update
from vtriune_jax.stages import Stage
from vtriune_jax.types import Batch, Completion, Group, Prompt, TrainState, Verdict

Features = Float[Array, "groups units embed"] | None
Encode = Callable[[Any, Sequence[Prompt]], Float[Array, "groups units embed"]]
Update = Callable[[TrainState, Batch, int], tuple[TrainState, Sums]]
KnownLogps = Callable[[Any, Batch, bool], dict[str, Any]]
"""(parameters, batch, only_first) → `old_logps` and `reference_logps`, as far as needed."""
Told = dict[str, tuple[float, float]]
"""Metrics as (sum, count)."""


@dataclass(frozen=True)
class Compiled:
    """The jitted functions of a stage's loop."""

    encode: Encode
    """Images → features, for the in-process sampler and the update of a frozen tower."""
    update: Update
    """All minibatches of the batch of a step, one after the other, and the sums over them."""
    vision_frozen: bool
    """Whether the update takes the features, or trains the tower on the images."""


def begin(stage: Stage, params: Any, parts: Parts) -> tuple[TrainState, Compiled]:
    """The state of a stage at its start, and what its loop calls: the reference too, if needed.

    The state takes the memory of `params`, which must not be used any more.
    """
    tx = make_optimizer(stage.optim)
    known_logps = logps_of(stage, params, parts)
    state = init_state(params, tx, parts.mesh, stage.freeze, donate=True)
    vision_frozen = "visual" not in partition(state.params, stage.freeze)[0]
    update_once = make_update(
        parts.graphdef,
        tx,
        stage.loss,
        parts.mesh,
        state,
        num_sources=len(parts.sources),
        freeze=stage.freeze,
        micro_batches=parts.config.batch.micro_batches,
    )

    def encode(params: Any, prompts: Sequence[Prompt]) -> Float[Array, "groups units embed"]:
        return jax.block_until_ready(parts.encode(params, prompts))

    def update(state: TrainState, batch: Batch, step: int) -> tuple[TrainState, Sums]:
        def part(k: int) -> Batch:
            return sharding.shard_rows(minibatch(batch, stage.minibatches, k), parts.mesh)

        order = stage.order(parts.config.seed, step)
        known = {}
        if known_logps:
            for k in range(stage.minibatches):
                only_first = k == order[0] and stage.epochs == 1
                known[k] = known_logps(state.params, part(k), only_first)
        total: Sums = {}
        for k in order:
            state, sums = update_once(state, replace(part(k), **known.get(k, {})))
            total = add_sums(total, sums) if total else sums
        return state, jax.device_get(total)

    return state, Compiled(encode, update, vision_frozen)


def logps_of(stage: Stage, start: Any, parts: Parts) -> KnownLogps | None:
    """What makes the log-probs that the stage's loss compares with; None if it needs none.

    A minibatch that is trained on `only_first`, before all others, needs no old ones: it finds them
    itself. The reference model is the one the stage starts from, or, with adapters, the model
    without them.
    """
    loss, adapted = stage.loss, parts.config.model.lora.rank > 0
    if loss.old != "recomputed" and not loss.kl_weight:
        return None
    pieces = {"micro_batches": parts.config.batch.micro_batches}
    logps = make_logps(parts.graphdef, loss, parts.mesh, **pieces)
    base_logps = make_logps(parts.graphdef, loss, parts.mesh, adapters=False, **pieces)
    reference = None
    if loss.kl_weight and not adapted:
        reference = jax.tree.map(jnp.copy, parts.place(start))

    def known(params: Any, batch: Batch, only_first: bool) -> dict[str, Any]:
        found = {}
        if loss.old == "recomputed":
            found["old_logps"] = batch.mask * np.nan if only_first else logps(params, batch)
        if loss.kl_weight:
            found["reference_logps"] = (
                base_logps(params, batch) if adapted else logps(reference, batch)
            )
        return found

    return known


def respond(
    stage: Stage,
    step: int,
    parts: Parts,
    params: Any,
    prompts: Sequence[Prompt],
    features: Features,
    drawn: int = 0,
) -> list[Group]:
    """n completions of every prompt, or its demonstration.

    What is random follows from the seed, the step of the run and the prompt's place in it, which is
    `drawn` for the first one; of several processes each has every n-th place.
    """
    if not stage.sampling:
        return [Group(prompt, (demonstration(prompt, parts),)) for prompt in prompts]
    key = jax.random.fold_in(jax.random.key(parts.config.seed), stage.start + step)
    places = drawn + hosts.share().count * jnp.arange(len(prompts))
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(places)
    slot = parts.slots.prompt_tokens
    return parts.engine.generate(params, prompts, features, stage.sampling, keys, slot)


def demonstration(prompt: Prompt, parts: Parts) -> Completion:
    """The text to imitate; its log-probs are not known, and not needed."""
    text = prompt.sample.demonstration
    ids = parts.prompter.encode_completion(text)
    return Completion(ids=ids, logps=np.zeros(len(ids), np.float32), text=text, finish="stop")


def verify(stage: Stage, step: int, groups: Sequence[Group], parts: Parts) -> list[list[Verdict]]:
    """A verdict for every completion, none for demonstrations.

    The progress that thresholds follow counts from 1.
    """
    if not stage.sampling:
        return []
    progress = (step + 1) / stage.steps
    verdicts = iter(parts.verifiers.score(items(groups, parts, progress=progress)))
    return [[next(verdicts) for _ in group.completions] for group in groups]


def shaped(
    stage: Stage, groups: Sequence[Group], verdicts: Sequence[Sequence[Verdict]]
) -> list[list[Verdict]]:
    """The verdicts with the soft penalty of long completions in score and parts, if it is on."""
    cushion, sampling = stage.overlong_cushion, stage.sampling
    if not cushion or not sampling:
        return [list(judged) for judged in verdicts]

    def shape(verdict: Verdict, completion: Completion) -> Verdict:
        if verdict.status != "ok":
            return verdict
        length = np.asarray(len(completion.ids))
        penalty = float(soft_overlong(length, sampling.max_tokens, cushion))
        parts = {**verdict.parts, "overlong": penalty}
        return replace(verdict, score=verdict.score + penalty, parts=parts)

    return [
        [shape(*pair) for pair in zip(judged, group.completions, strict=True)]
        for judged, group in zip(verdicts, groups, strict=True)
    ]


def advantages(
    stage: Stage,
    groups: Sequence[Group],
    verdicts: Sequence[Sequence[Verdict]],
    used: Bool[np.ndarray, " groups"],
) -> tuple[Float[np.ndarray, "groups n"], Float[np.ndarray, "groups n"]]:
    """Advantages and weights [groups, n]: a failed verification is masked, never a reward of 0.

    So is a group that is not `used`. What is compared over the batch is so over all processes.
    """
    if not verdicts:
        ones = np.ones((len(groups), len(groups[0].completions)), np.float32)
        return ones, ones
    scores = np.array([[verdict.score for verdict in judged] for judged in verdicts])
    valid = np.array([[verdict.status == "ok" for verdict in judged] for judged in verdicts])
    valid &= used[:, None]
    both = hosts.gather([scores.tolist(), valid.tolist()])
    before = sum(len(theirs) for theirs, _ in both[: hosts.share().index])
    scores, valid = (np.concatenate(each) for each in zip(*both, strict=True))
    values, weights, _ = group_advantages(scores, valid, stage.advantage)
    own = slice(before, before + len(verdicts))
    return values[own].astype(np.float32), weights[own].astype(np.float32)


def lay_out(
    stage: Stage,
    groups: Sequence[Group],
    values: Float[np.ndarray, "groups n"],
    weights: Float[np.ndarray, "groups n"],
    features: Features,
    parts: Parts,
) -> tuple[Batch, Told]:
    """The batch of a step in the rows that `batch.layout` asks for, and what metrics tell of it.

    `pad/tokens` and `pad/vision` are the padded fractions, `layout/…` is 1 for the kind of rows and
    0 for the others; a row has `layout/completions` of up to `layout/slot_tokens`.
    """
    keys, slots = parts.config.batch, parts.slots
    unit = keys.micro_batches * sharding.row_shards(parts.mesh) // jax.process_count()
    rows = choose(
        keys.layout,
        _agreed(needs(groups, slots, stage.minibatches, unit)),
        slots,
        groups=len(groups) // stage.minibatches,
        samples=len(groups[0].completions),
        unit=unit,
        model=parts.model_config,
        vision_trained=features is None,
    )
    sources = parts.source_index
    batch = pack(groups, values, weights, sources, slots, features, rows, stage.minibatches, unit)
    told = padding(batch, [group.prompt for group in groups], slots)
    layout = {kind: kind == rows.kind for kind in KINDS}
    layout |= {"completions": rows.n, "slot_tokens": rows.completion_tokens}
    return batch, told | {f"layout/{name}": (float(x), 1.0) for name, x in layout.items()}


def _agreed(needs: Needs) -> Needs:
    """What the rows of all processes must satisfy: they are of one shape."""
    longest, together = zip(*hosts.gather([needs.longest, needs.together]), strict=True)
    return Needs(max(longest), min(together))
