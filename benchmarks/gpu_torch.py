"""The torch side of benchmarks/gpu.py, in plain transformers as TRL uses it.

    python benchmarks/gpu_torch.py FOLDER SIZE STEPS CASE…

Makes the checkpoint of random weights too, and the old log-probs of the batches that it trains on.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")  # torch and transformers warn about their own deprecations

import numpy as np
import torch
from gpu_work import SIZES, Work, measured
from transformers import AutoConfig, GenerationConfig, Qwen2_5_VLForConditionalGeneration
from update_torch import inputs_of, log_probs, policy_loss
from update_work import RATE, arrays, say

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(folder: Path, size: str, steps: int, cases: list[str]) -> None:
    work = SIZES[size]
    model = fresh(folder)
    if "sample" in cases:  # first, while the parameters are bfloat16
        sample(model, folder, work, steps)
    model.float().train()
    if work.freeze:
        model.model.visual.requires_grad_(False)
    if work.checkpointing:
        model.gradient_checkpointing_enable()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=0.0, fused=DEVICE == "cuda")
    for case in ("separate", "shared"):
        if case in cases:
            update(model, optimizer, params, folder, case, work, steps)


def fresh(folder: Path) -> Any:
    """The model of the folder's `config.json`, random weights, written down as bfloat16."""
    config = AutoConfig.from_pretrained(folder, attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen2_5_VLForConditionalGeneration(config)
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(torch.bfloat16).save_pretrained(folder)
    for name, buffer in model.named_buffers():  # of the rotary embeddings; `to` has rounded them
        buffer.data = frequencies[name]
    return model


def update(
    model: Any,
    optimizer: Any,
    params: list[Any],
    folder: Path,
    case: str,
    work: Work,
    steps: int,
) -> None:
    """GRPO updates, the gradient gathered over parts of the batch."""
    data = arrays(folder, case)
    batch = {name: torch.from_numpy(array).to(DEVICE) for name, array in data.items()}
    inputs, completions = inputs_of(model, batch)
    advantages = batch["advantages"].flatten()[:, None]
    patches = len(inputs["pixel_values"]) // len(completions)

    def part(start: int, end: int) -> dict[str, Any]:
        own = {name: array[start:end] for name, array in inputs.items() if name != "position_ids"}
        own["pixel_values"] = inputs["pixel_values"][start * patches : end * patches]
        return own | {"position_ids": inputs["position_ids"][:, start:end]}

    def parts(at_once: int) -> list[tuple[int, int]]:
        return [(start, start + at_once) for start in range(0, len(completions), at_once)]

    def logps(start: int, end: int) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return log_probs(model, part(start, end), completions[start:end])

    with torch.no_grad():
        old = torch.cat([logps(*ends) for ends in parts(work.at_once)]).float()
    noise = 0.1 * np.random.default_rng(1).standard_normal(data["old_logps"].shape)
    old += torch.from_numpy(noise.astype(np.float32)).to(DEVICE).flatten(0, 1)
    np.savez(
        folder / f"{case}.npz",
        **data | {"old_logps": old.cpu().numpy().reshape(data["old_logps"].shape)},
    )
    at_once = work.at_once

    def step() -> dict[str, float]:
        total = 0.0
        for start, end in parts(at_once):
            share = (end - start) / len(completions)
            mean = policy_loss(logps(start, end), old[start:end], advantages[start:end])
            (share * mean).backward()
            total += share * mean.detach()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": float(total), "grad_norm": norm.item()}

    while True:
        try:
            say(case=case, **measured(step, steps), **peak(), at_once=at_once)
            return
        except torch.OutOfMemoryError:
            if at_once == 1:
                raise
            at_once //= 2
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()


def sample(model: Any, folder: Path, work: Work, steps: int) -> None:
    """`new_tokens` for each prompt, drawn from the whole distribution."""
    data = arrays(folder, "separate")
    batch = {name: torch.from_numpy(data[name][: work.prompts]).to(DEVICE) for name in data}
    inputs, _ = inputs_of(model, batch | {"completion_ids": batch["completion_ids"][:, :, :0]})
    del inputs["position_ids"]
    pad = model.config.text_config.pad_token_id or 0
    model.eval()
    model.generation_config = GenerationConfig(
        **dict(pad_token_id=pad, eos_token_id=None, do_sample=True),
        **dict(temperature=1.0, top_k=0, top_p=1.0),
    )

    def step() -> dict[str, float]:
        with torch.inference_mode():
            found = model.generate(**inputs, max_new_tokens=work.new_tokens).cpu()
        assert found.shape[1] == work.prompt + work.new_tokens
        return {}

    say(case="sample", **measured(step, max(1, steps // 2), warmup=1), **peak())


def peak() -> dict[str, float]:
    """The most memory that the device has held."""
    return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
