"""How fast a version of the model is published, beside a plain copy of the same bytes.

    python benchmarks/sync.py [--gib=0.5] [--folder=/dev/shm/sync] [--rounds=5]

Publishes a random bfloat16 model of about that size again and again, without a frozen part, and
after each version copies its weights (`shutil.copyfile`) within the same folder. "publish" is the
whole of it: turning every matrix to the layout of the files, checksums, writing, fsync, rename.
"write" is the part that is the host's on any machine, checksums and writing, by its own clock: on
accelerators matrices are turned there, on CPUs the same cores do it at the same time. What is
printed last are medians of the rounds' ratios. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clone, not an installed package


def main() -> None:
    options = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    options.add_argument("--gib", type=float, default=0.5)
    options.add_argument("--folder", type=Path, default=Path("/dev/shm/sync"))
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args()
    args.folder.mkdir(parents=True)
    try:
        measure(args.folder, args.gib, args.rounds)
    finally:
        shutil.rmtree(args.folder)


def measure(folder: Path, gib: float, rounds: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from vtriune_jax import models
    from vtriune_jax.models import ModelConfig, TextConfig, VisionConfig, pretrained, weights
    from vtriune_jax.rollout.publish import Publisher

    width, mlp, vocab = 4096, 16_384, 4096
    layers = max(1, round(gib * 2**30 / 2 / (3 * width * mlp + 2 * width * (width + 512))))
    config = ModelConfig(
        vision=VisionConfig(1, 64, 64, 4, width, (0,)),
        text=TextConfig(vocab, width, mlp, layers, 32, 4, (16, 24, 24)),
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
        tied=True,
    )
    shapes = {p: leaf.shape for p, leaf in weights.flatten(models.abstract(config)[1]).items()}
    some = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(jnp.bfloat16)
    flat = {path: jnp.asarray(np.resize(some, shape)) for path, shape in shapes.items()}
    params = jax.block_until_ready(weights.unflatten(flat))
    pretrained.save_params(config, flat.__getitem__, folder / "start", param_dtype="bfloat16")
    publisher = Publisher(folder / "out", config, reference=folder / "start", keep=1)
    ratios: dict[str, list[float]] = {"publish": [], "write": []}
    print("round      GB  copy GB/s  publish GB/s  write GB/s")
    for version in range(rounds + 1):
        published = publisher.publish(params, version)
        publisher.collect(())
        took = copy(published.folder, folder / "copy")
        if not version:
            continue  # it compiled
        size = published.bytes / 1e9
        speeds = {"publish": size / published.seconds, "write": size / published.write_seconds}
        for name, speed in speeds.items():
            ratios[name].append(speed * took / size)
        print(
            f"{version:5}  {size:6.2f}  {size / took:9.2f}  {speeds['publish']:12.2f}  "
            f"{speeds['write']:10.2f}"
        )
    for name, found in ratios.items():
        print(f"{name}: {statistics.median(found):.0%} of a plain copy")


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the weights of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    start = time.monotonic()
    for file in source.glob("*.safetensors"):
        shutil.copyfile(file, target / file.name)
    took = time.monotonic() - start
    shutil.rmtree(target)
    return took


if __name__ == "__main__":
    main()
