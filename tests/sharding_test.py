import math
import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec as P

from vtriune_jax import models, sharding
from vtriune_jax.errors import UserError
from vtriune_jax.models import ModelConfig, TextConfig, VisionConfig

EIGHT = types.SimpleNamespace(shape={"data": 2, "fsdp": 2, "tensor": 2})
"""Enough of a mesh for `spec`; meshes of eight devices are in tests/invariants."""


def test_mesh_over_one_device():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": len(jax.devices()), "tensor": 1}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((3, -1, 1), r"data=3 fsdp=-1 tensor=1 does not divide 8 devices.*\[1, 2, 4, 8\]"),
        ((2, 2, 1), "does not divide 8 devices"),
        ((-1, -1, 1), "at most one -1"),
        ((0, 1, 1), "positive"),
    ],
)
def test_mistaken_meshes(sizes, text):
    with pytest.raises(UserError, match=text):
        sharding.make_mesh(*sizes, devices=[jax.devices()[0]] * 8)


def test_specs_of_stacked_layers_and_dimensions_that_do_not_divide():
    path = "language/layers/mlp/gate/kernel"
    assert sharding.spec(path, (28, 64, 128), EIGHT) == P(None, "fsdp", "tensor")
    assert sharding.spec(path, (28, 63, 128), EIGHT) == P(None, None, "tensor")
    assert sharding.spec("language/layers/attn/o/kernel", (4, 8, 8), EIGHT) == P(
        None, "tensor", "fsdp"
    )
    assert sharding.spec("language/norm/scale", (8,), EIGHT) == P(None)
    assert sharding.spec("", (), EIGHT) == P()


VISION = VisionConfig(
    depth=32, embed=1280, mlp=3420, heads=16, out=2048, full_attention=(7, 15, 23, 31)
)
TEXT = TextConfig(
    vocab=151_936,
    embed=2048,
    mlp=11_008,
    layers=36,
    heads=16,
    kv_heads=2,
    mrope_section=(16, 24, 24),
)
SIZES = {
    "3B": (VISION, TEXT),
    "7B": (
        replace(VISION, out=3584),
        replace(TEXT, vocab=152_064, embed=3584, mlp=18_944, layers=28, heads=28, kv_heads=4),
    ),
    "32B": (
        replace(VISION, out=5120, mlp=3456),
        replace(TEXT, vocab=152_064, embed=5120, mlp=27_648, layers=64, heads=40, kv_heads=8),
    ),
    "72B": (
        replace(VISION, out=8192, mlp=3456),
        replace(TEXT, vocab=152_064, embed=8192, mlp=29_568, layers=80, heads=64, kv_heads=8),
    ),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_matches_one_line_and_is_cut_evenly(size, tied):
    vision, text = SIZES[size]
    config = ModelConfig(vision, text, 151_655, 151_656, 151_652, 151_653, tied=tied)
    _, params = models.abstract(config)
    leaves = flatten_dict(params, sep="/")
    total = sum(leaf.size for leaf in leaves.values())
    for sizes in ((2, 16, 1), (1, 8, 2), (1, 4, 4)):
        mesh = types.SimpleNamespace(shape=dict(zip(sharding.AXES, sizes, strict=True)))
        held = 0
        for path, leaf in leaves.items():
            axes = [axis for axis in sharding.spec(path, leaf.shape, mesh) if axis]
            assert len(axes) == len(set(axes))
            held += leaf.size // math.prod(mesh.shape[axis] for axis in axes)
        assert held <= 1.05 * total / (sizes[1] * sizes[2])


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(KeyError, match="matches 0 lines"):
        sharding.rule("language/layers/mlp/novel")


def test_moments_lie_where_their_parameter_lies():
    mesh = sharding.make_mesh()
    params = {"language": {"layers": {"attn": {"q": {"kernel": jnp.ones((2, 4, 4))}}}}}
    places = sharding.shardings(optax.adamw(1.0).init(params), mesh)
    specs = {place.spec for place in jax.tree.leaves(places)}
    assert specs == {P(), P(None, "fsdp", "tensor")}


def test_rows_that_do_not_divide():
    mesh = types.SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 1})
    sharding.check_rows(16, mesh, micro_batches=2)
    with pytest.raises(UserError, match=r"rows=20 .*=2×2×4=16; choose 16 or 32"):
        sharding.check_rows(20, mesh, micro_batches=2)


def test_rows_of_a_batch_go_to_their_devices():
    mesh = sharding.make_mesh()
    placed = sharding.shard_rows({"ids": np.arange(6).reshape(2, 3)}, mesh)
    np.testing.assert_array_equal(placed["ids"], np.arange(6).reshape(2, 3))
    assert placed["ids"].sharding.spec == sharding.ROWS
    np.testing.assert_array_equal(sharding.local_rows(placed, mesh)["ids"], placed["ids"])
