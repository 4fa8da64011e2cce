"""Rows whose pictures are broken in the middle, which shows only when they are decoded."""

import json
import re

import pytest

from tests.e2e.runs import arguments, records, timeless
from vtriune_jax.data import digits
from vtriune_jax.data.schema import to_row
from vtriune_jax.data.sources import write_parquet
from vtriune_jax.main import main

STEPS = {"stages": "sft", "sft_steps": 6, "sft_prompts": 4, "checkpoint_every": 2}


def broken(row: dict) -> dict:
    """The row with the last third of its picture missing."""
    data = row["images"][0]["bytes"]
    return row | {"images": [{"bytes": data[: len(data) * 2 // 3], "path": None}]}


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two tasks of ten training rows and four held-out ones; of one task every third is broken."""
    folder = tmp_path_factory.mktemp("bad")
    files = {}
    for split, count in (("train", 10), ("heldout", 4)):
        for task in ("math", "counting"):
            rows = map(to_row, digits.samples(task, split, count))
            rows = [broken(r) if task == "math" and i % 3 == 0 else r for i, r in enumerate(rows)]
            files[split, task] = str(folder / f"{split}_{task}.parquet")
            write_parquet(rows, files[split, task])
    return {
        "data_train": tuple((files["train", task], 1.0) for task in ("math", "counting")),
        "data_heldout": tuple(files["heldout", task] for task in ("math", "counting")),
        "eval_rows_per_source": 4,
        **STEPS,
    }


@pytest.fixture(scope="module")
def skipping(keys, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("skipping") / "run"
    assert main(arguments(workdir, **keys, data_on_bad_row="skip")) == 0
    return workdir


def test_a_broken_picture_ends_the_run(keys, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", **keys)) == 2
    error = capsys.readouterr().err
    assert re.match(r"error: /\S+_math.parquet row \d: the image cannot be decoded", error)
    assert error.count("\n") == 1


def test_skipped_rows_are_counted_and_replaced(skipping):
    lines = records(skipping)
    assert [line["step"] for line in lines] == list(range(6))
    counts = [line.get("skipped_rows", 0) for line in lines]
    assert sum(counts) >= 3
    assert counts == [line.get("skipped_rows/digits_math", 0) for line in lines]


def test_the_first_bad_row_of_a_source_is_told_of(keys, tmp_path, capsys):
    changed = {**keys, "data_on_bad_row": "skip", "eval_rows_per_source": 0}
    changed |= {"stages": "sft,grpo", "grpo_steps": 2}
    assert main(arguments(tmp_path / "run", **changed)) == 0
    [told] = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    pattern = r"sft step \d: a bad row of digits_math is skipped \(/\S+_math.parquet row \d: the im"
    assert re.match(pattern, told)


def test_a_resumed_run_skips_the_same(skipping, keys, tmp_path, capsys):
    for steps in (2, 4, 6):
        changed = {**keys, "sft_steps": steps, "data_on_bad_row": "skip"}
        assert main(arguments(tmp_path / "run", **changed)) == 0
    out = capsys.readouterr().out
    heldout = keys["data_heldout"][0]
    assert f"held-out: bad rows skipped: 2, the first: {heldout} row 0: the image cannot be" in out
    assert re.search(r"digits_counting .* 4 +0\n", out)  # judged and failed, in the last table
    assert re.search(r"digits_math .* 2 +0\n", out)
    for got, want in zip(records(tmp_path / "run"), records(skipping), strict=True):
        assert json.dumps(timeless(got)) == json.dumps(timeless(want))
    got, want = (w / "final" / "model.safetensors" for w in (tmp_path / "run", skipping))
    assert got.read_bytes() == want.read_bytes()


@pytest.mark.parametrize("key", ["batch_prompt_tokens", "batch_completion_tokens"])
def test_rows_that_do_not_fit_are_bad_too_and_not_all_may_be_bad(keys, key, tmp_path, capsys):
    changed = {"data_on_bad_row": "skip", key: 3, "eval_rows_per_source": 0}
    assert main(arguments(tmp_path / "run", **{**keys, **changed})) == 2
    error = capsys.readouterr().err
    assert re.search(r"can be used, the last one because: /\S+train_\w+.parquet row \d: the", error)
    assert f"its slot 3; raise {key.replace('_', '.', 1)} or drop the row" in error
