"""Runs on rows without images."""

from dataclasses import replace

import pytest

from tests.e2e.runs import arguments, learnt, records
from vtriune_jax.data import digits
from vtriune_jax.data.schema import to_row
from vtriune_jax.data.sources import write_parquet
from vtriune_jax.main import main

KEYS = {
    "batch_micro_batches": 2,
    "rollout_pieces": 2,
    "grpo_epochs": 2,
    "grpo_minibatches": 2,
    "grpo_kl_weight": 0.01,
    "grpo_entropy_weight": 0.1,
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Rows of a built-in task, their pictures taken away."""
    folder = tmp_path_factory.mktemp("text")
    files = {split: folder / f"{split}.parquet" for split in ("train", "heldout")}
    for split, file in files.items():
        write_parquet([to_row(blind(s)) for s in digits.samples("counting", split, 40)], file)
    return KEYS | {"data_train": ((str(files["train"]), 1.0),), "data_heldout": (str(file),)}


def blind(sample):
    messages = [replace(m, content=m.content.replace("<image>", "")) for m in sample.messages]
    return replace(sample, images=(), messages=tuple(messages))


@pytest.mark.parametrize("frozen", [True, False])
def test_no_room_for_images_is_needed(keys, tmp_path, frozen):
    freeze = {} if frozen else {"sft_freeze": (), "grpo_freeze": ()}
    runs = {windows: tmp_path / str(windows) for windows in (1, 0)}
    for windows, run in runs.items():
        assert main(arguments(run, batch_windows=windows, **keys, **freeze)) == 0
    none, some = (list(map(learnt, records(runs[windows]))) for windows in (0, 1))
    assert [line.pop("stage") for line in none] == [line.pop("stage") for line in some]
    for line, expected in zip(none, some, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
