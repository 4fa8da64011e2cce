"""The compiled vision tower: only a full-attention layer may hold a [patches, patches] array."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from vtriune_jax import models
from vtriune_jax.types import Vision

# 64 slots in a window, as in the real tower. So many windows that the square of their slots is
# larger than all that the layers together keep for the gradient.
ROWS, WINDOWS, SLOTS, HEADS = 2, 50, 64, 2
TOKENS = WINDOWS * SLOTS
WINDOW_SCORES = (ROWS * WINDOWS, HEADS, SLOTS, SLOTS)


def compiled(config, full_attention, gradient):
    """The optimised HLO of a tower of 8 layers, or of its gradient, as {computation: text}."""
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
    start = r"^(?:ENTRY )?%([\w.\-]+) \("
    _, *pieces = re.split(start, lowered.compile().as_text(), flags=re.MULTILINE)
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def shapes(text):
    """All array shapes in a piece of HLO."""
    dims = re.findall(r"\b\w+\[(\d+(?:,\d+)*)\]", text)
    return {tuple(map(int, each.split(","))) for each in dims}


def looks_over_the_row(shape):
    """Whether the array pairs all patches of a row with all, in one way or another."""
    return shape.count(TOKENS) > 1 or math.prod(shape) >= TOKENS**2


def with_callees(name, computations):
    """The text of a computation and of all that it calls."""
    seen, todo = set(), [name]
    while todo:
        if (one := todo.pop()) not in seen:
            seen.add(one)
            mentioned = re.findall(r"%([\w.\-]+)", computations[one])
            todo += [other for other in mentioned if other in computations]
    return "\n".join(computations[one] for one in seen)


@pytest.mark.parametrize("gradient", [False, True], ids=["encode", "gradient"])
def test_a_windowed_tower_has_none(config, gradient):
    everything = shapes("\n".join(compiled(config, (), gradient).values()))
    assert WINDOW_SCORES in everything
    assert not list(filter(looks_over_the_row, everything))


def test_windowed_layers_beside_full_ones_have_none(config):
    computations = compiled(config, (3, 7), gradient=False)
    loops = re.findall(r"body=%([\w.\-]+)", "\n".join(computations.values()))
    windowed = [name for name in loops if WINDOW_SCORES in shapes(computations[name])]
    assert windowed  # the loops over three windowed layers each
    for name in windowed:
        assert not list(filter(looks_over_the_row, shapes(with_callees(name, computations))))
    assert (ROWS, HEADS, TOKENS, TOKENS) in shapes("\n".join(computations.values()))
