"""The model without an oracle: packing, padding, text only, remat, precision, names, shapes."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax import models
from vtriune_jax.errors import UserError
from vtriune_jax.models import layout, vision, weights
from vtriune_jax.models.config import PIXEL_MEAN, PIXEL_STD

GRIDS = np.array([[1, 4, 6], [1, 2, 2]])


@pytest.fixture(scope="module")
def inputs(config):
    """One row with two images, as the model's own arguments."""
    rng = np.random.default_rng(0)
    ids = np.array([5, 38, *[36] * 6, 39, 7, 38, 36, 39, 8, 9], np.int32)
    patches = rng.normal(size=(28, config.vision.patch))
    row, unit_index = layout.pack_vision(patches, GRIDS, config)
    return {
        "ids": ids,
        "positions": layout.mrope_positions(ids, GRIDS, config),
        "vision": layout.stack_visions([row], windows=7),
        "image_index": layout.image_index(ids, unit_index, config),
    }


def run(model, rows, vision):
    """Hidden states of rows of (ids, positions, segments, image_index)."""
    graphdef, params = models.split(model)
    columns = [np.stack(column).astype(np.int32) for column in zip(*rows, strict=True)]
    return hidden_states(graphdef, params, vision, *columns)


@partial(jax.jit, static_argnums=0)
def hidden_states(graphdef, params, vision, ids, positions, segments, image_index):
    model = models.merge(graphdef, params)
    return model(ids, positions, segments, model.encode(vision), image_index)


def test_pixels_are_normalised_on_the_device(model, inputs):
    graphdef, params = models.split(model)
    shape = inputs["vision"].patches.shape
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    channels = pixels.reshape(*shape[:-1], 3, -1) / 255
    mean, std = (np.array(v)[:, None] for v in (PIXEL_MEAN, PIXEL_STD))
    floats = ((channels - mean) / std).reshape(shape).astype(np.float32)
    raw, normalised = (replace(inputs["vision"], patches=p) for p in (pixels, floats))
    features = models.encode(graphdef, params, raw)
    expected = models.encode(graphdef, params, normalised)
    np.testing.assert_allclose(features, expected, atol=1e-5, rtol=1e-5)


def test_packing_and_padding_change_nothing(model, inputs):
    ids, positions, index = inputs["ids"], inputs["positions"], inputs["image_index"]
    text = np.array([1, 2, 3], np.int32)
    text_positions = np.tile(np.arange(3, dtype=np.int32), (3, 1))

    def pad(array, before, value=0):
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [before], constant_values=value)

    alone = (
        pad(ids, (5, 0)),
        pad(positions, (5, 0)),
        pad(1 + 0 * ids, (5, 0)),
        pad(index, (5, 0), -1),
    )
    packed = (
        pad(np.concatenate([text, ids]), (0, 2)),
        pad(np.concatenate([text_positions, positions], axis=1), (0, 2)),
        pad(np.array([1] * 3 + [2] * len(ids)), (0, 2)),
        pad(np.concatenate([[-1] * 3, index]), (0, 2), -1),
    )
    both = jax.tree.map(lambda a: np.concatenate([a, a]), inputs["vision"])
    hidden = run(model, [alone, packed], both)
    assert np.isfinite(hidden).all()
    np.testing.assert_allclose(hidden[0, 5:], hidden[1, 3 : 3 + len(ids)], atol=1e-5)


def test_text_only(model, config):
    rows = [(np.array([1, 2, 3]), np.tile(np.arange(3), (3, 1)), np.ones(3, int), np.full(3, -1))]
    empty = np.zeros((0, config.vision.patch))
    nothing = layout.stack_visions([layout.pack_vision(empty, GRIDS[:0], config)[0]], windows=0)
    padding = layout.stack_visions([layout.pack_vision(empty, GRIDS[:0], config)[0]], windows=2)
    without, padded = run(model, rows, nothing), run(model, rows, padding)
    assert np.isfinite(padded).all()
    np.testing.assert_array_equal(without, padded)
    graphdef, params = models.split(model)
    columns = (jnp.asarray(column)[None] for column in rows[0][:3])
    alone = jax.jit(lambda params: models.merge(graphdef, params)(*columns))(params)
    np.testing.assert_allclose(alone, without, atol=1e-6)


