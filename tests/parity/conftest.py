"""Tiny random checkpoints made by transformers' torch implementation, the oracle of these tests."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vtriune_jax import models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and transformers warn about their own deprecations
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

VOCAB = 160
IMAGE, VIDEO, START, END = 150, 151, 152, 153
PAD, EOS = 154, 155


@dataclass(frozen=True)
class Oracle:
    """A torch model, the same model as we load it, and the folder both come from."""

    torch_model: Any
    model: models.Qwen2_5_VL
    path: Path

    def inputs(self, rows, padding="right", seed=1):
        """What a processor returns for rows of text with images of the given (t, h, w) grids."""
        rng = np.random.default_rng(seed)
        sequences = []
        for grids in rows:
            ids = rng.integers(0, IMAGE, rng.integers(3, 9)).tolist()
            for grid in grids:
                ids += [START, *[IMAGE] * (math.prod(grid) // 4), END]
                ids += rng.integers(0, IMAGE, rng.integers(1, 5)).tolist()
            sequences.append(ids)
        longest = max(map(len, sequences))
        ids = np.full((len(rows), longest), PAD)
        mask = np.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            start = longest - len(sequence) if padding == "left" else 0
            ids[row, start : start + len(sequence)] = sequence
            mask[row, start : start + len(sequence)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask}
        if grids := [grid for row in rows for grid in row]:
            width = self.model.config.vision.patch
            patches = sum(math.prod(grid) for grid in grids)
            inputs["pixel_values"] = rng.normal(size=(patches, width)).astype(np.float32)
            inputs["image_grid_thw"] = np.array(grids)
        return inputs

    def torch_inputs(self, inputs):
        """The same dict for torch, with the token types that transformers 5 wants."""
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        if "image_grid_thw" in inputs:
            tensors["mm_token_type_ids"] = (tensors["input_ids"] == IMAGE).int()
        return tensors

    def logits(self, inputs, torch_model=None):
        """The oracle's answer."""
        with torch.no_grad():
            return (torch_model or self.torch_model)(**self.torch_inputs(inputs)).logits.numpy()

    def features(self, inputs):
        """The oracle's image features, in the order of the image tokens."""
        patches, grids = (torch.from_numpy(inputs[k]) for k in ("pixel_values", "image_grid_thw"))
        with torch.no_grad():
            return self.torch_model.model.visual(patches, grid_thw=grids).pooler_output.numpy()

    def positions(self, inputs):
        """The oracle's M-RoPE positions [3, batch, tokens]."""
        return self.torch_model.model.get_rope_index(
            **{
                name: value
                for name, value in self.torch_inputs(inputs).items()
                if name != "pixel_values"
            }
        )[0].numpy()

    def generate(self, inputs, tokens):
        """The ids that greedy generation appends to one row, of forced length."""
        tensors = self.torch_inputs(inputs)
        with torch.no_grad():
            out = self.torch_model.generate(
                **tensors, max_new_tokens=tokens, do_sample=False, eos_token_id=None
            )
        return out[0, tensors["input_ids"].shape[1] :].numpy()

    def reload(self, path):
        """A torch model from a folder, complaining about any key that is missing or left over."""
        model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        assert not any(loading.values()), loading
        return model.eval()


def text_config(**changes):
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
        },
        "bos_token_id": PAD,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **changes,
    }


def vision_config(**changes):
    return {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
        **changes,
    }


VARIANTS = {
    "tied": ({}, {}, True),
    "untied": (
        {
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "hidden_size": 96,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [4, 2, 2],
            },
        },
        # No period: windowed, full, full, windowed, windowed.
        {
            "depth": 5,
            "fullatt_block_indexes": [1, 2],
            "window_size": 16,
            "num_heads": 2,
            "hidden_size": 40,
            "out_hidden_size": 96,
        },
        False,
    ),
    # As many key heads as query heads, windows only; its greedy text does not fall into a rut.
    "talkative": (
        {"num_key_value_heads": 4},
        {"depth": 2, "fullatt_block_indexes": []},
        False,
    ),
}


def hf_config(variant):
    text, vision, tied = VARIANTS[variant]
    return Qwen2_5_VLConfig(
        text_config=text_config(**text),
        vision_config=vision_config(**vision),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )


def build(variant, path, scale=3):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Qwen2_5_VLForConditionalGeneration(hf_config(variant)).float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # unit norms and zero biases would hide a missed one
                    parameter.add_(0.1 * torch.randn_like(parameter))
                else:
                    parameter.mul_(scale)  # sharper attention and logits than the default 0.02
                assert parameter.abs().max() > 0, name
        model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=None)
        model.save_pretrained(path)
    return Oracle(model, models.load_pretrained(path), path)


@pytest.fixture(scope="session", params=["tied", "untied"])
def oracle(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def talkative(tmp_path_factory):
    return build("talkative", tmp_path_factory.mktemp("talkative"), scale=6)
