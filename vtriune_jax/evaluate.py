"""Held-out rewards: the same rollouts and verifiers as in training, with sampling of its own."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vtriune_jax import hosts, sharding
from vtriune_jax.assemble import Parts
from vtriune_jax.data.feed import Skipped, feed, tell
from vtriune_jax.data.packing import check_fits
from vtriune_jax.errors import UserError
from vtriune_jax.metrics import SourceMean, per_source_means
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.types import Group, Prompt, Sample, Verdict
from vtriune_jax.verifiers.item import Item
from vtriune_jax.writers import write_atomic


@dataclass(frozen=True)
class HeldOut:
    """Completions of the held-out samples, one each, and what the verifiers say of them."""

    groups: Sequence[Group]
    """Of several processes each has those of its own samples."""
    verdicts: Sequence[Sequence[Verdict]]
    numbers: Sequence[int]
    """Of these samples among `parts.heldout`."""

    def means(self) -> dict[str, SourceMean]:
        """The mean reward per data source, over all processes."""
        return per_source_means(self.groups, self.verdicts)


def evaluate(parts: Parts, params: Any, version: int, *, first: bool = False) -> HeldOut:
    """Completes and judges every held-out sample once, `config.eval.batch` at a time.

    `version`, the updates behind `params`, is their name on the servers of a fleet.

    Boxes are judged at the fixed threshold `config.eval.iou_threshold`, not at the dynamic one of
    training, so that numbers before and after are of the same thing. Rows that are broken or do
    not fit are left out, and told of, if `config.data.on_bad_row` is "skip". Of several processes
    each has its share of every batch. Why some could not be judged is told; `first`: before there
    was any training.

    Raises:
      UserError: a row cannot be used, or none of them, or none can be judged in the first one.
    """
    keys = parts.config.eval
    sampling = Sampling(n=1, temperature=keys.temperature, max_tokens=parts.slots.completion_tokens)
    params = parts.place(params)
    if parts.served:
        parts.served.push(params, version)
    key = jax.random.key(parts.config.seed)
    shards = sharding.row_shards(parts.mesh)
    size = -(-keys.batch // shards) * shards
    share, starts = hosts.share(), range(0, len(parts.heldout), size)
    slots = range(size)[share.slice]
    groups: list[Group] = []
    numbers: list[int] = []
    pending, skipped = [], []

    def make(sample: Sample) -> Prompt:
        prompt = parts.prompter(sample)
        check_fits(prompt, 0, parts.slots)
        return prompt

    with feed(parts.config.data.threads, parts.config.data.on_bad_row) as source:

        def prepare(start: int) -> list[Prompt | Skipped]:
            return source.prompts(parts.heldout[start : start + size][share.slice], make)

        def any_prompt() -> Prompt:
            """For a process all of whose rows are bad, while others have good ones."""
            rows = (source.prompts([sample], make)[0] for sample in parts.heldout)
            return next(row for row in rows if not isinstance(row, Skipped))

        ahead = source.ahead(prepare, starts)
        for start in starts:
            with hosts.together():
                rows = next(ahead)
            good = {i: row for i, row in enumerate(rows) if not isinstance(row, Skipped)}
            skipped += [row for row in rows if isinstance(row, Skipped)]
            if not any(hosts.gather(len(good))):
                continue
            # Every slot gets a prompt, whether or not there is a row: one shape, one compilation.
            spare = next(iter(good.values()), None) or any_prompt()
            full = [good.get(i, spare) for i in range(len(slots))]
            places = start + jnp.asarray(slots)
            each = jax.vmap(lambda i: jax.random.fold_in(key, i))(places)
            features = None if parts.served else parts.encode(params, full)
            with hosts.together() if parts.served else contextlib.nullcontext():
                drawn = parts.engine.generate(
                    params, full, features, sampling, each, parts.slots.prompt_tokens
                )
            answered = [drawn[i] for i in good]
            groups += answered
            numbers += [start + slots[i] for i in good]
            asked = items(answered, parts, threshold=keys.iou_threshold)
            pending.append(parts.verifiers.submit(asked))
    tell(skipped, "held-out")
    first_faults = hosts.gather([row.fault for row in skipped[:1]])
    faults = [fault for theirs in first_faults for fault in theirs]
    if faults and not any(hosts.gather(len(groups))):
        raise UserError(f"no held-out row can be used, the first because: {faults[0]}")
    verdicts = [[verdict] for future in pending for verdict in future.result()]
    parts.failures.tell(groups, verdicts, "held-out", first=first)
    return HeldOut(groups, verdicts, numbers)


def items(
    groups: Sequence[Group],
    parts: Parts,
    *,
    progress: float = 1.0,
    threshold: float | None = None,
) -> list[Item]:
    """What the verifiers are asked: one item per completion, group by group."""
    patch = parts.model_config.vision.patch_size
    return [
        Item(
            completion=completion.text,
            reward=group.prompt.sample.reward,
            progress=progress,
            grid=tuple((int(h) * patch, int(w) * patch) for _, h, w in group.prompt.grid_thw),
            threshold=threshold,
        )
        for group in groups
        for completion in group.completions
    ]


def save_means(path: Path, means: Mapping[str, SourceMean]) -> None:
    """Writes the means of an evaluation as JSON, atomically."""
    write_atomic(path, json.dumps({s: asdict(mean) for s, mean in means.items()}, indent=2) + "\n")


def read_means(path: Path) -> dict[str, SourceMean] | None:
    """The means that `save_means` wrote, as the first process finds them, or None."""
    saved = hosts.from_first(lambda: json.loads(path.read_text()) if path.exists() else None)
    return saved and {source: SourceMean(**mean) for source, mean in saved.items()}
