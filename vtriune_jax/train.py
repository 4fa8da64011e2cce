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
from vtriune_jax.data.feed import Feed, Skipped, feed, tell
from vtriune_jax.data.mixture import Mixture
from vtriune_jax.data.packing import check_fits, pack
from vtriune_jax.evaluate import evaluate, read_means, save_means
from vtriune_jax.finish import finish
from vtriune_jax.metrics import SourceMean
from vtriune_jax.models import lora
from vtriune_jax.stages import Stage, plan
from vtriune_jax.steps import advantages, compiled, demonstration, respond, verify
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
        done, seconds = 0, 0.0
        if restored := checkpoints.restore(kept(state)):
            saved, position = restored
            state = replace(saved, params=lora.put_back(state.params, saved.params))
            done, seconds = position["done"], position["seconds"]
            mixture.restore(position["data"])
        if done < stage.steps:
            writer.resume(stage.start + done)
        began = time.monotonic() - seconds
        for step, prompts, skipped, data in prompts_ahead(stage, done, mixture, parts, source):
            tell(skipped, f"{stage.name} step {step + 1}")
            clock = Clock()
            with clock("encode"):
                features = do.encode(state.params, prompts)
            with clock("rollout"):
                groups = respond(stage, step, state.params, prompts, features, parts)
            with clock("verify"):
                verdicts = verify(stage, step, groups, parts)
            with clock("update"):
                values, weights = advantages(groups, verdicts)
                features = features if do.vision_frozen else None
                batch = pack(groups, values, weights, parts.source_index, parts.slots, features)
                state, sums = do.update(state, batch)
            judged = groups if verdicts else []
            left_out = [row.data_source for row in skipped]
            record = metrics.finish(sums, judged, verdicts, parts.sources, clock.seconds, left_out)
            writer.write(stage.start + step, record, stage.name)
            progress(stage.name, step + 1, stage.steps, record)
            seconds = time.monotonic() - began
            position = {"done": step + 1, "data": data, "seconds": seconds}
            last = step + 1 == stage.steps
            (checkpoints.save if last else checkpoints.maybe)(step + 1, kept(state), position)
    return state.params, seconds


def kept(state: TrainState) -> TrainState:
    """The state as a checkpoint holds it: without the base of adapters, which never changes."""
    return replace(state, params=lora.kept(state.params))


def prompts_ahead(
    stage: Stage, done: int, mixture: Mixture, parts: Parts, source: Feed
) -> Iterator[tuple[int, list[Prompt], list[Skipped], dict[str, int]]]:
    """The prompts of every remaining step, prepared while the step before is trained.

    With them come the rows that were passed over, and the position in the data that a checkpoint
    after this step must hold.
    """

    def prepare(step: int) -> tuple[int, list[Prompt], list[Skipped], dict[str, int]]:
        def make(sample: Sample) -> Prompt:
            prompt = parts.prompter(sample, step)
            answer = 0 if stage.sampling else len(demonstration(prompt, parts).ids)
            check_fits(prompt, answer, parts.slots)
            return prompt

        return step, *source.draw(mixture, stage.prompts, make), mixture.state()

    return source.ahead(prepare, range(done, stage.steps))


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
        self.seconds[part] = time.monotonic() - start
