"""How much host memory loading a checkpoint takes beside the parameters themselves.

    python benchmarks/loading.py [--gib=2] [--file-dtype=bfloat16] [--folder=/tmp/loading]

Writes a random checkpoint of about that size in several files, then loads it in fresh processes on
the CPU, where device memory is host memory: onto one device, and onto eight made-up ones with
fsdp=8. "beside" is the peak of resident memory less what was there before and less the parameters;
it must stay below twice the largest tensor of the files and its part on a device. The folder is
removed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
sys.path.insert(0, str(ROOT))  # a clone, not an installed package


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--gib", type=float, default=2.0)
    options.add_argument("--file-dtype", default="bfloat16", choices=("float32", "bfloat16"))
    options.add_argument("--param-dtype", default="float32", choices=("float32", "bfloat16"))
    options.add_argument("--folder", type=Path, default=Path("/tmp/loading"))
    options.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # devices, in a child
    args = options.parse_args()
    if args.measure:
        print(json.dumps(measure(args.folder, args.measure, args.param_dtype)))
        return
    try:
        write(args.folder, args.gib, args.file_dtype)
        print("devices  largest tensor  parameters  peak beside  ratio  seconds")
        for devices in (1, 8):
            found = measured(devices)
            print(
                f"{devices:7}  {found['largest']:10.0f} MiB  {found['params']:6.0f} MiB  "
                f"{found['beside']:7.0f} MiB  {found['beside'] / found['largest']:5.2f}  "
                f"{found['seconds']:7.1f}"
            )
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)


def measured(devices: int) -> dict[str, float]:
    """The figures of a process of its own."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    command = [sys.executable, __file__, *sys.argv[1:], f"--measure={devices}"]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path, devices: int, param_dtype: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from vtriune_jax import models, sharding
    from vtriune_jax.models import files

    mesh = sharding.make_mesh(fsdp=devices)
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.zeros(8)))  # JAX's own start is not counted
    before, began = memory("VmRSS"), time.monotonic()
    model = models.load_pretrained(
        folder,
        param_dtype=param_dtype,
        shardings=lambda path, shape: NamedSharding(mesh, sharding.spec(path, shape, mesh)),
    )
    seconds = time.monotonic() - began
    params = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(models.split(model)[1])
        for shard in leaf.addressable_shards
    )
    largest = max(
        files.DTYPES[tensor.dtype].itemsize * math.prod(tensor.shape)
        for file in folder.glob("*.safetensors")
        for tensor in files.contents(file)
    )
    return {
        "largest": largest / MIB,
        "params": params / MIB,
        "beside": memory("VmHWM") - before - params / MIB,
        "seconds": seconds,
    }


def write(folder: Path, gib: float, dtype: str) -> None:
    """A checkpoint with large matrices in many layers; what is read last is as large as any."""
    import jax
    import jax.numpy as jnp

    from vtriune_jax import models
    from vtriune_jax.models import ModelConfig, TextConfig, VisionConfig, pretrained, weights

    width, mlp, vocab = 4096, 16_384, 4096
    layer = 3 * width * mlp + 2 * width * (width + 512)
    layers = max(1, round(gib * 2**30 / jnp.dtype(dtype).itemsize / layer))
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
    key = jax.random.key(0)
    pretrained.save_params(
        config,
        lambda path: jax.random.normal(key, shapes[path], jnp.bfloat16),
        folder,
        param_dtype=dtype,
        max_shard_bytes=2**29,
    )


def memory(what: str) -> float:
    """MiB of this process, as the kernel counts them."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{what}:\s+(\d+) kB", status)[0]) / 1024


if __name__ == "__main__":
    main()
