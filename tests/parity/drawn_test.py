"""Random models and inputs against transformers: positions, features, logits.

Twenty in the default run; `-m slow` draws eighty more.
"""

import numpy as np
import pytest

from tests.parity.drawn import KINDS, draw_oracle, draw_rows
from vtriune_jax import models
from vtriune_jax.models import layout

TOLERANCE = 2e-4
NUMBERS = [*range(20), *(pytest.param(n, marks=pytest.mark.slow) for n in range(20, 100))]


@pytest.mark.parametrize("number", NUMBERS)
def test_drawn(number, tmp_path):
    oracle, kind = draw_oracle(number, tmp_path), KINDS[number % len(KINDS)]
    padding = ("left", "right")[number // len(KINDS) % 2]
    inputs = oracle.inputs(draw_rows(number, kind), padding, seed=number)
    assert_same_positions(oracle, inputs)
    if kind != "text":
        assert_same_features(oracle, inputs)
    real = inputs["attention_mask"].astype(bool)
    expected = oracle.logits(inputs)[real]
    assert np.abs(expected).max() > 0.5
    logits = models.forward(oracle.model, inputs)[real]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def assert_same_positions(oracle, inputs):
    """Positions and where a completion goes on, which transformers tells by `rope_deltas`."""
    config = oracle.model.config
    expected, deltas = oracle.positions(inputs)
    images = iter(inputs.get("image_grid_thw", ()))
    videos = iter(inputs.get("video_grid_thw", ()))
    all_seconds = iter(inputs.get("second_per_grid_ts", ()))
    for row, ids in enumerate(inputs["input_ids"]):
        real = inputs["attention_mask"][row].astype(bool)
        # A picture's first token is the one after <|vision_start|>.
        kinds = ids[1:][ids[:-1] == config.vision_start_token_id]
        grids = [next(videos if kind == config.video_token_id else images) for kind in kinds]
        seconds = [next(all_seconds) for kind in kinds if kind == config.video_token_id]
        ours = layout.mrope_positions(ids[real], np.array(grids), config, seconds)
        np.testing.assert_array_equal(ours, expected[:, row, real])
        assert ours.max() + 1 - real.sum() == deltas[row]


def assert_same_features(oracle, inputs):
    names = ("pixel_values", "pixel_values_videos"), ("image_grid_thw", "video_grid_thw")
    patches, grids = (np.concatenate([inputs[k] for k in keys if k in inputs]) for keys in names)
    vision, unit_index = layout.pack_vision(patches, grids, oracle.model.config)
    graphdef, params = models.split(oracle.model)
    stacked = layout.stack_visions([vision], windows=len(vision.segments) + 1)
    features = models.encode(graphdef, params, stacked)[0, unit_index]
    expected = oracle.features(inputs)
    assert expected.std() > 0.05
    np.testing.assert_allclose(features, expected, rtol=0, atol=TOLERANCE)
