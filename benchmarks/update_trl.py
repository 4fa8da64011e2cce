"""TRL's side of benchmarks/update.py: whole GRPO steps by `GRPOTrainer`, images included.

    python benchmarks/update_trl.py FOLDER

No reference model, one update per rollout batch, generation by transformers: it samples, rewards
and updates inside its training step.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_USE_CPU"] = "true"
warnings.simplefilter("ignore")  # torch and transformers warn about their own deprecations

import torch
from datasets import Dataset
from datasets import Image as ImageColumn
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, TrainerCallback
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer
from update_work import CLIP, QUESTION, RATE, STEP, cpu_seconds, drawn, peak_mb, reward, say, wait

MOST_STEPS = 1000


class Processor(Qwen2_5_VLProcessor):
    """Without videos, which need torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


class Turns(TrainerCallback):
    """A step whenever the driver asks for one."""

    tokens: float = 0.0
    reward: float = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if not wait():
            sys.exit()
        self.wall, self.cpu = time.perf_counter(), cpu_seconds()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = {"wall": time.perf_counter() - self.wall, "cpu": cpu_seconds() - self.cpu}
        say(**seconds, tokens=self.tokens, reward=self.reward, peak_mb=peak_mb())


def main(folder: Path) -> None:
    images = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
    processor = Processor(images, tokenizer, chat_template=tokenizer.chat_template)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    turns = Turns()

    def judge(completions: Any, label: Any, completion_ids: Any, **_: Any) -> list[float]:
        texts = [each[0]["content"] for each in completions]
        found = [reward(*pair) for pair in zip(texts, label, strict=True)]
        turns.tokens, turns.reward = float(sum(map(len, completion_ids))), sum(found) / len(found)
        return found

    rows = [(Image.open(io.BytesIO(blob)), label) for blob, label in islice(drawn(seed=0), 64)]
    data = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": QUESTION}]] * len(rows),
            "image": [image for image, _ in rows],
            "label": [label for _, label in rows],
        }
    ).cast_column("image", ImageColumn())
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            per_device_train_batch_size=STEP["prompts"] * STEP["samples"],
            num_generations=STEP["samples"],
            max_completion_length=STEP["completion"],
            max_steps=MOST_STEPS,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            beta=0.0,
            epsilon=CLIP,
            loss_type="grpo",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[judge],
            args=config,
            train_dataset=data,
            processing_class=processor,
            callbacks=[turns],
        )
        say(ready=1)
        trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
