"""The training run, top to bottom:

data → prompts → rollout → verifiers → advantages → update → metrics → checkpoint
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vtriune_jax import metrics
from vtriune_jax.ahead import Ahead, Drawn, Prompts
from vtriune_jax.assemble import Parts, assemble
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.collect import Collected, Respond, collect
from vtriune_jax.data.feed import Feed, feed, tell
from vtriune_jax.data.mixture import Mixture
from vtriune_jax.data.packing import check_fits, pack
from vtriune_jax.data.stream import Chunk, PromptStream, Ticket
from vtriune_jax.evaluate import evaluate, read_means, save_means
from vtriune_jax.finish import finish
from vtriune_jax.metrics import SourceMean
from vtriune_jax.models import lora
from vtriune_jax.stages import Stage, plan
from vtriune_jax.steps import Compiled, advantages, compiled, demonstration, respond
from vtriune_jax.tail import TailStream
from vtriune_jax.timeline import Clock, Timeline
from vtriune_jax.types import Batch, Prompt, Sample, TrainState
from vtriune_jax.waiting import first_from, from_arrays, to_arrays
from vtriune_jax.writers import MetricsWriter, Progress

START: Mapping[str, Any] = {"done": 0, "taken": 0, "data": {}, "seconds": 0.0}
"""Where a stage begins, as a checkpoint says it."""


def run(config: Any, workdir: Path) -> None:
    """Runs the stages of the config in `workdir`, going on where an earlier run was ended.

    Held-out rewards are taken before and after the last stage. At the end `workdir` holds, beside
    checkpoints and metrics, `summary.json`, `report.html` and the trained model in the Hugging Face
    layout (`final/`).

    Raises:
      UserError: a mistake in config, checkpoint or data, in one line.
    """
    with assemble(config, workdir) as parts, MetricsWriter(workdir) as writer:
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
    stage: Stage, params: Any, parts: Parts, writer: MetricsWriter, workdir: Path
) -> tuple[Any, float]:
    """Trains one stage to its end; returns the parameters and the seconds that it took in all."""
    config = parts.config
    do = compiled(stage, params, parts)
    state, position, ready = do.state, START, []
    progress = Progress(workdir, every=config.log.seconds)
    folder = workdir / "checkpoints" / stage.name
    with (
        Checkpointer(folder, config.checkpoint.every, config.checkpoint.keep) as checkpoints,
        feed(config.data.threads, config.data.on_bad_row) as source,
        Timeline(workdir / "timeline.json") as timeline,
    ):
        if restored := checkpoints.restore(kept(state)):
            state = replace(
                restored.state, params=lora.put_back(state.params, restored.state.params)
            )
            position = restored.extra
            ready = from_arrays(restored.waiting, parts.prompter.decode)
        done, seconds = position["done"], position["seconds"]
        if done < stage.steps:
            writer.resume(stage.start + done)
        began = time.monotonic() - seconds
        prompts = prompts_ahead(stage, position, parts, source)

        def sample(step: int, params: Any, first: Drawn, clock: Clock) -> Collected:
            answer = responder(stage, step, prompts, parts)
            answer = first_from(ready, answer) if step == done else answer
            encode = do.encode if stage.sampling and not parts.remote else None
            return collect(stage, step, params, first, prompts, answer, encode, parts, clock)

        def save(step: int) -> None:
            where, waiting = rollouts.position()
            extra = where | {"done": step, "seconds": time.monotonic() - began}
            checkpoints.save(step, kept(state), extra, to_arrays(waiting))

        with Ahead(
            sample,
            prompts,
            partial(timeline.clock, stage.name),
            ahead=config.rollout.ahead if stage.sampling else 0,
            last=stage.steps,
            threads=parts.remote,
        ) as rollouts:
            if stage.sampling and done < stage.steps:
                parts.engine.push(state.params, stage.start + done)
            for step in range(done, stage.steps):
                if step > done and checkpoints.due(step):
                    save(step)
                got, clock = rollouts.take(step, state.params)
                tell(got.skipped, f"{stage.name} step {step + 1}")
                with clock("update"):
                    state, sums = do.update(
                        state, packed(stage, got, do, state.params, parts), step
                    )
                pushed = {}
                if stage.sampling:
                    with clock("sync"):
                        pushed = parts.engine.push(state.params, stage.start + step + 1)
                record = metrics.finish(
                    sums,
                    got.all_groups if got.all_verdicts else [],
                    got.all_verdicts,
                    parts.sources,
                    clock.seconds,
                    [row.data_source for row in got.skipped],
                    got.refill,
                )
                writer.write(stage.start + step, record | pushed, stage.name)
                progress(stage.name, step + 1, stage.steps, record)
            if done < stage.steps:
                save(stage.steps)
                seconds = time.monotonic() - began
    return state.params, seconds


def packed(stage: Stage, got: Collected, do: Compiled, params: Any, parts: Parts) -> Batch:
    """The rows of a step; a frozen vision tower encodes the images of each group here if sampling
    has not done so."""
    features = None
    if do.vision_frozen:
        features = got.features
        if features is None:
            features = do.encode(params, [group.prompt for group in got.groups])
    values, weights = advantages(stage, got.groups, got.verdicts, got.used)
    return pack(got.groups, values, weights, parts.source_index, parts.slots, features)


def kept(state: TrainState) -> TrainState:
    """The state as a checkpoint holds it: without the base of adapters, which never changes."""
    return replace(state, params=lora.kept(state.params))


def prompts_ahead(stage: Stage, position: Mapping[str, Any], parts: Parts, source: Feed) -> Prompts:
    """The prompts of the remaining steps, the next ones prepared while the last ones are used.

    Without dynamic sampling or over-sampling a step has one chunk, of its own number.
    """
    mixture = Mixture(parts.train, seed=parts.config.seed + stage.number)

    def prepare(number: int, mixture: Mixture = mixture) -> Chunk:
        def make(sample: Sample) -> Prompt:
            prompt = parts.prompter(sample, number)
            answer = 0 if stage.sampling else len(demonstration(prompt, parts).ids)
            check_fits(prompt, answer, parts.slots)
            return prompt

        before = mixture.state()
        good, bad = source.draw(mixture, stage.prompts, make)
        return Chunk(number, good, bad, before, mixture.state())

    def again(ticket: Ticket) -> tuple[Prompt, Ticket]:
        there = Mixture(parts.train, seed=parts.config.seed + stage.number).restore(ticket["data"])
        chunk, place = divmod(ticket["number"], stage.prompts)
        return prepare(chunk, there).prompts[place], ticket

    left = [again(ticket) for ticket in position.get("left", ())]
    if position["data"]:
        mixture.restore(position["data"])
    extra = math.ceil(parts.config.rollout.over_sampling * stage.prompts) if stage.sampling else 0
    first, begun = divmod(position["taken"], stage.prompts)
    most = (stage.steps - position["done"]) * (stage.refill + 1) + bool(begun)
    most += math.ceil(extra * (parts.config.rollout.ahead + 1) / stage.prompts)
    chunks = source.ahead(prepare, range(first, first + most))
    stream = PromptStream(chunks, stage.prompts, position["taken"], mixture.state())
    return TailStream(stream, extra, parts.engine.may_continue, left) if extra else stream


def responder(stage: Stage, step: int, prompts: Prompts, parts: Parts) -> Respond:
    """What completes the prompts of a step: all of them, or of more prompts the first ones."""
    if not isinstance(prompts, TailStream):
        return partial(respond, stage, step, parts)
    submit = partial(parts.engine.submit, stage.sampling)
    return lambda params, drawn, features, before: prompts.answer(submit, drawn)


def heldout_before(parts: Parts, params: Any, version: int, workdir: Path) -> dict[str, SourceMean]:
    """Held-out rewards before the last stage; a resumed run takes those of its first start."""
    path = workdir / "heldout_before.json"
    means = read_means(path)
    if means is None:
        means = evaluate(parts, params, version).means()
        save_means(path, means)
    return means
