"""What the tests of weight sync share."""

import time

from vtriune_jax.export import PROCESSOR_FILES
from vtriune_jax.models import weights
from vtriune_jax.rollout.publish import Publisher

UPDATE = "/update_weights_from_disk"


def until(true, seconds=20.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)


def publisher_of(served, folder, **changes):
    extras = [served.folder / name for name in PROCESSOR_FILES]
    return Publisher(
        folder,
        served.config,
        reference=served.folder,
        dtype="float32",
        extras=[file for file in extras if file.exists()],
        **changes,
    )


def moved(params, by, only=""):
    flat = weights.flatten(params)
    return weights.unflatten(
        {
            path: leaf * (1 + by) if path.startswith(only) and leaf.ndim > 1 else leaf
            for path, leaf in flat.items()
        }
    )
