"""The training run, top to bottom:

data → prompts → rollout → verifiers → advantages → update → metrics → checkpoint
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtriune_jax import metrics
from vtriune_jax.assemble import Parts, assemble
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.collect import collect
from vtriune_jax.data.feed import Feed, feed, tell
from vtriune_jax.data.mixture import Mixture
from vtriune_jax.data.packing import check_fits, pack
from vtriune_jax.data.stream import Chunk, PromptStream
from vtriune_jax.evaluate import evaluate, read_means, save_means
from vtriune_jax.finish import finish
from vtriune_jax.metrics import SourceMean
from vtriune_jax.models import lora
from vtriune_jax.stages import Stage, plan
from vtriune_jax.steps import advantages, compiled, demonstration
from vtriune_jax.types import Prompt, Sample, TrainState
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
    ):
        done, taken, seconds = 0, 0, 0.0
        if restored := checkpoints.restore(kept(state)):
            saved, position = restored
            state = replace(saved, params=lora.put_back(state.params, saved.params))
            done, taken, seconds = (position[key] for key in ("done", "taken", "seconds"))
            mixture.restore(position["data"])
        if done < stage.steps:
            writer.resume(stage.start + done)
        began = time.monotonic() - seconds
        prompts = prompts_ahead(stage, done, taken, mixture, parts, source)
        for step in range(done, stage.steps):
            clock = Clock()
            got = collect(stage, step, state.params, prompts, do, parts, clock)
            tell(got.skipped, f"{stage.name} step {step + 1}")
            with clock("update"):
                values, weights = advantages(stage, got.groups, got.verdicts, got.used)
                rows = got.groups, values, weights, parts.source_index, parts.slots, got.features
                state, sums = do.update(state, pack(*rows), step)
            left_out = [row.data_source for row in got.skipped]
            record = metrics.finish(
                sums, *got.drawn, parts.sources, clock.seconds, left_out, got.refill
            )
            writer.write(stage.start + step, record, stage.name)
            progress(stage.name, step + 1, stage.steps, record)
            seconds = time.monotonic() - began
            position = {"done": step + 1, "seconds": seconds} | prompts.position()
            last = step + 1 == stage.steps
            (checkpoints.save if last else checkpoints.maybe)(step + 1, kept(state), position)
    return state.params, seconds


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
    return PromptStream(chunks, stage.prompts, taken)


def heldout_before(parts: Parts, params: Any, workdir: Path) -> dict[str, SourceMean]:
    """Held-out rewards before the last stage; a resumed run takes those of its first start."""
    path = workdir / "heldout_before.json"
    means = read_means(path)
    if means is None:
        means = evaluate(parts, params).means()
        save_means(path, means)
    return means


class Clock:
    """Wall seconds per part of a step, for the metrics `time/<part>`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Times a `with` block."""
        start = time.monotonic()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - start
