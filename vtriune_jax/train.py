"""The training run, top to bottom:

data → prompts → rollout → verifiers → advantages → update → metrics → checkpoint
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vtriune_jax import metrics
from vtriune_jax.ahead import Ahead
from vtriune_jax.assemble import Parts, assemble
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.collect import Collected, collect
from vtriune_jax.data.feed import Feed, feed, tell
from vtriune_jax.data.mixture import Mixture
from vtriune_jax.data.packing import check_fits
from vtriune_jax.data.stream import Chunk, PromptStream
from vtriune_jax.evaluate import evaluate, read_means, save_means
from vtriune_jax.finish import finish
from vtriune_jax.metrics import SourceMean
from vtriune_jax.models import lora
from vtriune_jax.stages import Stage, plan
from vtriune_jax.steps import Compiled, Told, advantages, compiled, demonstration, lay_out, respond
from vtriune_jax.timeline import Clock, Timeline
from vtriune_jax.types import Batch, Group, Prompt, Sample, TrainState
from vtriune_jax.waiting import first_from, from_arrays, to_arrays
from vtriune_jax.writers import MetricsWriter, Progress


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
                before = heldout_before(parts, params, workdir)
            params, spent = train(stage, params, parts, writer, workdir)
            seconds += spent
        steps = sum(stage.steps for stage in stages)
        finish(parts, workdir, params, before, evaluate(parts, params), steps, seconds)


def train(
    stage: Stage, params: Any, parts: Parts, writer: MetricsWriter, workdir: Path
) -> tuple[Any, float]:
    """Trains one stage to its end; returns the parameters and the seconds that it took in all."""
    config = parts.config
    do = compiled(stage, params, parts)
    state = do.state
    mixture = Mixture(parts.train, seed=config.seed + stage.number)
    progress = Progress(workdir, every=config.log.seconds)
    folder = workdir / "checkpoints" / stage.name
    with (
        Checkpointer(folder, config.checkpoint.every, config.checkpoint.keep) as checkpoints,
        feed(config.data.threads, config.data.on_bad_row) as source,
        Timeline(workdir / "timeline.json") as timeline,
    ):
        done, taken, seconds, waiting = 0, 0, 0.0, []
        if restored := checkpoints.restore(kept(state)):
            state = replace(
                restored.state, params=lora.put_back(state.params, restored.state.params)
            )
            done, taken, seconds = (restored.extra[key] for key in ("done", "taken", "seconds"))
            mixture.restore(restored.extra["data"])
            waiting = from_arrays(restored.waiting, parts.prompter.decode)
        if done < stage.steps:
            writer.resume(stage.start + done)
        began = time.monotonic() - seconds
        prompts = prompts_ahead(stage, done, taken, mixture, parts, source)

        def begin(step: int, params: Any, first: Any, clock: Clock) -> Collected:
            answer = partial(respond, stage, step, parts)
            answer = first_from(waiting, answer) if step == done else answer
            encode = do.encode if stage.sampling else None
            return collect(stage, step, params, first, prompts, answer, encode, parts, clock)

        def save(step: int, position: dict[str, Any], groups: Sequence[Group] = ()) -> None:
            seconds = time.monotonic() - began
            extra = {"done": step, "seconds": seconds} | position
            checkpoints.save(step, kept(state), extra, to_arrays(groups))

        ahead = Ahead(
            begin,
            prompts,
            partial(timeline.clock, stage.name),
            ahead=config.rollout.ahead if stage.sampling else 0,
            last=stage.steps,
            threads=False,
        )
        with ahead:
            for step in range(done, stage.steps):
                if step > done and checkpoints.due(step):
                    save(step, *ahead.position())
                got, clock = ahead.take(step, state.params)
                tell(got.skipped, f"{stage.name} step {step + 1}")
                with clock("update"):
                    batch, told = packed(stage, got, do, state.params, parts)
                    state, sums = do.update(state, batch, step)
                record = metrics.finish(
                    sums | told,
                    got.all_groups if got.all_verdicts else [],
                    got.all_verdicts,
                    parts.sources,
                    clock.seconds,
                    [row.data_source for row in got.skipped],
                    got.refill,
                )
                writer.write(stage.start + step, record, stage.name)
                progress(stage.name, step + 1, stage.steps, record)
            if done < stage.steps:
                save(stage.steps, *ahead.position())
                seconds = time.monotonic() - began
    return state.params, seconds


def packed(
    stage: Stage, got: Collected, do: Compiled, params: Any, parts: Parts
) -> tuple[Batch, Told]:
    """The rows of a step, and what to tell of them; a frozen vision tower encodes the images of
    each group here if sampling has not done so."""
    features = None
    if do.vision_frozen:
        features = got.features
        if features is None:
            features = do.encode(params, [group.prompt for group in got.groups])
    values, weights = advantages(stage, got.groups, got.verdicts, got.used)
    return lay_out(stage, got.groups, values, weights, features, parts)


def kept(state: TrainState) -> TrainState:
    """The state as a checkpoint holds it: without the base of adapters, which never changes."""
    return replace(state, params=lora.kept(state.params))


def prompts_ahead(
    stage: Stage, done: int, taken: int, mixture: Mixture, parts: Parts, source: Feed
) -> PromptStream:
    """The prompts of the remaining steps, the next ones prepared while the last ones are used.

    Without dynamic sampling a step has one chunk, of its own number. `taken` prompts were used in
    the `done` steps.
    """

    def prepare(number: int) -> Chunk:
        def make(sample: Sample) -> Prompt:
            prompt = parts.prompter(sample, number)
            answer = 0 if stage.sampling else len(demonstration(prompt, parts).ids)
            check_fits(prompt, answer, parts.slots)
            return prompt

        before = mixture.state()
        good, bad = source.draw(mixture, stage.prompts, make)
        return Chunk(number, good, bad, before, mixture.state())

    first, begun = divmod(taken, stage.prompts)
    most = (stage.steps - done) * (stage.refill + 1) + bool(begun)
    chunks = source.ahead(prepare, range(first, first + most))
    return PromptStream(chunks, stage.prompts, taken, mixture.state())


def heldout_before(parts: Parts, params: Any, workdir: Path) -> dict[str, SourceMean]:
    """Held-out rewards before the last stage; a resumed run takes those of its first start."""
    path = workdir / "heldout_before.json"
    means = read_means(path)
    if means is None:
        means = evaluate(parts, params).means()
        save_means(path, means)
    return means
