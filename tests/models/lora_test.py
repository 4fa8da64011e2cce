"""Adapters: which matrices get them, what they compute, and the ordinary model they become."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from vtriune_jax import models, sharding
from vtriune_jax.errors import UserError
from vtriune_jax.models import LoRAConfig, layers, lora, weights
from vtriune_jax.optim import decayed

ALL = ("attn/k", "attn/o", "attn/q", "attn/v", "mlp/down", "mlp/gate", "mlp/up")
LORA = LoRAConfig(rank=4, alpha=8.0, target="attn/[qo]|mlp/(gate|down)")


def flat(tree):
    return weights.flatten(tree)


def matrices(config):
    """The matrices of a layer that have an adapter."""
    found = {path for path in flat(models.abstract(config)[1]) if lora.is_adapter(path)}
    names = {path.removeprefix("language/layers/").rpartition("/lora/")[0] for path in found}
    assert found == {f"language/layers/{name}/lora/{part}" for name in names for part in "ab"}
    return sorted(names)


def shaken(params, seed=0):
    """With adapters that do something."""
    rng = np.random.default_rng(seed)
    return weights.unflatten(
        {
            path: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32)
            if lora.is_adapter(path)
            else leaf
            for path, leaf in flat(params).items()
        }
    )


@pytest.fixture(scope="module")
def adapted(config):
    """(config, graphdef, params) of a model whose adapters do something."""
    config = replace(config, lora=LORA)
    graphdef, params = models.split(models.init(config, seed=0))
    return config, graphdef, shaken(params)


def inputs():
    ids = np.random.default_rng(0).integers(0, 36, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(graphdef, params):
    real = inputs()["attention_mask"].astype(bool)
    return np.asarray(models.forward(models.merge(graphdef, params), inputs()))[real]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (".", ALL),
        ("attn/", ALL[:4]),
        ("attn/[qv]$", ("attn/q", "attn/v")),
        ("mlp/(gate|up)", ("mlp/gate", "mlp/up")),
    ],
)
def test_the_target_selects_matrices(config, target, expected):
    assert matrices(replace(config, lora=LoRAConfig(2, 4.0, target))) == list(expected)


@pytest.mark.parametrize(
    ("rank", "alpha", "target", "message"),
    [
        (2, 4.0, "attn/w", r"'attn/w' matches no matrix .* they are attn/k, .*, mlp/up"),
        (2, 4.0, "attn/(", r"model.lora.target='attn/\(' is not a regular expression"),
        (0, 4.0, ".", "rank=0 .* must be above 0"),
        (2, 0.0, ".", "alpha=0.0 must be above 0"),
    ],
)
def test_what_cannot_be_adapted(config, rank, alpha, target, message):
    with pytest.raises(UserError, match=message):
        models.abstract(replace(config, lora=LoRAConfig(rank, alpha, target)))


def test_a_new_model_is_its_base(config, model):
    fresh = models.init(replace(config, lora=LORA), seed=0)
    ours, base = (flat(models.split(each)[1]) for each in (fresh, model))
    for path, leaf in base.items():
        np.testing.assert_array_equal(ours.pop(path), leaf)
    assert len(ours) == 8
    for path, leaf in ours.items():
        if path.endswith("/b"):
            assert not leaf.any()
        else:  # every layer has its own, and so has every matrix
            bound = leaf.shape[1] ** -0.5
            assert 0.8 * bound < np.abs(leaf).max() <= bound
            assert not np.array_equal(leaf[0], leaf[1])
    q, gate = (ours[f"language/layers/{name}/lora/a"] for name in ("attn/q", "mlp/gate"))
    assert not np.array_equal(q, gate)
    np.testing.assert_array_equal(models.forward(fresh, inputs()), models.forward(model, inputs()))


def test_a_checkpoint_folder_gets_new_adapters(config, model, tmp_path):
    models.save_pretrained(model, tmp_path)
    base = flat(models.split(model)[1])
    mesh = sharding.make_mesh()

    def place(path, shape):
        return NamedSharding(mesh, sharding.spec(path, shape, mesh))

    loaded = models.load_pretrained(
        tmp_path, param_dtype="bfloat16", shardings=place, lora=LORA, seed=3
    )
    assert loaded.config.lora == LORA
    expected = flat(models.split(models.init(replace(config, lora=LORA), seed=3))[1])
    for path, leaf in flat(models.split(loaded)[1]).items():
        assert leaf.sharding == place(path, leaf.shape)
        if lora.is_adapter(path):
            assert leaf.dtype == jnp.float32
            np.testing.assert_array_equal(leaf, expected[path])
        else:
            np.testing.assert_array_equal(leaf, base[path].astype(jnp.bfloat16))
    other = flat(models.split(models.load_pretrained(tmp_path, lora=LORA, seed=4))[1])
    path = "language/layers/attn/q/lora/a"
    assert not np.array_equal(other[path], expected[path])


def test_the_formula():
    """y = x W + b + (alpha / rank) (x A) B, the one that PEFT computes."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (6, 5), "bias": (5,), "a": (6, 3), "b": (3, 5)}
    kernel, bias, a, b = (rng.normal(size=shape).astype(np.float32) for shape in shapes.values())
    linear = layers.Linear(6, 5, bias=True)
    linear.lora = lora.Adapter(6, 5, LoRAConfig(rank=3, alpha=12.0))
    linear.kernel[...], linear.bias[...] = kernel, bias
    linear.lora.a[...], linear.lora.b[...] = a, b
    x = rng.normal(size=(2, 4, 6)).astype(np.float32)
    expected = x @ kernel + bias + 4.0 * (x @ a @ b)
    np.testing.assert_allclose(linear(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    assert linear(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_merged_is_the_same_ordinary_model(config, model, adapted):
    own, graphdef, params = adapted
    merged = models.merge_lora(params, own)
    base_graphdef, base = models.split(model)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    moved = {path for path, leaf in flat(merged).items() if (leaf != flat(base)[path]).any()}
    assert moved == {
        f"language/layers/{name}/kernel" for name in ("attn/q", "attn/o", "mlp/gate", "mlp/down")
    }
    a, b = (params["language"]["layers"]["attn"]["q"]["lora"][part] for part in "ab")
    np.testing.assert_allclose(
        merged["language"]["layers"]["attn"]["q"]["kernel"],
        base["language"]["layers"]["attn"]["q"]["kernel"] + 2.0 * np.einsum("lir,lro->lio", a, b),
        atol=1e-6,
    )
    with_adapters, without = logits(graphdef, params), logits(base_graphdef, merged)
    assert np.abs(with_adapters - logits(base_graphdef, base)).max() > 0.1
    np.testing.assert_allclose(with_adapters, without, rtol=0, atol=2e-5)
    assert models.merge_lora(base, config).keys() == base.keys()


def test_layers_for_decoding_are_merged(model, adapted):
    own, graphdef, params = adapted
    ours = models.merge(graphdef, params).language.apart()
    merged = models.merge(models.split(model)[0], models.merge_lora(params, own)).language.apart()
    for one, other in zip(ours, merged, strict=True):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
            *(nnx.split(each)[1] for each in (one, other)),
        )


def test_gradients_are_those_of_the_matrices_in_two_factors(model, adapted):
    """dA = s · dW Bᵀ and dB = s · Aᵀ dW, where dW is the gradient of the merged matrix."""
    own, graphdef, params = adapted
    base_graphdef, _ = models.split(model)
    ids = jnp.asarray(inputs()["input_ids"])
    positions = jnp.broadcast_to(jnp.arange(9), (2, 3, 9))
    aim = jax.random.normal(jax.random.key(0), (2, 9, own.text.embed))

    def loss(params, graphdef):
        hidden = models.merge(graphdef, params)(ids, positions, jnp.ones_like(ids))
        return (hidden * aim).sum()

    ours = flat(jax.grad(loss)(params, graphdef))
    whole = flat(jax.grad(loss)(models.merge_lora(params, own), base_graphdef))
    factors = flat(params)
    for path, gradient in ours.items():
        matrix, _, part = path.rpartition("/lora/")
        if not matrix:
            continue
        a, b = factors[f"{matrix}/lora/a"], factors[f"{matrix}/lora/b"]
        kernel = whole[f"{matrix}/kernel"]
        spec, pair = ("lio,lro->lir", (kernel, b)) if part == "a" else ("lir,lio->lro", (a, kernel))
        expected = own.lora.scale * np.einsum(spec, *pair)
        np.testing.assert_allclose(
            gradient, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
        )


def test_saved_is_merged(adapted, tmp_path):
    own, graphdef, params = adapted
    models.save_pretrained(models.merge(graphdef, params), tmp_path)
    loaded = models.load_pretrained(tmp_path)
    assert loaded.config.lora is None
    expected = models.merge_lora(params, own)
    jax.tree.map(np.testing.assert_array_equal, models.split(loaded)[1], expected)


def test_a_bfloat16_base_is_merged_in_float32(adapted):
    own, _, params = adapted
    params = jax.tree.map(lambda leaf: leaf, params)
    q = params["language"]["layers"]["attn"]["q"]
    q["kernel"] = q["kernel"].astype(jnp.bfloat16)
    merged = models.merge_lora(params, own)["language"]["layers"]["attn"]["q"]["kernel"]
    product = np.einsum("lir,lro->lio", q["lora"]["a"], q["lora"]["b"])
    expected = q["kernel"].astype(jnp.float32) + own.lora.scale * product
    np.testing.assert_allclose(merged, expected, atol=1e-6)


def test_what_a_checkpoint_keeps(adapted, model):
    _, _, params = adapted
    kept = lora.kept(params)
    assert len(flat(kept)) == 8
    assert all(map(lora.is_adapter, flat(kept)))
    moved = lora.put_back(params, jax.tree.map(lambda leaf: leaf + 1, kept))
    for path, leaf in flat(moved).items():
        np.testing.assert_array_equal(leaf, flat(params)[path] + lora.is_adapter(path))
    _, base = models.split(model)
    assert flat(lora.kept(base)).keys() == flat(base).keys()


@pytest.mark.parametrize("size", ["3B", "7B", "32B", "72B"])
def test_adapters_are_in_the_tables_of_sharding_and_weight_decay(size):
    config = replace(models.named(size), lora=LoRAConfig(16, 32.0))
    params = models.abstract(config)[1]
    adapters = {path: leaf for path, leaf in flat(params).items() if lora.is_adapter(path)}
    assert len(adapters) == 2 * len(ALL)
    assert all(flat(decayed(params))[path] for path in adapters)
    for path in adapters:
        matrix, _, part = path.rpartition("/lora/")
        across, along = sharding.rule(f"{matrix}/kernel")
        assert sharding.rule(path) == ((across, None) if part == "a" else (None, along))
