"""The compiled vision tower: no layer holds a [patches, patches] array."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from vtriune_jax import models
from vtriune_jax.models.kernels.xla import BLOCKS
from vtriune_jax.types import Vision

pytestmark = pytest.mark.usefixtures("optimised")

# 64 slots in a window, as in the real tower. So many windows that the square of their slots is
# larger than all that the layers together keep for the gradient.
ROWS, WINDOWS, SLOTS, HEADS = 2, 50, 64, 2
TOKENS = WINDOWS * SLOTS
WINDOW_SCORES = (ROWS * WINDOWS, HEADS, SLOTS, SLOTS)


def compiled(config, full_attention, gradient):
    """The optimised HLO of a tower of 8 layers, or of its gradient."""
    vision = replace(config.vision, depth=8, full_attention=full_attention, window_size=16)
    assert (vision.slots, vision.heads) == (SLOTS, HEADS)
    graphdef, params = models.abstract(replace(config, vision=vision))
    inputs = Vision(
        patches=jax.ShapeDtypeStruct((ROWS, WINDOWS, SLOTS, vision.patch), jnp.float32),
        positions=jax.ShapeDtypeStruct((ROWS, WINDOWS, SLOTS, 2), jnp.int32),
        segments=jax.ShapeDtypeStruct((ROWS, WINDOWS, SLOTS), jnp.int32),
    )

    def squared(params, vision):
        return jnp.square(models.encode(graphdef, params, vision)).sum()

    if gradient:
        lowered = jax.jit(jax.grad(squared)).lower(params, inputs)
    else:
        lowered = models.encode.lower(graphdef, params, inputs)
    return lowered.compile().as_text()


def shapes(text):
    """All array shapes in HLO."""
    dims = re.findall(r"\b\w+\[(\d+(?:,\d+)*)\]", text)
    return {tuple(map(int, each.split(","))) for each in dims}


def looks_over_the_row(shape):
    """Whether the array pairs all patches of a row with all, in one way or another."""
    return shape.count(TOKENS) > 1 or math.prod(shape) >= TOKENS**2


@pytest.mark.parametrize("gradient", [False, True], ids=["encode", "gradient"])
@pytest.mark.parametrize("full_attention", [(), (3, 7)], ids=["windowed", "with full layers"])
def test_no_layer_has_one(config, full_attention, gradient):
    everything = shapes(compiled(config, full_attention, gradient))
    assert WINDOW_SCORES in everything
    assert not list(filter(looks_over_the_row, everything))
    blocks = {shape for shape in everything if shape[-2:] == (TOKENS // BLOCKS, TOKENS)}
    assert bool(blocks) == bool(full_attention)  # a full layer takes its queries in blocks
