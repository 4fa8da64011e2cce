"""Our side of the peers' driver: one case a process, the peer's batch, the peer's metric names.

    python bench_peers.py --preset micro --what A,B,C,D,E --repeats 3 \\
        --ours "$PWD/.venv/bin/python $PWD/benchmarks/ours.py --case {case} --ckpt {ckpt} \\
                --device {device} --steps {steps} --warmup {warmup}"

The driver (`bench_peers.py`, see its README) runs transformers, TRL or Tunix and this script in
turn on the same checkpoint, batch and cores. Everything here goes through the doors that a run
goes through: `make_update`, `LocalEngine.generate`, `images.patches`. A case that we do not have
ends with exit status 77. As in a run, compiled programs are kept in a cache: a case run for the
first time needs the compiler's memory as well as its own.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import jax
import jax.numpy as jnp
import numpy as np
from ours_batch import prompts_of, read, sample_of
from update_work import cpu_seconds, peak_mb

from vtriune_jax import models, sharding
from vtriune_jax.commands import keep_programs, return_memory, tell_compilers
from vtriune_jax.data.packing import pack, stack_vision
from vtriune_jax.data.rows import Slots, choose, needs
from vtriune_jax.optim import OptimConfig, make_optimizer
from vtriune_jax.rewards.assignment import optimal
from vtriune_jax.rewards.boxes import pairwise_iou
from vtriune_jax.rewards.matching import Match
from vtriune_jax.rl.advantages import group_advantages
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.policy import make_logps
from vtriune_jax.rl.update import init_state, make_update
from vtriune_jax.rollout.choice import Sampling
from vtriune_jax.rollout.local import LocalEngine
from vtriune_jax.types import Batch, Completion, Group

NO_SUCH_CASE = 77


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", required=True)
    parser.add_argument("--ckpt", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--micro_batches", type=int, default=4)
    parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
    parser.add_argument("--unroll", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    bench, dtype = bench_of(args.case)
    if args.device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    tell_compilers()
    keep_programs()
    return_memory()
    metrics = bench(args, "-text" in args.case, dtype)
    metrics["peak_rss_mb"] = metrics.get("peak_rss_mb") or peak_mb()
    print("BENCH_JSON " + json.dumps({"case": args.case, "metrics": metrics}), flush=True)


def bench_of(case: str) -> tuple[Callable[..., dict[str, float]], str]:
    """What measures a case of the driver, and in which type of activations."""
    group, _, rest = case.partition("/")
    name, _, variant = rest.partition("/")
    dtype = "float32" if variant.startswith("fp32") else "bfloat16"
    benches = {
        "A/train": train,
        "A/train-text": train,
        "B/generate": generate,
        "B/generate-text": generate,
        "C/trl-grpo": whole_step,
        "D/tunix-train-text": train,
        "D/tunix-sample-text": generate,
        "D/tunix-grpo-text": whole_step,
        "E/preproc": preprocess,
        "E/match": match,
    }
    if f"{group}/{name}" not in benches:
        sys.exit(NO_SUCH_CASE)
    return benches[f"{group}/{name}"], dtype


# ------------------------------------------------------------------------------------ the cases


def train(args: Any, text_only: bool, dtype: str) -> dict[str, float]:
    """One update on the driver's batch: forward, backward, clip, AdamW; both towers are trained."""
    graphdef, params, config = load(args.ckpt, dtype, args.remat, args.unroll)
    data = read(args.ckpt, "train", text_only)
    response = data["response_mask"].shape[1]
    groups = [
        Group(
            prompt,
            (Completion(ids[-response:].astype(np.int32), old.astype(np.float32), "", "length"),),
        )
        for prompt, ids, old in zip(
            prompts_of(data, config, response), data["input_ids"], data["old_logps"], strict=True
        )
    ]
    slots = slots_of(groups, data["input_ids"].shape[1] - response, response)
    advantages = data["advantages"][:, None]
    batch = pack(groups, advantages, np.ones_like(advantages), {"bench": 0}, slots)
    freeze = ("^visual/",) if text_only else ()
    state, update = training(graphdef, params, freeze, 1e-5, args.micro_batches)
    del params
    first: dict[str, float] = {}

    def step() -> None:
        nonlocal state
        began = time.perf_counter()
        state, sums = update(state, batch)
        sums = jax.device_get(sums)
        if not first:
            loss, tokens = (x.sum() for x in sums["loss"])
            first.update(
                loss0=float(loss / tokens),
                grad_norm0=float(sums["grad_norm"][0]),
                first_step_s=time.perf_counter() - began,
            )

    timing = measure(step, args.warmup, args.steps)
    peak = peak_mb()
    _, params, _ = load(args.ckpt, dtype)
    gap = np.abs(logps(graphdef, params, batch) - data["logps_fp32"]).max()
    tokens = data["input_ids"].size
    return {
        "step_s": timing["wall_s"],
        "tokens_per_s": tokens / timing["wall_s"],
        "cpu_s": timing["cpu_s"],
        "peak_rss_mb": peak,
        "logp_err0": float(gap),
        **first,
    }