def test_remat_and_unroll_change_nothing_and_every_parameter_learns(config, model, inputs):
    def value_and_grad(remat, unroll=False):
        graphdef, _ = models.abstract(replace(config, remat=remat, unroll=unroll))

        @jax.jit
        @jax.value_and_grad
        def loss(params):
            model = models.merge(graphdef, params)
            columns = ("ids", "positions", "image_index")
            ids, positions, index = (jnp.asarray(inputs[name])[None] for name in columns)
            features = model.encode(inputs["vision"])
            hidden = model(ids, positions, jnp.ones_like(ids), features, index)
            return jnp.mean(jax.nn.logsumexp(5 * hidden @ model.head(), axis=-1))

        compiled = loss.lower(models.split(model)[1]).compile()
        memory[remat, unroll] = compiled.memory_analysis().temp_size_in_bytes
        loops[remat, unroll] = compiled.as_text().count(" while(")
        return compiled(models.split(model)[1])

    memory, loops = {}, {}
    plain = value_and_grad("none")
    for how in (("dots", False), ("full", False), ("none", True), ("dots", True), ("full", True)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), plain, value_and_grad(*how)
        )
    assert memory["full", False] < memory["dots", False] < memory["none", False]
    assert loops["dots", True] < loops["dots", False]
    for path, gradient in weights.flatten(plain[1]).items():
        assert np.abs(gradient).max() > 0, path


def test_bfloat16_stays_close(config, model, inputs):
    graphdef, _ = models.abstract(replace(config, dtype="bfloat16"))
    half = models.merge(graphdef, models.split(model)[1])
    row = [(inputs["ids"], inputs["positions"], np.ones(15, int), inputs["image_index"])]
    exact, rough = run(model, row, inputs["vision"]), run(half, row, inputs["vision"])
    assert rough.dtype == jnp.bfloat16
    assert 0 < np.abs(exact - rough.astype(jnp.float32)).max() < 0.1


@pytest.mark.parametrize(
    ("depth", "full", "expected"),
    [
        (32, (7, 15, 23, 31), (4, ((False, 7), (True, 1)))),
        (4, (), (4, ((False, 1),))),
        (3, (1,), (1, ((False, 1), (True, 1), (False, 1)))),
    ],
)
def test_runs_of_equal_layers(config, depth, full, expected):
    changed = replace(config.vision, depth=depth, full_attention=full)
    assert vision.attention_runs(changed) == expected


def test_init_depends_on_the_seed_alone(config, model):
    params, again = models.split(model)[1], models.split(models.init(config, seed=0))[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)
    for path, value in weights.flatten(params).items():
        name = path.rsplit("/", 1)[1]
        if name in ("kernel", "embedding"):
            width = value.shape[-1 if name == "embedding" else -2]
            assert 0.85 < value.std() * width**0.5 < 1.15, path
        else:
            assert (value == (name == "scale")).all(), path
    first, second = params["language"]["layers"]["mlp"]["up"]["kernel"]
    assert not np.allclose(first, second)


def test_every_parameter_has_one_line_in_the_weights_table(config, model):
    for tied in (False, True):
        _, shapes = models.abstract(replace(config, tied=tied))
        for path in weights.flatten(shapes):
            assert sum(bool(re.fullmatch(line[0], path)) for line in weights.TABLE) == 1, path


def test_forward_names_the_mismatch(model, config):
    inputs = {
        "input_ids": [[1, 36, 36]],
        "pixel_values": np.zeros((4, config.vision.patch)),
        "image_grid_thw": [[1, 2, 2]],
    }
    with pytest.raises(UserError, match="2 image tokens but 1 image features"):
        models.forward(model, inputs)
    with pytest.raises(UserError, match="1 image tokens but 0 image features"):
        models.forward(model, {"input_ids": [[1, 36, 3]]})


def test_forward_takes_videos_in_the_order_of_the_prompt(model, config):
    """A video before an image is not the same as the image before the video."""
    rng = np.random.default_rng(0)
    inputs = {
        "pixel_values": rng.normal(size=(4, config.vision.patch)),
        "image_grid_thw": [[1, 2, 2]],
        "pixel_values_videos": rng.normal(size=(8, config.vision.patch)),
        "video_grid_thw": [[2, 2, 2]],
        "second_per_grid_ts": [0.5],
    }
    first = models.forward(model, {"input_ids": [[1, 37, 37, 2, 36, 3]], **inputs})
    second = models.forward(model, {"input_ids": [[1, 36, 2, 37, 37, 3]], **inputs})
    assert np.isfinite(first).all()
    np.testing.assert_allclose(first[0, 0], second[0, 0], atol=1e-5)
    assert np.abs(first[0, 1] - second[0, 1]).max() > 0.01

    for changes, message in (
        ({"input_ids": [[1, 37, 36, 3]]}, "1 video tokens but 2 video features"),
        ({"input_ids": [[1, 37, 36, 37, 3]]}, "not all in one run of one row"),
        (
            {"input_ids": [[1, 37, 2, 36], [37, 2, 3, 4]]},
            "2 tokens of an image or video are not one run",
        ),
        (
            {"input_ids": [[1, 37, 37, 36]], "second_per_grid_ts": [0.5, 1.0]},
            "second_per_grid_ts has 2 entries for 1 videos",
        ),
    ):
        with pytest.raises(UserError, match=message):
            models.forward(model, inputs | changes)
