"""FLOPs of a config's update in single and in group rows, by the shapes alone: nothing is compiled.

    python benchmarks/layout_flops.py [--config=configs/orsta_7b.py]

On one device and in one micro-batch, so that a row may hold a whole group.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone, not an installed package

from vtriune_jax import config as configs
from vtriune_jax import sharding
from vtriune_jax.aot import flops
from vtriune_jax.aot.program import build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=str(configs.REPOSITORY / "configs" / "orsta_7b.py"))
    args = parser.parse_args()
    found = {}
    for layout in ("single", "group"):
        keys = [("batch.micro_batches", "1"), ("batch.layout", layout)]
        program = build(configs.load(args.config, keys), sharding.make_mesh())
        found[layout] = flops.model_flops(program), flops.executed_flops(program)
        model, executed = found[layout]
        print(
            f"{layout:6} {flops.tokens(program):>12,} tokens, {model:.3e} model FLOPs, "
            f"{executed:.3e} executed"
        )
    ratios = [group / single for single, group in zip(*found.values(), strict=True)]
    print(f"group / single: model {ratios[0]:.2f}, executed {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
