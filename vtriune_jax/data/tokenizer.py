"""Tokenizer and processor: build small ones from our own texts; load any without torch.

`write_processor` trains a byte-level BPE with Qwen's splitting rule (every digit is a token) and
writes the files of an HF checkpoint folder: tokenizer, chat template, image processor.
`load_processor` reads such a folder, or the hub's, into transformers' Qwen2.5-VL processor without
its video half, which needs torch and torchvision.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtriune_jax.data import prompts, schema
from vtriune_jax.errors import UserError
from vtriune_jax.models.config import PIXEL_MEAN, PIXEL_STD

if TYPE_CHECKING:
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

# In Qwen2.5-VL's order, above the base vocabulary: <|endoftext|> is the first id there.
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEXT_TOKENS = (  # whole tokens that stay in decoded text
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
SYSTEM = "You are a helpful assistant."

# Behaves as Qwen2.5-VL's: a default system turn, text or a list of parts as content, and one
# placeholder per image or video.
CHAT_TEMPLATE = (
    """
{%- macro render(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'video' -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- else -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\n"""
    + SYSTEM
    + """<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' + render(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
)

_IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 28 * 28,
    "max_pixels": 28 * 28 * 1280,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": PIXEL_MEAN,
    "image_std": PIXEL_STD,
}


def write_processor(path: str | os.PathLike[str], texts: Iterable[str], vocab_size: int) -> None:
    """Train a tokenizer of at most `vocab_size` tokens; write a processor folder.

    It learns from `texts` and from what we put around every question (chat roles, reasoning
    instructions). The special tokens are part of `vocab_size`; few texts may yield fewer merges
    than it allows.
    """
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AddedToken
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    specials = (*CONTROL_TOKENS, *TEXT_TOKENS)
    base = vocab_size - len(specials)
    if base < 256:
        raise UserError(
            f"vocab_size={vocab_size} is too small; 256 bytes and {len(specials)} special tokens "
            f"need at least {256 + len(specials)}"
        )
    splitter = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    draft = Tokenizer(models.BPE())
    draft.normalizer, draft.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    draft.train_from_iterator(
        itertools.chain(texts, _prompt_texts()),
        trainers.BpeTrainer(vocab_size=base, initial_alphabet=alphabet, show_progress=False),
    )
    model = json.loads(draft.to_str())["model"]
    settings: dict[str, Any] = {
        "merges": [tuple(pair) for pair in model["merges"]],
        # Named only below: a token named here would be added at once, out of Qwen's order.
        **dict.fromkeys(("unk_token", "eos_token", "pad_token")),
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
    }
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], **settings)
    for token in specials:
        kind = AddedToken(token, special=token in CONTROL_TOKENS, normalized=False)
        tokenizer.add_tokens(kind)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    # By ourselves first: where this raises an OSError, a full disk, `save_pretrained` does not.
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(pretty=True))
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_IMAGE_PROCESSOR, indent=2))


def load_processor(path: str | os.PathLike[str]) -> Qwen2_5_VLProcessor:
    """The processor of a checkpoint folder: ours, the hub's in its older or newer layout, or one
    that `save_pretrained` wrote."""
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = Path(path)
    # The image processor's settings: the first is what transformers 5 saves, the second the hub's.
    settings = ("processor_config.json", "preprocessor_config.json")
    for names in (("tokenizer_config.json",), settings):
        if not any((folder / name).is_file() for name in names):
            raise UserError(
                f"{folder}: {' or '.join(names)} is missing; give a folder of a Qwen2.5-VL "
                "checkpoint with its tokenizer and preprocessor files"
            )
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
        images = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        template = _chat_template(folder) or tokenizer.chat_template
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: processor files cannot be read ({schema.reason(error)}); copy them again"
        ) from error
    if not template:
        raise UserError(
            f"{folder}: no chat template; add chat_template.json or chat_template.jinja"
        )
    return _processor_class()(images, tokenizer, chat_template=template)


def _prompt_texts() -> Iterator[str]:
    """What stands around the questions in every prompt."""
    yield from (f"system\n{SYSTEM}", "user\n", "assistant\n")
    for pool in (prompts.FREE_FORM, prompts.CLOSED_FORM):
        for first in pool.first:
            yield from (f"\n\n{first} {second}" for second in pool.second)


def _chat_template(folder: Path) -> str | dict[str, str] | None:
    """The processor's own template file, which on the hub goes before the tokenizer's."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    if (folder / "chat_template.json").is_file():
        found = json.loads((folder / "chat_template.json").read_text())["chat_template"]
        return found if isinstance(found, str) else {one["name"]: one["template"] for one in found}
    return None


def _processor_class() -> type:
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    class ImageTextProcessor(Qwen2_5_VLProcessor):
        """Qwen2.5-VL's processor without videos."""

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    return ImageTextProcessor
