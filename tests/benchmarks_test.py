"""The benchmark that answers the peers' driver, on a batch as the driver writes it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.tiny import get_config
from vtriune_jax import models, tiny
from vtriune_jax.models.vision import normalise

OURS = Path(__file__).parents[1] / "benchmarks" / "ours.py"
ROWS, PROMPT, RESPONSE = 4, 16, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny model and the four batches: an image of 56×56 pixels a row, or none."""
    sizes = get_config().model.tiny
    folder = tiny.ensure_tiny(tmp_path_factory.mktemp("tiny") / "model", sizes, ["a digit"], 0)
    config = models.load_pretrained(folder).config
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (ROWS, PROMPT + RESPONSE))
    images = ids.copy()
    images[:, 4:10] = [config.vision_start_token_id, *[config.image_token_id] * 4, 5]
    pixels = rng.integers(0, 256, (16 * ROWS, config.vision.patch)).astype(np.uint8)
    vision = {"pixel_values": normalise(pixels), "image_grid_thw": np.array([[1, 4, 4]] * ROWS)}
    logps = rng.normal(-6, 0.1, (ROWS, RESPONSE)).astype(np.float32)
    train = {
        "advantages": np.array([1, -1, 1, -1], np.float32),
        "response_mask": np.ones((ROWS, RESPONSE), np.float32),
        "logps_fp32": logps,
        "old_logps": logps,
    }
    for end, tokens, more in (("", images, vision), ("_text", ids, {})):
        given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **more}
        np.savez(folder / f"batch_train{end}.npz", **given, **train)
        given |= {name: given[name][:, :PROMPT] for name in ("input_ids", "attention_mask")}
        np.savez(folder / f"batch_generate{end}.npz", **given)
    return folder


@pytest.mark.parametrize(
    ("case", "numbers"),
    [
        ("A/train/fp32/eager", {"step_s", "tokens_per_s", "loss0", "grad_norm0", "logp_err0"}),
        ("A/train-text/fp32/eager", {"step_s", "tokens_per_s", "loss0", "grad_norm0"}),
        ("B/generate/fp32/dynamic", {"wall_s", "tokens_per_s"}),
        ("B/generate-text/fp32/dynamic", {"wall_s", "tokens_per_s"}),
    ],
)
def test_the_driver_gets_its_numbers(checkpoint, case, numbers):
    words = [f"--case={case}", f"--ckpt={checkpoint}", "--steps=1", "--warmup=1"]
    done = subprocess.run(
        [sys.executable, OURS, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    name, _, text = done.stdout.splitlines()[-1].partition(" ")
    assert name == "BENCH_JSON"
    found = json.loads(text)
    assert found["case"] == case
    assert found["metrics"].keys() >= numbers | {"peak_rss_mb", "cpu_s"}
    assert all(np.isfinite(value) for value in found["metrics"].values())
