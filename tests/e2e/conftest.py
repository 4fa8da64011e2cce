"""Small data files, and a checkpoint that already answers in the right form."""

import pytest

from tests.e2e.runs import arguments
from vtriune_jax.data import digits
from vtriune_jax.data.schema import to_row
from vtriune_jax.data.sources import write_parquet
from vtriune_jax.main import main


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The keys that make a run use a few rows of every built-in task, from files."""
    folder = tmp_path_factory.mktemp("data")

    def files(split, count):
        for task in digits.TASKS:
            path = folder / f"{split}_{task}.parquet"
            write_parquet(map(to_row, digits.samples(task, split, count)), path)
            yield str(path)

    train = tuple((file, 1.0) for file in files("train", 60))
    return {"data_train": train, "data_heldout": tuple(files("heldout", 4))}


@pytest.fixture(scope="session")
def warm(data, tmp_path_factory):
    """The workdir of a run that only imitates: rewards of its model differ from sample to sample,
    without which GRPO would have nothing to learn."""
    workdir = tmp_path_factory.mktemp("warm") / "run"
    steps = {"sft_steps": 60, "sft_lr": 1e-2, "checkpoint_every": 60}
    quiet = {"log_seconds": 60.0, "log_samples": 0, "eval_rows_per_source": 0}
    assert main(arguments(workdir, stages="sft", **quiet, **steps, **data)) == 0
    return workdir
