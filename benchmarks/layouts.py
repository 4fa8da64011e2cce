"""Seconds of one update of the same completions in single, group and packed rows, in turn.

    python benchmarks/layouts.py --preset=small --rounds=5

The kinds run one after the other in every round, so that a busy machine slows all alike; printed
are medians, and the ratio to single rows. Half of the groups' completions fill their slots; prompts
fill theirs (--prompt_fill=1.0) as where images have been sized for them, or a part.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import jax
import jax.numpy as jnp
import numpy as np

from vtriune_jax import models, sharding
from vtriune_jax.commands import tell_compilers
from vtriune_jax.data.packing import pack
from vtriune_jax.data.rows import KINDS, Slots, choose, needs
from vtriune_jax.models import ModelConfig, TextConfig, VisionConfig
from vtriune_jax.optim import OptimConfig, make_optimizer
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.update import init_state, make_update
from vtriune_jax.types import Completion, Group, Prompt, RewardConfig, Sample, Vision

PRESETS = {
    "tiny": {"embed": 128, "mlp": 384, "layers": 4, "heads": 4, "vocab": 1024},
    "small": {"embed": 384, "mlp": 1024, "layers": 6, "heads": 6, "vocab": 8192},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Updates in three kinds of rows.")
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=384, help="tokens of the prompt slot")
    parser.add_argument("--completion", type=int, default=128, help="tokens of a completion slot")
    parser.add_argument("--prompt_fill", type=float, default=1.0, help="share of it that is used")
    parser.add_argument("--remat", default="full", choices=("none", "dots", "full"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    tell_compilers()
    config = model_config(args)
    slots = Slots(args.prompt, args.completion, windows=1, pad_id=0)
    groups = draw(args, config)
    asked = needs(groups, slots, 1, 1)
    runs = {}
    for kind in KINDS:
        rows = choose(kind, asked, slots, args.groups, args.samples, 1, config, False)
        ones = np.ones((args.groups, args.samples), np.float32)
        features = jnp.zeros((args.groups, 4, config.text.embed))
        batch = pack(groups, ones, ones, {"bench": 0}, slots, features, rows)
        runs[kind] = update_of(config, batch), batch.ids.shape
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        for kind, (run, _) in runs.items():
            start = time.perf_counter()
            run()
            seconds[kind].append(time.perf_counter() - start)
    auto = choose("auto", asked, slots, args.groups, args.samples, 1, config, False)
    single = statistics.median(seconds["single"])
    print(f"{args} · auto would take {auto.kind} rows")
    for kind, (_, (rows, tokens)) in runs.items():
        median = statistics.median(seconds[kind])
        print(
            f"{kind:8s} {rows:4d} rows × {tokens:5d} tokens = {rows * tokens:7d} · {median:7.3f} s "
            f"(from {min(seconds[kind]):.3f}) · {single / median:.2f}× as fast as single"
        )


def model_config(args: Any) -> ModelConfig:
    sizes = PRESETS[args.preset]
    half = sizes["embed"] // sizes["heads"] // 2
    third = half // 3
    text = TextConfig(**sizes, kv_heads=2, mrope_section=(half - 2 * third, third, third))
    vision = VisionConfig(
        depth=1, embed=16, mlp=16, heads=1, out=sizes["embed"], full_attention=(), window_size=56
    )
    marks = [text.vocab - k for k in range(1, 5)]
    return ModelConfig(vision, text, *marks, tied=True, remat=args.remat)


def draw(args: Any, config: ModelConfig) -> list[Group]:
    rng = np.random.default_rng(0)
    length = round(args.prompt * args.prompt_fill)
    sample = Sample("bench", "0", (), (), RewardConfig("none", ""))
    nothing = np.zeros((0, config.vision.slots), np.int32)

    def ids(size: int) -> np.ndarray:
        return rng.integers(0, config.text.vocab - 8, size).astype(np.int32)

    def completion(size: int) -> Completion:
        return Completion(ids(size), np.full(size, -5.0, np.float32), "", "stop")

    return [
        Group(
            Prompt(
                sample=sample,
                ids=ids(length),
                positions=np.tile(np.arange(length, dtype=np.int32), (3, 1)),
                image_index=np.full(length, -1, np.int32),
                vision=Vision(nothing, nothing, nothing),
                grid_thw=np.zeros((0, 3), np.int32),
            ),
            tuple(
                completion(args.completion if k % 2 else int(rng.integers(1, args.completion)))
                for k in range(args.samples)
            ),
        )
        for _ in range(args.groups)
    ]


def update_of(config: ModelConfig, batch: Any) -> Any:
    """A function that makes one update and waits for it; compiled."""
    graphdef, params = models.split(models.init(config, seed=0))
    mesh, freeze = sharding.make_mesh(), ("^visual/",)
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-6))
    state = init_state(params, optimizer, mesh, freeze)
    update = make_update(
        graphdef, optimizer, LossConfig(), mesh, state, num_sources=1, freeze=freeze
    )

    def run() -> None:
        nonlocal state
        state, sums = update(state, batch)
        jax.block_until_ready(sums)

    run()
    return run


if __name__ == "__main__":
    main()
