"""Checkpoints that several parity tests share."""

import pytest

from tests.parity.oracle import build, hf_config, text_config, vision_config

VARIANTS = {
    "tied": (text_config(), vision_config(), True),
    "untied": (
        text_config(
            num_attention_heads=6,
            num_key_value_heads=1,
            hidden_size=96,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 2, 2],
            },
        ),
        # No period: windowed, full, full, windowed, windowed.
        vision_config(
            depth=5,
            fullatt_block_indexes=[1, 2],
            window_size=16,
            num_heads=2,
            hidden_size=40,
            out_hidden_size=96,
        ),
        False,
    ),
}
# As many key heads as query heads, windows only; its greedy text does not fall into a rut.
TALKATIVE = (
    text_config(num_key_value_heads=4),
    vision_config(depth=2, fullatt_block_indexes=[]),
    False,
)


@pytest.fixture(scope="session", params=["tied", "untied"])
def oracle(request, tmp_path_factory):
    return build(hf_config(*VARIANTS[request.param]), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def talkative(tmp_path_factory):
    return build(hf_config(*TALKATIVE), tmp_path_factory.mktemp("talkative"), scale=6)
