"""What LoRA saves at a real size, by the shapes alone: nothing is allocated.

    python benchmarks/lora_memory.py [--size=7B] [--rank=16]

Bytes of the trained parameters' gradients and AdamW moments, and of what a checkpoint holds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

import jax

from configs import base
from vtriune_jax import models
from vtriune_jax.models import lora
from vtriune_jax.optim import OptimConfig, make_optimizer, partition
from vtriune_jax.rl.update import abstract_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="7B", choices=("3B", "7B", "32B", "72B"))
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    for rank in (0, args.rank):
        keys = base.get_config().model.lora
        keys.rank = rank
        config = replace(models.named(args.size), lora=lora.from_keys(keys))
        _, params = models.abstract(config)
        freeze = ("^visual/", *((lora.BASE,) if rank else ()))
        tx = make_optimizer(OptimConfig(learning_rate=1e-6, weight_decay=0.0))
        state = abstract_state(params, tx, freeze)
        trained = partition(params, freeze)[0]
        saved = (lora.kept(params), state.opt_state)
        print(
            f"{args.size} {f'LoRA rank {rank}' if rank else 'full':13s} gradients "
            f"{gib(trained):6.2f} GiB, optimizer {gib(state.opt_state):6.2f} GiB, "
            f"checkpoint {gib(saved):6.2f} GiB"
        )


def gib(tree: object) -> float:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 2**30


if __name__ == "__main__":
    main()
