"""The training run, top to bottom:

data → prompts → rollout → verifiers → advantages → update → metrics → checkpoint
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vtriune_jax import metrics
from vtriune_jax.assemble import Parts, assemble
from vtriune_jax.checkpoint import Checkpointer
from vtriune_jax.data.mixture import Mixture
from vtriune_jax.data.packing import pack, split_batch, stack_vision
from vtriune_jax.evaluate import evaluate, items, read_means, save_means
from vtriune_jax.finish import finish
from vtriune_jax.metrics import SourceMean, Sums
from vtriune_jax.optim import make_optimizer, partition
from vtriune_jax.rl.advantages import group_advantages
from vtriune_jax.rl.update import init_state, make_encode, make_update
from vtriune_jax.stages import Stage, plan
from vtriune_jax.types import Completion, Group, Prompt, TrainState, Verdict
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
            params, spent = train_stage(stage, params, parts, writer, workdir)
            seconds += spent
        steps = sum(stage.steps for stage in stages)
        finish(parts, workdir, params, before, evaluate(parts, params), steps, seconds)


def heldout_before(parts: Parts, params: Any, workdir: Path) -> dict[str, SourceMean]:
    """Held-out rewards before the last stage; a resumed run takes those of its first start."""
    path = workdir / "heldout_before.json"
    means = read_means(path)
    if means is None:
        means = evaluate(parts, params).means()
        save_means(path, means)
    return means


def train_stage(
    stage: Stage, params: Any, parts: Parts, writer: MetricsWriter, workdir: Path
) -> tuple[Any, float]:
    """Trains one stage to its end; returns the parameters and the seconds that it took in all."""
    config, mesh = parts.config, parts.mesh
    tx = make_optimizer(stage.optim)
    state = init_state(params, tx, mesh, stage.freeze)
    update = make_update(
        parts.graphdef,
        tx,
        stage.loss,
        mesh,
        state,
        num_sources=len(parts.sources),
        freeze=stage.freeze,
        micro_batches=config.batch.micro_batches,
    )
    encode = make_encode(parts.graphdef, mesh, state.params)
    encode_once = "visual" not in partition(state.params, stage.freeze)[0]
    progress = Progress(workdir, every=config.log.seconds)
    mixture = Mixture(parts.train, seed=config.seed + stage.number)
    folder = workdir / "checkpoints" / stage.name
    with Checkpointer(folder, config.checkpoint.every, config.checkpoint.keep) as checkpoints:
        done, seconds = 0, 0.0
        if restored := checkpoints.restore(state):
            state, extra = restored
            done, seconds = extra["done"], extra["seconds"]
            mixture.restore(extra["data"])
        if done < stage.steps:
            writer.resume(stage.start + done)
        began = time.monotonic() - seconds
        for step, prompts, position in prompts_ahead(stage, done, mixture, parts):
            clock = Clock()
            with clock("encode"):
                vision = stack_vision(prompts, parts.slots)
                features = encode(state.params, vision) if stage.samples or encode_once else None
            if stage.samples:
                with clock("rollout"):
                    groups = rollout(stage, step, state.params, prompts, features, parts)
                with clock("verify"):
                    verdicts = verify(stage, step, groups, parts)
                advantages, weights, _ = group_advantages(*scores(verdicts))
            else:
                groups, verdicts = demonstrations(prompts, parts), []
                advantages = weights = np.ones((len(groups), 1), np.float32)
            with clock("update"):
                features = features if encode_once else None
                batch = pack(groups, advantages, weights, parts.source_index, parts.slots, features)
                state, sums = update_all(update, state, split_batch(batch, stage.minibatches))
            judged = groups if stage.samples else []
            record = metrics.finish(sums, judged, verdicts, parts.sources, clock.seconds)
            writer.write(stage.start + step, record, stage.name)
            done = step + 1
            progress(stage.name, done, stage.steps, record)
            extra = {"done": done, "data": position, "seconds": time.monotonic() - began}
            save = checkpoints.maybe if done < stage.steps else checkpoints.save
            save(done, state, extra)
            seconds = extra["seconds"]
    return state.params, seconds


def prompts_ahead(
    stage: Stage, done: int, mixture: Mixture, parts: Parts
) -> Iterator[tuple[int, list[Prompt], dict[str, int]]]:
    """The prompts of every remaining step, prepared while the step before is trained.

    With them comes the position in the data that a checkpoint after this step must hold.
    """

    def prepare(step: int) -> tuple[int, list[Prompt], dict[str, int]]:
        samples = mixture.take(stage.prompts)
        return step, [parts.prompter(sample, step) for sample in samples], mixture.state()

    with ThreadPoolExecutor(1, thread_name_prefix="prompts") as pool:
        ahead: Future | None = None
        for step in range(done, stage.steps):
            ready = (ahead or pool.submit(prepare, step)).result()
            ahead = pool.submit(prepare, step + 1)
            yield ready


def demonstrations(prompts: Sequence[Prompt], parts: Parts) -> list[Group]:
    """What supervised fine-tuning imitates, as if it had been sampled."""
    return [
        Group(prompt, (demonstration(prompt.sample.demonstration, parts),)) for prompt in prompts
    ]


def demonstration(text: str, parts: Parts) -> Completion:
    """A text as a completion; its log-probs are not known, and not needed for imitation."""
    ids = parts.prompter.encode_completion(text)
    return Completion(ids=ids, logps=np.zeros(len(ids), np.float32), text=text, finish="stop")


def rollout(
    stage: Stage,
    step: int,
    params: Any,
    prompts: Sequence[Prompt],
    features: jax.Array | None,
    parts: Parts,
) -> list[Group]:
    """n completions of every prompt; what is random follows from seed, step and prompt."""
    key = jax.random.fold_in(jax.random.key(parts.config.seed), stage.start + step)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(len(prompts)))
    slot = parts.slots.prompt_tokens
    return parts.engine.generate(params, prompts, features, stage.sampling, keys, slot)


def verify(
    stage: Stage, step: int, groups: Sequence[Group], parts: Parts
) -> list[list[Verdict]]:
    """A verdict for every completion; the progress that thresholds follow counts from 1."""
    progress = (step + 1) / stage.steps
    verdicts = iter(parts.verifiers.score(items(groups, parts, progress=progress)))
    return [[next(verdicts) for _ in group.completions] for group in groups]


def scores(verdicts: Sequence[Sequence[Verdict]]) -> tuple[np.ndarray, np.ndarray]:
    """Scores [groups, samples], and whether each is one: a failed verification is masked."""
    valid = np.array([[verdict.status == "ok" for verdict in group] for group in verdicts])
    return np.array([[verdict.score for verdict in group] for group in verdicts]), valid


def update_all(update: Any, state: TrainState, batches: Sequence[Any]) -> tuple[TrainState, Sums]:
    """One update per minibatch, and the sums over them."""
    total: Sums | None = None
    for batch in batches:
        state, sums = update(state, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    return state, total


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
