"""The model against transformers: logits, image features, positions."""

import numpy as np
import pytest

from vtriune_jax import models
from vtriune_jax.models import layout
from vtriune_jax.models.config import PIXEL_MEAN, PIXEL_STD

pytestmark = pytest.mark.usefixtures("optimised")

TOLERANCE = 2e-4

BATCH = [((1, 6, 10),), (), ((1, 8, 8), (1, 18, 10)), ((2, 4, 6), (1, 2, 2))]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_batch(oracle, padding):
    """Text, one image, two images of different sizes (no multiple of the window), frames."""
    assert_same_logits(oracle, oracle.inputs(BATCH, padding))


@pytest.mark.parametrize("images", BATCH[:3], ids=["one image", "text", "two images"])
def test_one_row(talkative, images):
    """Unpadded, text without the image keys."""
    assert_same_logits(talkative, talkative.inputs([images]))


def test_none_is_like_absent(oracle):
    inputs = oracle.inputs(BATCH[1:2])
    nothing = dict.fromkeys(("pixel_values", "image_grid_thw", "second_per_grid_ts"))
    found = models.forward(oracle.model, nothing | inputs)
    np.testing.assert_array_equal(found, models.forward(oracle.model, inputs))


def test_pixels_that_are_not_normalised(oracle):
    inputs = oracle.inputs(BATCH[:1])
    shape = inputs["pixel_values"].shape
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    mean, std = (np.array(values)[:, None] for values in (PIXEL_MEAN, PIXEL_STD))
    channels = (pixels.reshape(len(pixels), 3, -1) / 255 - mean) / std
    expected = oracle.logits(inputs | {"pixel_values": channels.reshape(shape).astype(np.float32)})
    got = models.forward(oracle.model, inputs | {"pixel_values": pixels})
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def assert_same_logits(oracle, inputs):
    real = inputs["attention_mask"].astype(bool)
    expected = oracle.logits(inputs)[real]
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(
        models.forward(oracle.model, inputs)[real], expected, rtol=0, atol=TOLERANCE
    )


def test_features(oracle):
    inputs = oracle.inputs(BATCH[2:])
    vision, unit_index = layout.pack_vision(
        inputs["pixel_values"], inputs["image_grid_thw"], oracle.model.config
    )
    graphdef, params = models.split(oracle.model)
    stacked = layout.stack_visions([vision], windows=len(vision.segments) + 3)
    features = models.encode(graphdef, params, stacked)[0, unit_index]
    expected = oracle.features(inputs)
    assert expected.std() > 0.1
    np.testing.assert_allclose(features, expected, rtol=0, atol=TOLERANCE)
