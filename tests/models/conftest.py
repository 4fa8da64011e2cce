"""A model small enough to compile in a second or two."""

import pytest

from vtriune_jax import models
from vtriune_jax.models import ModelConfig, TextConfig, VisionConfig


@pytest.fixture(scope="session")
def config():
    return ModelConfig(
        vision=VisionConfig(
            depth=4,
            embed=16,
            mlp=24,
            heads=2,
            out=32,
            full_attention=(1, 3),
            patch_size=2,
            window_size=8,
        ),
        text=TextConfig(
            vocab=40,
            embed=32,
            mlp=48,
            layers=2,
            heads=4,
            kv_heads=2,
            mrope_section=(2, 1, 1),
        ),
        image_token_id=36,
        video_token_id=37,
        vision_start_token_id=38,
        vision_end_token_id=39,
        tied=False,
    )


@pytest.fixture(scope="session")
def model(config):
    return models.init(config, seed=0)
