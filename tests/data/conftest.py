import io

import numpy as np
import pytest
from PIL import Image

from vtriune_jax.data import digits
from vtriune_jax.data.tokenizer import load_processor, write_processor
from vtriune_jax.models.config import ModelConfig, TextConfig, VisionConfig
from vtriune_jax.types import Message, RewardConfig, Sample


def png(width=56, height=56, seed=0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_sample(text="<image>How many?", images=None, verifier="mathverify", **changes) -> Sample:
    reward = RewardConfig(verifier, "\\boxed{4}", answer="4", format_ratio=0.5)
    fields = {
        "data_source": "toy",
        "id": "7",
        "images": (png(),) if images is None else tuple(images),
        "messages": (Message("user", text),),
        "reward": reward,
        "ability": "math",
        "demonstration": "It is \\boxed{4}",
    }
    return Sample(**(fields | changes))


@pytest.fixture(scope="session")
def processor_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    write_processor(folder, digits.texts(), 1000)
    return folder


@pytest.fixture(scope="session")
def processor(processor_folder):
    return load_processor(processor_folder)


@pytest.fixture(scope="session")
def model_config(processor):
    token = processor.tokenizer.convert_tokens_to_ids
    return ModelConfig(
        vision=VisionConfig(depth=1, embed=32, mlp=64, heads=2, out=32, full_attention=(0,)),
        text=TextConfig(
            vocab=len(processor.tokenizer),
            embed=32,
            mlp=64,
            layers=1,
            heads=2,
            kv_heads=1,
            mrope_section=(2, 3, 3),
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tied=True,
    )
