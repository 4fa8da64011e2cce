"""The pieces that both towers are made of."""

import jax
import numpy as np
import pytest
from flax import nnx

from vtriune_jax.models import layers
from vtriune_jax.models.layers import SwiGLU


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
