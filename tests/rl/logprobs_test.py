import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.rl.logprobs import token_logps

ROWS, TOKENS, EMBED, VOCAB = 3, 7, 5, 11
BANNED = (2, 9)


def inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (ROWS, TOKENS, EMBED))
    head = jax.random.normal(keys[1], (EMBED, VOCAB))
    targets = jax.random.choice(keys[2], jnp.array([0, 1, 3, 10]), (ROWS, TOKENS))
    weights = jax.random.normal(keys[3], (ROWS, TOKENS))
    return hidden, head, targets, weights


def dense(hidden, head, targets, temperature, banned):
    logits = (hidden @ head / temperature).at[..., jnp.array(banned, int)].set(-jnp.inf)
    logps = jax.nn.log_softmax(logits)
    entropy = -jnp.where(jnp.isfinite(logps), jnp.exp(logps) * logps, 0.0).sum(-1)
    return jnp.take_along_axis(logps, targets[..., None], -1)[..., 0], entropy


@pytest.mark.parametrize("max_logits", [2**27, 3 * ROWS * VOCAB, 1], ids=["whole", "3", "1"])
@pytest.mark.parametrize(("temperature", "banned"), [(1.0, ()), (0.7, BANNED)])
def test_equals_dense_values_and_gradients(max_logits, temperature, banned):
    hidden, head, targets, weights = inputs()

    def ours(hidden, head):
        logps, entropy = token_logps(
            hidden,
            head,
            targets,
            temperature=temperature,
            banned_ids=banned,
            max_logits=max_logits,
        )
        return (weights * logps).sum(), (logps, entropy)

    def reference(hidden, head):
        logps, entropy = dense(hidden, head, targets, temperature, banned)
        return (weights * logps).sum(), (logps, entropy)

    (_, got), got_grads = jax.value_and_grad(ours, (0, 1), has_aux=True)(hidden, head)
    (_, want), want_grads = jax.value_and_grad(reference, (0, 1), has_aux=True)(hidden, head)
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_no_array_of_all_logits_when_chunked(optimised):
    hidden, head, targets, _ = inputs()

    def loss(hidden, head):
        return token_logps(hidden, head, targets, max_logits=2 * ROWS * VOCAB)[0].sum()

    text = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, head).compile().as_text()
    assert f"f32[{ROWS},2,{VOCAB}]" in text
    assert f"{TOKENS},{VOCAB}]" not in text
    assert f"[4,{ROWS},2,{VOCAB}]" not in text


def test_the_entropy_has_no_gradient():
    hidden, head, targets, _ = inputs()
    grad = jax.grad(lambda h: token_logps(h, head, targets)[1].sum())(hidden)
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize("max_logits", [2**27, 1], ids=["whole", "1"])
def test_an_entropy_bonus_has_the_dense_gradient(max_logits):
    hidden, head, targets, weights = inputs()
    options = {"temperature": 0.7, "banned_ids": BANNED, "max_logits": max_logits}

    def ours(hidden, head):
        entropy = token_logps(hidden, head, targets, entropy_gradient=True, **options)[1]
        return (weights * entropy).sum()

    def reference(hidden, head):
        logits = (hidden @ head / 0.7)[..., [k for k in range(VOCAB) if k not in BANNED]]
        logps = jax.nn.log_softmax(logits)
        return (weights * -(jnp.exp(logps) * logps).sum(-1)).sum()

    got, want = (jax.grad(f, (0, 1))(hidden, head) for f in (ours, reference))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5)


def test_a_banned_target_gets_zero_and_no_gradient():
    hidden, head, targets, _ = inputs()
    targets = targets.at[1, 3].set(BANNED[0])

    def loss(hidden):
        return token_logps(hidden, head, targets, banned_ids=BANNED)[0]

    assert loss(hidden)[1, 3] == 0.0
    grad = jax.grad(lambda h: loss(h).sum())(hidden)
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grad[1, 3], 0.0)


def test_bfloat16_states_give_float32_logits_and_a_head_gradient_in_its_own_type():
    hidden, head, targets, _ = inputs()
    half = hidden.astype(jnp.bfloat16)
    logps, entropy = token_logps(half, head, targets)
    assert logps.dtype == entropy.dtype == jnp.float32
    grad = jax.grad(lambda w: token_logps(half, w, targets, max_logits=1)[0].sum())(head)
    assert grad.dtype == jnp.float32
    want, _ = dense(half.astype(jnp.float32), head, targets, 1.0, ())
    np.testing.assert_allclose(logps, want, atol=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_bfloat16_states_run_on_cpus(optimised, tied):
    hidden, head, targets, weights = inputs()

    def loss(matrix, dtype):
        logps, _ = token_logps(hidden.astype(dtype), matrix.T if tied else matrix, targets)
        return (logps * weights).sum()

    matrix = head.T if tied else head
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    half, full = (gradient(matrix, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    np.testing.assert_allclose(half, full, atol=0.03)


def test_far_apart_logits_stay_finite():
    hidden, head, targets, _ = inputs()
    logps, entropy = token_logps(hidden * 1e4, head, targets, banned_ids=BANNED)
    assert np.isfinite(logps).all()
    np.testing.assert_allclose(entropy, 0.0, atol=1e-2)
