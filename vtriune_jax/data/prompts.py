"""`Sample` → `Prompt`: chat text, token ids with one placeholder per image unit, M-RoPE positions.

Rows of the math verifier get a reasoning instruction appended (V-Triune's pool of chain-of-thought
prompts): a blank line, a sentence from a first pool, a sentence from a second. Rows that reward the
format ask for `<think>` and `<answer>` tags. The choice depends on (seed, sample, step) alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vtriune_jax.data import images
from vtriune_jax.data.schema import IMAGE
from vtriune_jax.errors import UserError
from vtriune_jax.models.config import ModelConfig
from vtriune_jax.models.layout import image_index, mrope_positions, pack_vision
from vtriune_jax.types import Prompt, Sample

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor


@dataclass(frozen=True)
class CotPool:
    """Reasoning instructions: one of `first`, a space, one of `second`."""

    first: tuple[str, ...]
    second: tuple[str, ...]


FREE_FORM = CotPool(
    first=(
        "Think step by step.",
        "Look closely and reason first.",
        "Work it out before you answer.",
        "Go through the picture in order.",
        "Explain briefly what you see.",
        "Take one step after the other.",
        "First say what you notice.",
        "Reason with care.",
        "Check what is shown, then conclude.",
        "Let your reasoning come first.",
    ),
    second=(
        "Put the answer in \\boxed{}.",
        "End with \\boxed{} around the answer.",
        "The final answer goes in \\boxed{}.",
        "Close with the result in \\boxed{}.",
        "Give the result as \\boxed{}.",
        "Write the answer inside \\boxed{}.",
        "Finish with \\boxed{answer}.",
        "Conclude with \\boxed{answer}.",
        "State the result in \\boxed{}.",
        "Your last line holds \\boxed{}.",
    ),
)
_SKELETON = "\n<think>\n...\n</think>\n<answer>\n\\boxed{}\n</answer>"
CLOSED_FORM = CotPool(
    first=(
        "Think before you answer.",
        "Reason first, then answer.",
        "Work out the answer step by step.",
        "First think, then decide.",
        "Let a thought come before the answer.",
        "Show your thinking, then the answer.",
        "Solve it in small steps.",
        "Think it through.",
        "Look, think, answer.",
        "Derive the answer with care.",
    ),
    second=tuple(
        sentence + _SKELETON
        for sentence in (
            "Use this form:",
            "Keep this layout:",
            "Reply like this:",
            "Follow this pattern:",
            "Write exactly so:",
            "Use these tags:",
            "Stick to these lines:",
            "The form is:",
            "Answer in this shape:",
            "Fill this in:",
        )
    ),
)


class Prompter:
    """Turns samples into prompts with one checkpoint's processor; holds no state but its settings.

    `windows` pads every prompt's vision to that many windows of the ViT (None: as many as it has);
    `cot` switches the reasoning instructions; the pixel limits default to the checkpoint's.
    """

    def __init__(
        self,
        processor: Qwen2_5_VLProcessor,
        config: ModelConfig,
        *,
        windows: int | None = None,
        cot: bool = True,
        seed: int = 0,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ):
        self._processor: Any = processor
        self._tokenizer: Any = processor.tokenizer
        self._config = config
        self._windows = windows
        self._cot = cot
        self._seed = seed
        images.check_settings(processor.image_processor, config.vision)
        low, high = images.pixel_limits(processor.image_processor, min_pixels, max_pixels)
        self._limits = {"min_pixels": low, "max_pixels": high}
        self.pad_id = self._id("<|endoftext|>")
        self.stop_ids = (self._id("<|im_end|>"), self.pad_id)
        self.banned_ids = config.banned_ids
        tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
        for token, expected in zip(tokens, config.banned_ids, strict=True):
            if self._id(token) != expected:
                raise UserError(
                    f"the tokenizer's {token} is {self._id(token)}, the model's is {expected}; "
                    "take tokenizer and model from one checkpoint"
                )

    def __call__(self, sample: Sample, step: int = 0) -> Prompt:
        """The prompt of a sample; `step` varies the reasoning instruction."""
        where = sample.place
        merge = self._processor.image_processor.merge_size
        patches, grid = images.patches(
            sample.images, self._processor.image_processor, where, **self._limits
        )
        units = grid.prod(axis=1) // merge**2
        ids = self._ids(self.text(sample, step), units, where)
        vision, unit_index = pack_vision(patches, grid, self._config, self._windows)
        return Prompt(
            sample=sample,
            ids=ids,
            positions=mrope_positions(ids, grid, self._config),
            image_index=image_index(ids, unit_index, self._config),
            vision=vision,
            grid_thw=grid,
        )

    def text(self, sample: Sample, step: int = 0) -> str:
        """The chat text, with one `<|image_pad|>` per image."""
        return self._processor.apply_chat_template(
            self.chat(sample, step), tokenize=False, add_generation_prompt=True
        )

    def chat(self, sample: Sample, step: int = 0) -> list[dict[str, Any]]:
        """The messages as HF chat templates take them, with the reasoning instruction appended."""
        texts = [message.content for message in sample.messages]
        if self._cot and sample.reward.verifier == "mathverify":
            texts[-1] += "\n\n" + self._instruction(sample, step)
        return [
            {"role": message.role, "content": _parts(text)}
            for message, text in zip(sample.messages, texts, strict=True)
        ]

    def pictures(self, prompt: Prompt) -> list[bytes]:
        """The images of a prompt as PNGs of the size at which the model sees them."""
        processor, sample = self._processor.image_processor, prompt.sample
        side = processor.patch_size
        return [
            images.as_png(data, (int(columns) * side, int(rows) * side), processor, sample.place)
            for data, (_, rows, columns) in zip(sample.images, prompt.grid_thw, strict=True)
        ]

    def encode_completion(self, text: str) -> np.ndarray:
        """Token ids of a completion with the stop token at its end, for supervised fine-tuning."""
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.array([*ids, self.stop_ids[0]], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens, as verifiers read it."""
        # What the tokenizer's own `decode` does, without its 0.2 ms of looking at every id's type.
        return self._tokenizer.backend_tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=True
        )

    def _ids(self, text: str, units: np.ndarray, where: str) -> np.ndarray:
        head, *tails = text.split("<|image_pad|>")
        if len(tails) != len(units):
            raise UserError(
                f"{where}: the text holds {len(tails)} image placeholders for {len(units)} images; "
                f"write {IMAGE} once per image and no <|image_pad|>"
            )
        for count, tail in zip(units, tails, strict=True):
            head += "<|image_pad|>" * int(count) + tail
        return np.array(self._tokenizer(head, add_special_tokens=False)["input_ids"], np.int32)

    def _instruction(self, sample: Sample, step: int) -> str:
        pool = FREE_FORM if sample.reward.format_ratio == 0 else CLOSED_FORM
        key = f"{self._seed}/{step}/{sample.data_source}/{sample.id}".encode()
        first, second = np.frombuffer(hashlib.blake2b(key, digest_size=16).digest(), np.uint64)
        return f"{pool.first[first % len(pool.first)]} {pool.second[second % len(pool.second)]}"

    def _id(self, token: str) -> int:
        added = self._tokenizer.get_added_vocab()
        if token not in added:
            raise UserError(f"the tokenizer has no {token}; use that of a Qwen2.5-VL checkpoint")
        return added[token]


def _parts(text: str) -> str | list[dict[str, str]]:
    """Text split at `<image>` into the parts of a chat template; text alone stays as it is."""
    if IMAGE not in text:
        return text
    head, *tails = text.split(IMAGE)
    parts = [{"type": "text", "text": head}]
    for tail in tails:
        parts += [{"type": "image"}, {"type": "text", "text": tail}]
    return [part for part in parts if part.get("text") != ""]
