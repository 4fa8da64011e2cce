"""Every way to compute attention gives what XLA's gives: forward, gradients, padding, slots."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.devices import mesh_of
from vtriune_jax.models.attention import attention
from vtriune_jax.models.kernels import cudnn, splash, triton, xla
from vtriune_jax.models.kernels.slots import attend_apart

TOKENS = 200  # two blocks of 128, the second one not full
LANGUAGE = {"heads": (4, 2), "head_dim": 128, "causal": True}
VISION = {"heads": (2, 2), "head_dim": 80, "causal": False}
SLOTS = (3, 36)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def packed():
    """Rows with padding on both sides, with three segments, and of nothing but padding."""
    segments = np.zeros((3, TOKENS), np.int32)
    segments[0, 30:170] = 1
    segments[1] = np.repeat([1, 2, 3], [50, 70, 80])
    return jnp.asarray(segments)


def single():
    """One sequence a row, with padding before, behind and inside; and nothing but padding."""
    segments = np.ones((3, TOKENS), np.int32)
    segments[0, :30] = segments[0, 170:] = segments[1, 60:75] = segments[2] = 0
    return jnp.asarray(segments)


def make(attention, *, heads, head_dim, causal, **options):
    """A function from segments to the result and the gradients of the inputs.

    The loss weighs no padding.
    """
    rng = np.random.default_rng(0)
    query_heads, kv_heads = heads
    *inputs, weights = (
        jnp.asarray(rng.normal(size=(3, TOKENS, n, head_dim)), jnp.float32)
        for n in (query_heads, kv_heads, kv_heads, query_heads)
    )

    def loss(inputs, segments):
        out = attention(*inputs, segments, causal=causal, **options)
        return (out * weights * (segments != 0)[:, :, None, None]).sum(), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)

    def result(segments):
        (_, out), gradients = run(inputs, segments)
        return out, gradients

    return result


def assert_same(found, expected, segments):
    real = np.asarray(segments) != 0
    np.testing.assert_allclose(found[0][real], expected[0][real], atol=1e-5)
    assert np.isfinite(found[0]).all()
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("shape", [LANGUAGE, VISION], ids=["language", "vision"])
@pytest.mark.parametrize("kernel", [splash, triton], ids=["splash", "triton"])
def test_pallas_kernels_give_what_xla_gives(kernel, shape):
    found = make(kernel.attention, interpret=True, **shape)(packed())
    assert_same(found, make(xla.attention, **shape)(packed()), packed())


def test_splash_knows_slots():
    options = LANGUAGE | {"slots": SLOTS}
    found = make(splash.attention, interpret=True, **options)(packed())
    assert_same(found, make(xla.attention, **options)(packed()), packed())


def test_kernels_without_slots_get_them_as_rows():
    def apart(*args, causal):
        return attend_apart(lambda *each: xla.attention(*each, causal=causal), *args, SLOTS)

    expected = make(xla.attention, slots=SLOTS, **LANGUAGE)(packed())
    assert_same(make(apart, **LANGUAGE)(packed()), expected, packed())


@pytest.mark.parametrize("slots", [None, (1, 60), SLOTS])
def test_cudnn_gets_single_sequences_and_triton_the_rest(slots):
    # The same calls as on a GPU, but for who computes them.
    packed_way = partial(triton.attention, interpret=True)
    options = LANGUAGE | {"slots": slots}
    run = make(cudnn.attention, implementation="xla", packed=packed_way, **options)
    expected = make(xla.attention, **LANGUAGE, slots=None if slots == (1, 60) else slots)
    for segments in (single(), packed())[: 1 if slots else 2]:
        assert_same(run(segments), expected(segments), segments)


@pytest.mark.parametrize("slots", [None, (1, 60)])
def test_cudnn_is_asked_for_causality_and_lengths_and_for_no_mask(monkeypatch, slots):
    asked = []

    def called(query, key, value, **options):
        asked.append(options)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", called)
    query = jnp.zeros((3, TOKENS, 2, 64), jnp.bfloat16)
    interpreted = partial(triton.attention, interpret=True)
    run = partial(cudnn.attention, causal=True, slots=slots, packed=interpreted)
    traced = jax.make_jaxpr(run)(query, query, query, single())
    (options,) = asked
    assert options.keys() == {
        "is_causal",
        "query_seq_lengths",
        "key_value_seq_lengths",
        "implementation",
    }
    assert options["implementation"] == "cudnn"
    assert ("cond" in str(traced)) == (slots is None)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_the_triton_kernel_is_lowered_for_gpus():
    def loss(query, key):
        segments = jnp.ones((1, TOKENS), jnp.int32)
        with mesh_of("NVIDIA H100", "cuda"):
            return attention(query, key, key, segments, causal=True, kernel="triton").sum()

    shapes = [jax.ShapeDtypeStruct((1, TOKENS, n, 128), jnp.bfloat16) for n in (4, 2)]
    traced = jax.jit(jax.grad(loss)).trace(*shapes)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = set(re.findall(r'name = "(mha_\w+)"', text))
    assert kernels == {"mha_forward", "mha_preprocess_backward", "mha_backward"}
    assert f"{TOKENS}x{TOKENS}" not in text
