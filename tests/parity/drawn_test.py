"""Random models and inputs against transformers: positions, features, logits.

One for each kind of input, and twenty that get all kinds; `-m slow` draws forty more of those.
"""

import numpy as np
import pytest

from tests.parity.drawn import KINDS, draw_oracle, draw_rows
from vtriune_jax import models
from vtriune_jax.models import layout

TOLERANCE = 2e-4
CASES = [
    *enumerate(KINDS),
    *((number, "all") for number in range(8, 28)),
    *(pytest.param(number, "all", marks=pytest.mark.slow) for number in range(28, 68)),
]


@pytest.mark.parametrize(("number", "kind"), CASES)
def test_drawn(number, kind, tmp_path):
    oracle = draw_oracle(number, tmp_path)
    inputs = oracle.inputs(draw_rows(number, kind), ("left", "right")[number % 2], seed=number)
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
