"""Segments, causality and padding of the one attention function."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.devices import mesh_of
from vtriune_jax.errors import UserError
from vtriune_jax.models.attention import attention, choose


def random(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def naive(query, key, value, segments, causal, slot=None):
    """Token by token, head by head; tokens of different slots, if not 0, do not see each other."""
    slot = np.zeros(query.shape[1], int) if slot is None else slot
    out = np.zeros(query.shape, np.float32)
    rows, tokens, heads, head_dim = query.shape
    for row, t, head in np.ndindex(rows, tokens, heads):
        seen = [
            s
            for s in range(t + 1 if causal else tokens)
            if segments[row, s] == segments[row, t] != 0 and slot[s] in (0, slot[t])
        ]
        if seen:
            kv_head = head // (heads // key.shape[2])
            scores = key[row, seen, kv_head] @ query[row, t, head] / head_dim**0.5
            weights = np.exp(scores - scores.max())
            out[row, t, head] = weights @ value[row, seen, kv_head] / weights.sum()
    return out


def test_segments_and_grouped_heads():
    segments = np.array([[0, 0, 1, 1, 1, 2, 2], [1, 1, 2, 2, 0, 3, 0]])
    query, key, value = random(2, 7, 4, 8), random(2, 7, 2, 8) + 1, random(2, 7, 2, 8) - 1
    run = jax.jit(attention, static_argnames="causal")
    for causal in (False, True):
        ours = run(query, key, value, jnp.asarray(segments), causal=causal)
        expected = naive(*map(np.asarray, (query, key, value)), segments, causal)
        real = segments != 0
        np.testing.assert_allclose(ours[real], expected[real], atol=1e-6)
        assert np.isfinite(ours).all()


@pytest.mark.parametrize(("n", "size"), [(3, 4), (1, 5), (2, 150)])
def test_slots_see_the_prompt_and_themselves(n, size):
    """(2, 150): more than one block of queries."""
    rng = np.random.default_rng(1)
    tokens = 7 + n * size
    slot = np.concatenate([np.zeros(7, int), np.repeat(np.arange(1, n + 1), size)])
    segments = np.ones((2, tokens), int)
    segments[0, :2] = 0
    segments[1, 7:] = np.concatenate([np.arange(size) < k for k in rng.integers(1, size, n)])
    query, key, value = (
        random(2, tokens, 4, 8),
        random(2, tokens, 2, 8) + 1,
        random(2, tokens, 2, 8),
    )
    run = jax.jit(attention, static_argnames=("causal", "slots"))
    ours = run(query, key, value, jnp.asarray(segments), causal=True, slots=(n, size))
    expected = naive(*map(np.asarray, (query, key, value)), segments, True, slot)
    real = segments != 0
    np.testing.assert_allclose(ours[real], expected[real], atol=1e-6)
    assert np.isfinite(ours).all()


def test_slots_are_causal():
    x, segments = random(1, 5, 2, 4), jnp.ones((1, 5), jnp.int32)
    with pytest.raises(ValueError, match="causal"):
        attention(x, x, x, segments, causal=False, slots=(2, 2))


def test_gradients_are_finite_in_the_padding():
    segments = jnp.asarray([[0, 0, 0, 1, 1]])

    @jax.jit
    @jax.grad
    def gradient(query):
        return attention(query, query, query, segments, causal=True).sum()

    assert np.isfinite(gradient(random(1, 5, 2, 4))).all()


def test_the_kernel_is_that_of_the_devices_to_compile_for():
    assert choose("auto") == choose("xla") == "xla"
    with mesh_of("TPU v5", "tpu"):
        assert [choose(word) for word in ("auto", "splash", "xla")] == ["splash", "splash", "xla"]
    with mesh_of("NVIDIA H100", "cuda"):
        assert choose("auto") == choose("cudnn", "float32") == "cudnn"
        assert choose("triton") == choose("auto", "float32") == choose("auto", head_dim=20)
        assert choose("auto", head_dim=8) == "xla"


@pytest.mark.parametrize(
    ("word", "message"),
    [("splash", "on TPUs only, not on CPUs"), ("triton", "on GPUs only"), ("cudnn", "GPUs only")],
)
def test_a_kernel_that_cannot_run_here_is_refused(word, message):
    query = random(1, 200, 1, 8)
    with pytest.raises(UserError, match=f'model.attention="{word}".*{message}'):
        attention(query, query, query, jnp.ones((1, 200), int), causal=True, kernel=word)


def test_a_program_for_tpus_gets_splash_wherever_it_is_made():
    def loss(query, key):
        segments = jnp.ones((1, 200), jnp.int32)
        with mesh_of("TPU v5", "tpu"):
            return attention(query, key, key, segments, causal=True, slots=(2, 40)).sum()

    shapes = [jax.ShapeDtypeStruct((1, 200, n, 128), jnp.bfloat16) for n in (4, 2)]
    traced = jax.jit(jax.grad(loss)).trace(*shapes)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    kernels = re.findall(r'kernel_name = "splash_mha_([a-z]+)_segmented', text)
    assert sorted(kernels) == ["dkv", "dq", "fwd"]
    assert "200x200" not in text
