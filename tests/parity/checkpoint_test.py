"""Checkpoints: what transformers writes we read in all its layouts, and the other way round."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vtriune_jax import models

IMAGES = [((1, 4, 6), (1, 6, 2))]


def assert_same_params(one, other):
    jax.tree.map(np.testing.assert_array_equal, models.split(one)[1], models.split(other)[1])


@pytest.mark.parametrize("max_shard_bytes", [2**40, 40_000])
def test_transformers_reads_what_we_write(oracle, tmp_path, max_shard_bytes):
    models.save_pretrained(oracle.model, tmp_path, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_bytes == 2**40)
    inputs = oracle.inputs(IMAGES)
    np.testing.assert_array_equal(
        oracle.logits(inputs, oracle.reload(tmp_path)), oracle.logits(inputs)
    )
    again = models.load_pretrained(tmp_path)
    assert again.config == oracle.model.config
    assert_same_params(again, oracle.model)


def test_transformers_reads_what_we_write_in_bfloat16(oracle, tmp_path):
    models.save_pretrained(oracle.model, tmp_path, param_dtype="bfloat16")
    theirs = dict(oracle.reload(tmp_path).named_parameters())
    for name, value in oracle.torch_model.named_parameters():
        assert theirs[name].equal(value.bfloat16().float()), name


def test_transformers_5_key_names(oracle, tmp_path):
    tensors = {}
    for key, value in load_file(oracle.path / "model.safetensors").items():
        if key.startswith("visual."):
            key = f"model.{key}"
        elif key.startswith("model."):
            key = key.replace("model.", "model.language_model.", 1)
        tensors[key] = value
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(oracle.path / "config.json", tmp_path)
    assert_same_params(models.load_pretrained(tmp_path), oracle.model)


def test_the_hubs_flat_config(oracle):
    nested = json.loads((oracle.path / "config.json").read_text())
    text, vision = nested.pop("text_config"), nested.pop("vision_config")
    rope = text.pop("rope_parameters")
    vision.pop("rope_parameters")
    vision["in_chans"] = vision.pop("in_channels")
    flat = (
        text
        | nested
        | {
            "vision_config": vision,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        }
    )
    assert models.ModelConfig.from_hf(flat) == oracle.model.config


def test_config_objects_are_read_too(oracle):
    assert models.ModelConfig.from_hf(oracle.torch_model.config) == oracle.model.config
