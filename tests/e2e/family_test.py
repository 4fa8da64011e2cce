"""A run with every part of the GRPO family on, and the same run ended in the middle."""

import shutil

import pytest

from tests.documented import undocumented
from tests.e2e.runs import arguments, records, timeless
from vtriune_jax.main import main

KEYS = {
    "stages": "grpo",
    "grpo_epochs": 2,
    "grpo_minibatches": 2,
    "grpo_loss": "gspo",
    "grpo_normalise": "sequence",
    "grpo_advantage": "rloo",
    "grpo_dual_clip": 3.0,
    "grpo_tis_cap": 2.0,
    "grpo_kl_weight": 0.01,
    "grpo_entropy_weight": 0.001,
    "grpo_overlong_cushion": 40,
    "grpo_refill": 2,
    "checkpoint_keep": 9,
    "eval_rows_per_source": 0,
}


@pytest.fixture(scope="module")
def keys(warm, data):
    return {**KEYS, "model_path": warm / "final", **data}


@pytest.fixture(scope="module")
def whole(keys, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("family") / "run"
    assert main(arguments(workdir, **keys)) == 0
    return workdir


def test_every_part_reports(whole):
    for line in records(whole):
        for name in (
            *("reference_kl", "dual_clip_fraction", "rollout_ratio", "rollout_ratio_max"),
            *("rollout_ratio_from_0.95_to_1.05", "refill_rounds", "missing_groups"),
        ):
            assert name in line, name
        # The sampler and the trainer compute the same.
        assert line["rollout_ratio"] == pytest.approx(1.0, abs=1e-3)
        assert any(name.startswith("reward_overlong/") for name in line)
        assert not [name for name, value in line.items() if value is None]
        assert line["skipped_steps"] == 0
        assert undocumented(line) == []
    assert records(whole)[0]["reference_kl"] < records(whole)[-1]["reference_kl"]


def test_a_run_that_was_ended_goes_on_as_if_not(whole, keys, tmp_path):
    """Its checkpoints after the first step are gone, and so is what came of them."""
    again = tmp_path / "run"
    shutil.copytree(whole, again)
    for step in (2, 3):
        shutil.rmtree(again / "checkpoints" / "grpo" / str(step))
    shutil.rmtree(again / "final")
    assert main(arguments(again, **keys)) == 0
    for got, want in zip(records(again), records(whole), strict=True):
        assert timeless(got) == timeless(want)
    got, want = (folder / "final" / "model.safetensors" for folder in (again, whole))
    assert got.read_bytes() == want.read_bytes()