def generate(args: Any, text_only: bool, dtype: str) -> dict[str, float]:
    """256 new tokens for each of 16 prompts, images encoded within the measured time."""
    graphdef, params, config = load(args.ckpt, dtype)
    data = read(args.ckpt, "generate", text_only)
    prompts = prompts_of(data, config, 0)
    slots = slots_of([Group(prompt, ()) for prompt in prompts], data["input_ids"].shape[1], 0)
    del data
    engine = LocalEngine(graphdef, stop_ids=(), banned_ids=(), pad_id=0, decode_text=lambda ids: "")
    sampling = Sampling(max_tokens=256, n=1)
    numbers = iter(range(1_000_000))

    def run() -> None:
        keys = jax.random.split(jax.random.key(next(numbers)), len(prompts))
        features = (
            None if text_only else models.encode(graphdef, params, stack_vision(prompts, slots))
        )
        engine.generate(params, prompts, features, sampling, keys, slots.prompt_tokens)

    timing = measure(run, args.warmup, args.steps)
    tokens = len(prompts) * sampling.max_tokens
    return timing | {"tokens_per_s": tokens / timing["wall_s"]}


def whole_step(args: Any, text_only: bool, dtype: str) -> dict[str, float]:
    """Sample 2 × 8 completions of at most 64 tokens, reward them as the peer does, update."""
    from sampler import engine_of

    from vtriune_jax.data.prompts import Prompter
    from vtriune_jax.data.tokenizer import load_processor

    sys.path.insert(0, os.getcwd())  # the driver runs us in its own folder, where its tasks are
    import data as task  # pyright: ignore[reportMissingImports]

    graphdef, params, config = load(args.ckpt, dtype, args.remat, args.unroll)
    prompter = Prompter(load_processor(args.ckpt), config, cot=False)
    samples = task.digit_samples(2 * (args.steps + args.warmup), 224, 0)
    prompts = [prompter(sample_of(s, task, text_only, i)) for i, s in enumerate(samples)]
    slots = slots_of([Group(p, ()) for p in prompts], max(len(p.ids) for p in prompts), 64)
    engine = engine_of(graphdef, prompter)
    sampling = Sampling(max_tokens=64, n=8)
    freeze = ("^visual/",) if text_only else ()
    state, update = training(graphdef, params, freeze, 1e-6, micro_batches=1)
    del params
    pairs: Iterator[int] = cycle(range(0, len(prompts), 2))

    def reward(text: str, sample: dict[str, Any]) -> float:
        box = 0.0 if text_only else task.reward_box(text, sample["box"])
        label = sample["label"]
        return task.reward_digit(text, label) + box + task.reward_length(text, label)

    def step() -> None:
        nonlocal state
        start = next(pairs)
        pair = prompts[start : start + 2]
        images = stack_vision(pair, slots)
        features = None if text_only else models.encode(graphdef, state.params, images)
        keys = jax.random.split(jax.random.key(start), 2)
        groups = engine.generate(state.params, pair, features, sampling, keys, slots.prompt_tokens)
        scores = np.array(
            [
                [reward(c.text, samples[start + i]) for c in group.completions]
                for i, group in enumerate(groups)
            ]
        )
        values, weights, _ = group_advantages(scores, np.ones_like(scores, bool))
        state, sums = update(state, lay_out(groups, values, weights, slots, config, unit=1))
        jax.device_get(sums)

    timing = measure(step, args.warmup, args.steps)
    return {
        "step_s": timing["wall_s"],
        "cpu_s": timing["cpu_s"],
        "samples_per_s": 16 / timing["wall_s"],
    }


