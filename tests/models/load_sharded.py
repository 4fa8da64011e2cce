"""Loads a checkpoint onto eight made-up devices; prints what was read and how, as JSON."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding

from vtriune_jax import models, sharding
from vtriune_jax.models import files, weights


def main(folder: Path) -> None:
    read, parts = files.read, []

    def note(tensor, index):
        part = read(tensor, index)
        parts.append((tensor.key, part.size / np.prod(tensor.shape)))
        return part

    files.read = note
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    model = models.load_pretrained(
        folder, shardings=lambda path, shape: NamedSharding(mesh, sharding.spec(path, shape, mesh))
    )
    placed = models.split(model)[1]
    files.read = read
    plain = models.split(models.load_pretrained(folder))[1]
    jax.tree.map(np.testing.assert_array_equal, placed, plain)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == sharding.shardings(placed, mesh)
    cut = {
        path: len({str(shard.index) for shard in leaf.addressable_shards})
        for path, leaf in weights.flatten(placed).items()
    }
    print(json.dumps({"parts": parts, "cut": cut}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
