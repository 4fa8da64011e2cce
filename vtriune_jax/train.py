"""The training run, top to bottom:

data → prompts → rollout → verifiers → advantages → update → metrics → checkpoint
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vtriune_jax import hosts, metrics, sharding
from vtriune_jax.ahead import Ahead, Drawn
from vtriune_jax.assemble import Parts, assemble
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.collect import Collected, collect
from vtriune_jax.data.feed import feed, tell_once
from vtriune_jax.draw import START, prompts_ahead, responder
from vtriune_jax.evaluate import evaluate, read_means, save_means
from vtriune_jax.finish import finish
from vtriune_jax.metrics import SourceMean
from vtriune_jax.models import lora
from vtriune_jax.stages import Stage, plan
from vtriune_jax.steps import Compiled, Told, advantages, begin, lay_out
from vtriune_jax.timeline import Clock, Timeline
from vtriune_jax.types import Batch, TrainState
from vtriune_jax.waiting import first_from, from_arrays, to_arrays
from vtriune_jax.workdir import record
from vtriune_jax.writers import MetricsWriter, Progress


def run(config: Any, workdir: Path) -> None:
    """Runs the stages of the config in `workdir`, going on where an earlier run was ended.

    Held-out rewards are taken before and after the last stage. At the end `workdir` holds, beside
    checkpoints and metrics, `summary.json`, `report.html` and the trained model in the Hugging Face
    layout (`final/`).

    Raises:
      UserError: a mistake in config, checkpoint or data, in one line.
    """
    with assemble(config, workdir) as parts, contextlib.ExitStack() as stack:
        writer = stack.enter_context(MetricsWriter(workdir)) if hosts.is_first() else None
        stages = plan(config, parts.prompter.banned_ids)
        params, before, seconds = parts.params, {}, 0.0
        for stage in stages:
            if stage is stages[-1]:
                before = heldout_before(parts, params, stage.start, workdir)
            params, spent = train(stage, params, parts, writer, workdir)
            seconds += spent
        steps = sum(stage.steps for stage in stages)
        heldout = evaluate(parts, params, version=steps)
        finish(parts, workdir, params, before, heldout, steps, seconds)


def train(
    stage: Stage, params: Any, parts: Parts, writer: MetricsWriter | None, workdir: Path
) -> tuple[Any, float]:
    """Trains one stage to its end; returns the parameters and the seconds that it took in all.

    `params` are used up. Only the first process has a `writer`, and tells of progress.
    """
    config = parts.config
    state, do = begin(stage, params, parts)
    position, ready = START, []
    progress = Progress(workdir, every=config.log.seconds)
    folder, index = workdir / "checkpoints" / stage.name, hosts.share().index
    with (
        Checkpointer(folder, config.checkpoint.every, config.checkpoint.keep) as checkpoints,
        feed(config.data.threads, config.data.on_bad_row) as source,
        Timeline(workdir / ("timeline.json" if writer else f"timeline{index}.json")) as timeline,
    ):
        if restored := checkpoints.restore(kept(state), donate=True):
            state = replace(
                restored.state, params=lora.put_back(state.params, restored.state.params)
            )
            position = restored.extra
            ready = from_arrays(restored.waiting, parts.prompter.decode)
        done, seconds = position["done"], position["seconds"]
        began = time.monotonic() - seconds
        prompts = prompts_ahead(stage, position, parts, source)
        if done < stage.steps:
            hosts.from_first(partial(record, config, workdir))
            if writer:
                writer.resume(stage.start + done)

        def sample(step: int, params: Any, first: Drawn, clock: Clock) -> Collected:
            answer = responder(stage, step, prompts, parts)
            answer = first_from(ready, answer) if step == done else answer
            encode = do.encode if stage.sampling and not parts.served else None
            return collect(stage, step, params, first, prompts, answer, encode, parts, clock)

        def save(step: int) -> None:
            where, waiting = rollouts.position()
            extra = where | {"done": step, "seconds": time.monotonic() - began}
            checkpoints.save(step, kept(state), extra, to_arrays(waiting, where["taken"]))

        with Ahead(
            sample,
            prompts,
            partial(timeline.clock, stage.name),
            ahead=config.rollout.ahead if stage.sampling else 0,
            last=stage.steps,
            threads=parts.served is not None,
        ) as rollouts:
            if parts.served and stage.sampling and done < stage.steps:
                parts.served.push(state.params, stage.start + done)
            for step in range(done, stage.steps):
                if step > done and checkpoints.due(step):
                    save(step)
                got, clock = rollouts.take(step, state.params)
                tell_once(got.skipped, f"{stage.name} step {step + 1}", parts.told_of)
                if stage.sampling:
                    judged = got.all_groups, got.all_verdicts
                    parts.failures.tell(*judged, stage.name, first=step == done)
                with clock("update"):
                    batch, told = packed(stage, got, do, state.params, parts)
                    state, sums = do.update(state, batch, step)
                pushed = {}
                if parts.served and stage.sampling:
                    with clock("sync"):
                        pushed = parts.served.push(state.params, stage.start + step + 1)
                found = metrics.finish(
                    sums,
                    got.all_groups if got.all_verdicts else [],
                    got.all_verdicts,
                    parts.sources,
                    clock.seconds,
                    [row.data_source for row in got.skipped],
                    got.refill,
                    told,
                )
                if writer:
                    writer.write(stage.start + step, found | pushed, stage.name)
                    progress(stage.name, step + 1, stage.steps, found)
                del got, batch  # image features, which would lie beside those of the next step
            if done < stage.steps:
                save(stage.steps)
                seconds = time.monotonic() - began
    return state.params, seconds


def packed(
    stage: Stage, got: Collected, do: Compiled, params: Any, parts: Parts
) -> tuple[Batch, Told]:
    """The rows of a step, and what to tell of them.

    A frozen vision tower encodes the images of each group here, if sampling has not done so.
    """
    features = None
    if do.vision_frozen:
        features = got.features
        if features is None:
            features = do.encode(params, [group.prompt for group in got.groups])
        if hosts.share().count > 1:  # rows of this process are made of its own groups
            features = sharding.local_rows(features, parts.mesh)
    values, weights = advantages(stage, got.groups, got.verdicts, got.used)
    return lay_out(stage, got.groups, values, weights, features, parts)


def kept(state: TrainState) -> TrainState:
    """The state as a checkpoint holds it: without the base of adapters, which never changes."""
    return replace(state, params=lora.kept(state.params))


def heldout_before(parts: Parts, params: Any, version: int, workdir: Path) -> dict[str, SourceMean]:
    """Held-out rewards before the last stage; a resumed run takes those of its first start."""
    path = workdir / "heldout_before.json"
    means = read_means(path)
    if means is None:
        means = evaluate(parts, params, version, first=True).means()
        if hosts.is_first():
            save_means(path, means)
    return means
