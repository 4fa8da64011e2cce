"""The torch side of benchmarks/update.py: a GRPO update as TRL makes it, in plain transformers.

    python benchmarks/update_torch.py FOLDER CASE

Forward with the logits of completions only, clipped loss, backward, clip of the norm, fused AdamW.
A prompt that n completions share is repeated n times, and so is its image.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # torch and transformers warn about their own deprecations

import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from update_work import CLIP, RATE, arrays, serve


def main(folder: Path, case: str) -> None:
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    ).train()
    batch = {name: torch.from_numpy(array) for name, array in arrays(folder, case).items()}
    inputs, completions = inputs_of(model, batch)
    old, advantages = batch["old_logps"].flatten(0, 1), batch["advantages"].flatten()[:, None]
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=0.0, fused=True)

    def step() -> dict[str, float]:
        loss = policy_loss(log_probs(model, inputs, completions), old, advantages)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item(), "grad_norm": norm.item()}

    serve(step)


def inputs_of(model: Any, batch: dict[str, torch.Tensor]) -> tuple[dict[str, Any], torch.Tensor]:
    """What the model is called with, and the completions, a row for each."""
    n = batch["completion_ids"].shape[1]
    completions = batch["completion_ids"].flatten(0, 1)
    ids = torch.cat([batch["prompt_ids"].repeat_interleave(n, 0), completions], 1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        "pixel_values": batch["pixel_values"].repeat_interleave(n, 0).flatten(0, 1),
        "image_grid_thw": batch["image_grid_thw"].repeat_interleave(n, 0),
    }
    # Positions come from loops in Python; TRL's forward has them in every step, here they are free.
    positions, _ = model.model.get_rope_index(
        ids,
        inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    return inputs | {"position_ids": positions}, completions


def log_probs(model: Any, inputs: dict[str, Any], completions: torch.Tensor) -> torch.Tensor:
    """Of the tokens of completions, at the end of each row."""
    out = model(**inputs, logits_to_keep=completions.shape[1] + 1, use_cache=False)
    return out.logits[:, :-1].log_softmax(-1).gather(-1, completions[..., None])[..., 0]


def policy_loss(logps: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The clipped loss of GRPO, a mean over all tokens."""
    ratio = torch.exp(logps - old)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
