"""The published sizes against transformers' own model, built without memory for its weights."""

import copy
import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtriune_jax import models
from vtriune_jax.errors import UserError
from vtriune_jax.models import ModelConfig, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and transformers warn about their own deprecations
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

PARAMETERS = {  # transformers' count, the tied head once
    "3B": 3_754_622_976,
    "7B": 8_292_166_656,
    "32B": 33_452_718_336,
    "72B": 73_410_777_344,
}


def hub_file(embed, mlp, layers, heads, kv_heads, vocab, vision_mlp, tied):
    """The flat config.json of the hub."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": embed,
        "initializer_range": 0.02,
        "intermediate_size": mlp,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": vision_mlp,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": embed,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocab,
    }


SHORT = {
    "hidden_size": 1280,
    "in_chans": 3,
    "model_type": "qwen2_5_vl",
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
}
"""The `vision_config` of 7B by transformers 4.49: no key that is equal to the class's default."""

VISION_32B = {"vision_config": SHORT | {"intermediate_size": 3456, "out_hidden_size": 5120}}

HUB = {
    "3B": hub_file(2048, 11008, 36, 16, 2, 151936, 3420, True),
    "7B": hub_file(3584, 18944, 28, 28, 4, 152064, 3420, False),
    "32B": hub_file(5120, 27648, 64, 40, 8, 152064, 3456, False) | VISION_32B,
    "72B": hub_file(8192, 29568, 80, 64, 8, 152064, 3456, False),
}


def file_shape(entry, shape, vision):
    """The shape that a tensor of ours has in a checkpoint file."""
    own = shape if entry.layer is None else shape[1:]
    if entry.transform == "same":
        return own
    if entry.transform == "transpose":
        return own[::-1]
    patch = (vision.channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    assert entry.transform == "flatten"
    assert own == (math.prod(patch), vision.embed)
    return (vision.embed, *patch)


@pytest.mark.parametrize("size", HUB)
def test_every_tensor_has_transformers_name_and_shape(size):
    config = models.named(size)
    _, params = models.abstract(config)
    shapes = {path: leaf.shape for path, leaf in weights.flatten(params).items()}
    ours = {
        entry.key: file_shape(entry, shapes[entry.path], config.vision)
        for entry in weights.entries(shapes)
    }
    with torch.device("meta"):
        oracle = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**HUB[size]))
    theirs = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tuple(
            parameter.shape
        )
        for name, parameter in oracle.named_parameters()  # a tied head is not listed twice
    }
    assert ours == theirs
    assert config.tied == ("lm_head.weight" not in theirs)
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count == PARAMETERS[size] == sum(p.numel() for p in oracle.parameters())


@pytest.mark.parametrize("size", HUB)
def test_the_hubs_file_and_transformers_5s_both_give_the_named_size(size):
    config = models.named(size)
    assert ModelConfig.from_hf(HUB[size]) == config
    assert ModelConfig.from_hf(Qwen2_5_VLConfig(**HUB[size])) == config
    assert ModelConfig.from_hf(config.to_hf_dict()) == config


def test_a_file_by_transformers_4_49():
    rope = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    hf = HUB["7B"] | {"vision_config": SHORT, "rope_scaling": rope}
    assert ModelConfig.from_hf(hf) == models.named("7B")


TOKENS = {"image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"}
TOP = {"model_type", "vision_config", *TOKENS}
SIZES = {"vocab_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
DISPENSABLE = HUB["7B"].keys() - (TOP - TOKENS) - SIZES - {"hidden_size", "rope_scaling"}
UNLIKE_DEFAULTS = {"rope_theta": 1e4, "bos_token_id": 1, "eos_token_id": [2, 3]}


@given(
    st.sampled_from(["3B", "7B", "72B"]),
    st.sets(st.sampled_from(sorted(DISPENSABLE))),
    st.sets(st.sampled_from(sorted(HUB["7B"]["vision_config"]))),
    st.booleans(),
)
def test_absent_keys_are_as_transformers_has_them(size, absent, absent_of_vision, nested):
    hf = {k: v for k, v in (HUB[size] | UNLIKE_DEFAULTS).items() if k not in absent}
    hf["vision_config"] = {
        k: v for k, v in hf["vision_config"].items() if k not in absent_of_vision
    }
    if nested:
        text = {key: hf.pop(key) for key in hf.keys() - TOP}
        hf["text_config"] = text
    theirs = Qwen2_5_VLConfig(**copy.deepcopy(hf))  # which changes what it is given
    assert read_or_complaint(hf) == read_or_complaint(theirs)


def read_or_complaint(hf):
    try:
        return ModelConfig.from_hf(hf)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("layers", "kept"), [([1, 3, 31], (1,)), (None, ()), ([-1, 0], (0,))])
def test_full_attention_layers_beyond_the_depth_are_none(layers, kept):
    """As in transformers, where a shallow tower has the deep one's by default."""
    vision = HUB["7B"]["vision_config"] | {"depth": 2, "fullatt_block_indexes": layers}
    hf = HUB["7B"] | {"vision_config": {k: v for k, v in vision.items() if v is not None}}
    assert ModelConfig.from_hf(hf).vision.full_attention == kept


def test_rope_is_where_transformers_4_57_and_5_look(caplog):
    hf = models.named("7B").to_hf_dict()
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24]}
    assert hf["text_config"]["rope_scaling"] == rope
    assert hf["text_config"]["rope_theta"] == 1e6
    read = Qwen2_5_VLConfig(**copy.deepcopy(hf)).text_config
    assert read.rope_parameters == {**rope, "rope_theta": 1e6}
    assert not caplog.records  # nor a warning
    del hf["text_config"]["rope_scaling"], hf["text_config"]["rope_theta"]
    assert read.to_dict() == Qwen2_5_VLConfig(**hf).text_config.to_dict()


def test_knobs_and_unknown_names():
    assert models.named("7B", dtype="bfloat16", remat="full").dtype == "bfloat16"
    with pytest.raises(UserError, match="of size '14B'; choose one of 3B, 7B, 32B, 72B"):
        models.named("14B")
