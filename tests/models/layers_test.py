"""The pieces that both towers are made of."""

import jax
import numpy as np
import pytest
from flax import nnx

from vtriune_jax import sharding
from vtriune_jax.models import layers
from vtriune_jax.models.layers import SwiGLU, rotate, through, turns


@pytest.mark.parametrize("bias", [True, False])
def test_zeros_that_align_matrices_on_gpus_change_nothing(bias, monkeypatch):
    """Results and gradients are those without them, and keep their shapes."""
    rng = np.random.default_rng(0)
    graphdef, params = nnx.split(SwiGLU(6, 13, bias=bias))
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), params)
    x = rng.standard_normal((4, 6), np.float32)
    widths = []

    def loss(params, x):
        y = nnx.merge(graphdef, params)(x)
        return (y * y).sum(), y

    def run():
        made = jax.make_jaxpr(loss)(params, x)
        outputs = [v.aval.shape for eqn in made.eqns for v in eqn.outvars]
        widths.append({shape[-1] for shape in outputs if shape})
        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    plain = run()
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    jax.clear_caches()
    aligned = run()
    assert [width for width in (13, 16) if width in widths[0]] == [13]
    assert 16 in widths[1]
    for ours, theirs in zip(jax.tree.leaves(aligned), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_cosine_and_sine_are_computed_once_and_exactly():
    """Storing them on CPUs takes a product, which must not change a bit."""
    rng = np.random.default_rng(0)
    angles = rng.uniform(-1e4, 1e4, (2, 16, 32)).astype(np.float32)
    query, key = (rng.standard_normal((2, 16, heads, 64), np.float32) for heads in (4, 2))

    @jax.jit
    def both(angles, query, key):
        by = turns(angles)
        return by, (rotate(query, by), rotate(key, by))

    by, turned = both(angles, query, key)
    np.testing.assert_array_equal(by.cos, jax.jit(jax.numpy.cos)(angles))
    np.testing.assert_array_equal(by.sin, jax.jit(jax.numpy.sin)(angles))
    cos, sin = np.asarray(by.cos)[:, :, None], np.asarray(by.sin)[:, :, None]
    for x, y in zip((query, key), turned, strict=True):
        first, second = x[..., :32], x[..., 32:]
        expected = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    compiled = both.lower(angles, query, key).compile().as_text()
    assert [compiled.count(f" {op}(") for op in ("cosine", "sine")] == [1, 1]


def test_nothing_is_gathered_where_nothing_is_cut():
    """With devices that share a matrix: tests/invariants."""
    params = {"kernel": np.ones((3, 4, 4), np.float32)}

    def program() -> str:
        def layer(x, params):
            return x @ params["kernel"], None

        def run(x):
            return through(layer, x, params, remat="dots", unroll=False)[0]

        return str(jax.make_jaxpr(run)(np.ones((2, 4), np.float32)))

    assert "sharding_constraint" not in program()
    for mesh, gathers in (((-1, 1, 1), False), ((1, -1, 1), jax.device_count() > 1)):
        with jax.sharding.use_abstract_mesh(sharding.make_mesh(*mesh).abstract_mesh):
            assert ("sharding_constraint" in program()) == gathers