def preprocess(args: Any, text_only: bool, dtype: str) -> dict[str, float]:
    """Encoded JPEGs → patches as our tower takes them, one after the other: the peer's `e2e`."""
    from PIL import Image

    from vtriune_jax.data import images

    settings = SimpleNamespace(
        **dict(patch_size=14, temporal_patch_size=2, merge_size=2),
        size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        **dict(resample=Image.Resampling.BICUBIC, rescale_factor=1 / 255),
        **dict(image_mean=(0.48145466, 0.4578275, 0.40821073)),
        **dict(image_std=(0.26862954, 0.26130258, 0.27577711)),
    )
    rng = np.random.default_rng(0)
    blobs = []
    for _ in range(16):  # the peer's pictures, drawn the same way
        small = rng.integers(0, 255, (750 // 12, 1000 // 12, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(small).resize((1000, 750), Image.Resampling.BICUBIC))
        noise = rng.integers(-9, 10, picture.shape)
        noisy = (picture.astype(np.int16) + noise).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        blobs.append(buffer.getvalue())

    def run() -> list[Any]:
        return [images.patches([blob], settings, "benchmark") for blob in blobs]

    timing = measure(run, args.warmup, args.steps)
    return timing | {"e2e_images_per_s": len(blobs) / timing["wall_s"]}


def match(args: Any, text_only: bool, dtype: str) -> dict[str, float]:
    """IoU and optimal matching of 10,000 problems of 10 × 10 boxes, in one jitted call."""
    sys.path.insert(0, os.getcwd())  # the driver runs us in its own folder
    import common  # pyright: ignore[reportMissingImports]
    import e_preproc  # pyright: ignore[reportMissingImports]

    work = common.WORK["match"]
    predicted, truth = e_preproc.boxes(work["problems"], work["boxes"], work["seed"])

    @jax.jit
    def solve(predicted: jax.Array, truth: jax.Array) -> Match:
        iou = pairwise_iou(predicted, truth)
        thresholds = jnp.zeros((len(iou), 1))
        return optimal(iou, jnp.ones(iou.shape, bool), thresholds)

    timing = measure(
        lambda: jax.block_until_ready(solve(predicted, truth)), args.warmup, args.steps
    )
    return timing | {"e2e_batched_hungarian_per_s": work["problems"] / timing["wall_s"]}


# ------------------------------------------------------------------------------------- the parts


def load(
    path: Path, dtype: str, remat: str = "none", unroll: bool = False
) -> tuple[Any, Any, models.ModelConfig]:
    model = models.load_pretrained(path, dtype=dtype, remat=remat, unroll=unroll)
    return *models.split(model), model.config


def training(
    graphdef: Any, params: Any, freeze: Sequence[str], lr: float, micro_batches: int
) -> tuple[Any, Callable[..., Any]]:
    """A state and an update as the driver's WORK asks for."""
    mesh = sharding.make_mesh()
    tx = make_optimizer(OptimConfig(learning_rate=lr, weight_decay=0.0))
    loss = LossConfig(clip_low=0.2, clip_high=0.2, old="rollout")
    state = init_state(params, tx, mesh, freeze)
    update = make_update(
        graphdef, tx, loss, mesh, state, num_sources=1, freeze=freeze, micro_batches=micro_batches
    )
    return state, update


def lay_out(
    groups: Sequence[Group],
    gains: np.ndarray,
    weights: np.ndarray,
    slots: Slots,
    config: models.ModelConfig,
    unit: int,
    features: Any = None,
) -> Batch:
    """The rows that a run would choose, their number a multiple of `unit`.

    With the `features` of the groups' images a frozen tower has made them already.
    """
    samples = len(groups[0].completions)
    asked = needs(groups, slots, 1, unit)
    trained = features is None
    rows = choose("auto", asked, slots, len(groups), samples, unit, config, vision_trained=trained)
    return pack(groups, gains, weights, {"bench": 0}, slots, features, rows, unit=unit)


def slots_of(groups: Sequence[Group], prompt: int, completion: int) -> Slots:
    windows = max(group.prompt.vision.segments.shape[0] for group in groups)
    return Slots(prompt_tokens=prompt, completion_tokens=completion, windows=windows, pad_id=0)


def logps(graphdef: Any, params: Any, batch: Batch) -> np.ndarray:
    """Log-probs of the completions, for the parity column."""
    found = make_logps(graphdef, LossConfig(), sharding.make_mesh())(params, batch)
    return np.asarray(found)[:, 0]


def measure(run: Callable[[], Any], warmup: int, steps: int) -> dict[str, float]:
    """Median wall and CPU seconds of `steps` runs after `warmup` ones."""
    for _ in range(max(1, warmup)):
        run()
    walls, cpus = [], []
    for _ in range(steps):
        wall, cpu = time.perf_counter(), cpu_seconds()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(cpu_seconds() - cpu)
    return {"wall_s": statistics.median(walls), "cpu_s": statistics.median(cpus)}


if __name__ == "__main__":
    main()
