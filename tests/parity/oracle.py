"""Tiny random checkpoints by transformers' torch implementation, the oracle of these tests."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vtriune_jax import models
from vtriune_jax.models import layout
from vtriune_jax.types import Prompt, RewardConfig, Sample

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch and transformers warn about their own deprecations
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

VOCAB = 160
IMAGE, VIDEO, START, END = 150, 151, 152, 153
PAD, EOS = 154, 155


class Video(NamedTuple):
    """Frames, rows and columns of patches, and the seconds that one of the frames lasts."""

    frames: int
    rows: int
    columns: int
    seconds: float


@dataclass(frozen=True)
class Oracle:
    """A torch model, the same model as we load it, and the folder both come from."""

    torch_model: Any
    model: models.Qwen2_5_VL
    path: Path

    def inputs(self, rows, padding="right", seed=1):
        """What a processor returns for rows of text with images, (t, h, w) grids, and videos."""
        rng = np.random.default_rng(seed)
        sequences = []
        for media in rows:
            ids = rng.integers(0, IMAGE, rng.integers(3, 9)).tolist()
            for one in media:
                pad = VIDEO if isinstance(one, Video) else IMAGE
                ids += [START, *[pad] * (math.prod(one[:3]) // 4), END]
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

        def pixels(grids):
            patches = sum(math.prod(grid) for grid in grids)
            return rng.normal(size=(patches, self.model.config.vision.patch)).astype(np.float32)

        media = [one for row in rows for one in row]
        if images := [one for one in media if not isinstance(one, Video)]:
            inputs |= {"pixel_values": pixels(images), "image_grid_thw": np.array(images)}
        if videos := [one for one in media if isinstance(one, Video)]:
            grids = np.array([video[:3] for video in videos])
            inputs |= {"pixel_values_videos": pixels(grids), "video_grid_thw": grids}
            seconds = [video.seconds for video in videos]
            inputs["second_per_grid_ts"] = np.array(seconds, np.float32)
        return inputs

    def torch_inputs(self, inputs):
        """The same dict for torch, with the token types that transformers 5 wants."""
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()}
        if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
            ids = tensors["input_ids"]
            tensors["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        return tensors

    def logits(self, inputs, torch_model=None):
        """The oracle's answer."""
        with torch.no_grad():
            return (torch_model or self.torch_model)(**self.torch_inputs(inputs)).logits.numpy()

    def features(self, inputs):
        """The oracle's features of all images, then of all videos."""
        both = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
        with torch.no_grad():
            return np.concatenate(
                [
                    self.torch_model.model.visual(
                        torch.from_numpy(inputs[patches]), grid_thw=torch.from_numpy(inputs[grids])
                    ).pooler_output.numpy()
                    for patches, grids in both
                    if grids in inputs
                ]
            )

    def positions(self, inputs):
        """The oracle's M-RoPE positions [3, batch, tokens] and rope deltas [batch]."""
        tensors = self.torch_inputs(inputs)
        wanted = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw")
        positions, deltas = self.torch_model.model.get_rope_index(
            mm_token_type_ids=tensors.get(
                "mm_token_type_ids", torch.zeros_like(tensors["input_ids"])
            ),
            second_per_grid_ts=tensors.get("second_per_grid_ts"),
            **{name: tensors[name] for name in wanted if name in tensors},
        )
        return positions.numpy(), deltas[:, 0].numpy()

    def generate(self, inputs, tokens, **how):
        """The ids that greedy generation appends to one row, of forced length."""
        tensors = self.torch_inputs(inputs)
        with torch.no_grad():
            out = self.torch_model.generate(
                **tensors, max_new_tokens=tokens, do_sample=False, eos_token_id=None, **how
            )
        return out[0, tensors["input_ids"].shape[1] :].numpy()

    def reload(self, path):
        """A torch model from a folder, complaining about any key that is missing or left over."""
        model, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True
        )
        assert not any(loading.values()), loading
        return model.eval()


def as_prompt(inputs, media, config):
    """One row's inputs, made of these images and videos, as the prompt pipeline would give them."""
    ids = inputs["input_ids"][0].astype(np.int32)
    left = {
        False: inputs.get("pixel_values", ()),
        True: inputs.get("pixel_values_videos", ()),
    }
    patches = [np.zeros((0, config.vision.patch), np.float32)]
    for one in media:
        kind, count = isinstance(one, Video), math.prod(one[:3])
        patches.append(left[kind][:count])
        left[kind] = left[kind][count:]
    grids = np.array([one[:3] for one in media], int).reshape(-1, 3)
    seconds = [one.seconds for one in media if isinstance(one, Video)]
    vision, unit_index = layout.pack_vision(np.concatenate(patches), grids, config)
    return Prompt(
        sample=Sample("test", "0", (), (), RewardConfig("none", "")),
        ids=ids,
        positions=layout.mrope_positions(ids, grids, config, seconds),
        image_index=layout.image_index(ids, unit_index, config),
        vision=vision,
        grid_thw=grids,
    )


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


def hf_config(text, vision, tied):
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )


def build(config, path, scale=3, seed=0):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
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
