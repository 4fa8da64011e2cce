"""The formula of the model's FLOPs, against the matrix products in the program."""

import jax
import jax.numpy as jnp
import pytest

from vtriune_jax import config as configs
from vtriune_jax import sharding
from vtriune_jax.aot import flops
from vtriune_jax.aot.program import build
from vtriune_jax.errors import UserError
from vtriune_jax.models.kernels import splash, xla
from vtriune_jax.types import Batch

BASE = str(configs.REPOSITORY / "configs" / "orsta_7b.py")


def program(*more):
    overrides = [("batch.micro_batches", "1"), *(word.split("=", 1) for word in more)]
    return build(configs.load(BASE, overrides), sharding.make_mesh())


def test_a_step_without_remat_does_what_the_formula_says_and_the_masked_half_of_attention():
    found = program("model.remat=none", "grpo.prompts=4", "batch.completion_tokens=512")
    model, executed = flops.model_flops(found), flops.executed_flops(found)
    assert flops.tokens(found) == 4 * (2048 + 8 * 512)
    assert 1.0 < executed / model < 1.06


def test_group_rows_save_the_prompts_and_packed_ones_are_counted_as_single_ones():
    """8 · (2048 + 512) tokens of a group become 2048 + 8 · 512, 0.3 of them."""
    short = ("model.remat=none", "grpo.prompts=4", "batch.completion_tokens=512")
    single, packed = (program(*short, f"batch.layout={kind}") for kind in ("single", "packed"))
    grouped = program(*short)
    assert flops.tokens(single) == flops.tokens(packed) == 4 * 8 * 2560
    for count in (flops.model_flops, flops.executed_flops):
        assert count(packed) == pytest.approx(count(single), rel=1e-3)
        assert 0.3 < count(grouped) / count(single) < 0.4


def test_remat_repeats_what_its_word_says():
    words = ("none", "dots", "attention", "full")
    none, *costs = (flops.executed_flops(program(f"model.remat={word}")) for word in words)
    dots, attention, full = (cost / none for cost in costs)
    assert dots == pytest.approx(1, abs=1e-3)  # the scores, which attention itself repeats
    assert 1.15 < attention < full < 4 / 3


def test_frozen_matrices_cost_no_gradient_of_their_own():
    whole, adapters = program("model.remat=none"), program("model.remat=none", "model.lora.rank=8")
    assert flops.model_flops(adapters) / flops.model_flops(whole) == pytest.approx(2 / 3, rel=0.05)
    ratio = flops.executed_flops(adapters) / flops.model_flops(adapters)
    assert 1.0 < ratio < 1.1


def test_a_trained_tower_is_counted():
    short = ("model.remat=none", "grpo.freeze=()", "grpo.prompts=8", "model.path=Qwen2.5-VL-3B")
    found = program(*short)
    assert found.batch.vision is not None
    assert found.batch.features is None
    frozen = program("model.remat=none", "grpo.prompts=8", "model.path=Qwen2.5-VL-3B")
    extra = [cost(found) - cost(frozen) for cost in (flops.model_flops, flops.executed_flops)]
    assert extra[0] > 0
    assert extra[1] / extra[0] == pytest.approx(1, abs=0.15)


def test_every_piece_of_a_step_is_in_the_cost():
    pieces = program("batch.micro_batches=8", "sft.prompts=64")
    assert flops.executed_flops(pieces) == pytest.approx(flops.executed_flops(program()))


def test_a_model_of_unknown_size_is_refused():
    with pytest.raises(UserError, match=r"no folder.*Qwen2\.5-VL"):
        program("model.path=checkpoints/mine")


@pytest.mark.parametrize("slots", [None, (8, 1024)], ids=["causal", "slots"])
def test_of_splash_attention_the_blocks_that_it_visits_are_counted(slots):
    """Its gradient has the two products of the forward pass and seven, XLA's blocks are smaller."""
    n, completion = slots or (1, 1024)
    shapes = {"ids": (2, 1024 + n * completion), "mask": (2, n, completion)}
    of = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    query, key = (
        jax.ShapeDtypeStruct((*shapes["ids"], heads, 128), jnp.bfloat16) for heads in (4, 2)
    )
    batch = Batch(of["ids"], of["ids"], of["ids"], of["ids"], *[of["mask"]] * 3, of["ids"])

    def cost(kernel, transform):
        def attend(query, key, batch):
            out = kernel.attention(query, key, key, batch.ids, causal=True, slots=slots)
            return out.astype(jnp.float32).sum()

        return flops.products(jax.jit(transform(attend)), query, key, batch)

    forward = cost(splash, lambda f: f)
    assert forward == pytest.approx(cost(xla, lambda f: f), rel=0.15)
    assert cost(splash, lambda f: jax.grad(f, (0, 1))) == pytest.approx(4.5 * forward, rel=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_cudnn_is_counted(causal, monkeypatch):
    """Two products forwards, five backwards, half of each if causal."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_000)

    def loss(query, key):
        found = jax.nn.dot_product_attention(
            query, key, key, is_causal=causal, implementation="cudnn"
        )
        return found.astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct((2, 128, n, 64), jnp.bfloat16) for n in (4, 2)]
    product = 2 * 2 * 4 * 64 * 128**2 * (0.5 if causal else 1)
    costs = [_cost(function, shapes) for function in (loss, jax.grad(loss, argnums=(0, 1)))]
    assert costs == [2 * product, 7 * product]


def _cost(function, shapes):
    return flops._products(jax.make_jaxpr(function)(*shapes).jaxpr, None)
