"""The command line of a tiny run, and what it leaves behind, as plain values."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from vtriune_jax import models
from vtriune_jax.models import weights

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "e2e" / "tiny.py"


def arguments(workdir: Path, **values: object) -> list[str]:
    """Flags of main: `sft_steps=3` is --config.sft.steps=3; a key's further words keep their _."""
    return [f"--config={CONFIG}", f"--workdir={workdir}"] + [
        f"--config.{key.replace('_', '.', 1)}={value}" for key, value in values.items()
    ]


def command(workdir: Path, **values: object) -> list[str]:
    """The same as a program's command line."""
    return [sys.executable, "-m", "vtriune_jax.main", *arguments(workdir, **values)]


def environment(**more: str) -> dict[str, str]:
    """Of such a program."""
    return {**os.environ, "PYTHONPATH": str(ROOT), **more}


def records(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    text = (workdir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def timeless(record: dict) -> dict:
    """A line without what differs from run to run."""
    return {name: value for name, value in record.items() if not name.startswith("time/")}


def params(folder: Path) -> dict[str, np.ndarray]:
    """Path → array of a checkpoint in the Hugging Face layout."""
    tree = models.split(models.load_pretrained(folder))[1]
    return {path: np.asarray(leaf) for path, leaf in weights.flatten(tree).items()}


def summary(workdir: Path) -> dict:
    """What summary.json says."""
    return json.loads((workdir / "summary.json").read_text())


def learnt(record: dict) -> dict:
    """A line without what tells of time, of the servers and of the layout of rows."""
    apart = ("rollout/", "sync/", "layout/", "pad/")
    return {k: v for k, v in timeless(record).items() if not k.startswith(apart)}


def assert_near(workdir: Path, reference: Path) -> None:
    """Two runs are the same, rounding aside."""
    got, want = records(workdir), records(reference)
    assert len(got) == len(want)
    for record, expected in zip(map(learnt, got), map(learnt, want), strict=True):
        assert record.keys() == expected.keys()
        assert record.pop("stage") == expected.pop("stage")
        for name, value in expected.items():
            judged = name.startswith(("reward", "length", "correct", "skipped", "dropped"))
            tolerance = {"rel": 1e-12} if judged else {"rel": 1e-5, "abs": 1e-6}
            assert record[name] == pytest.approx(value, **tolerance), name
    found, expected = params(workdir / "final"), params(reference / "final")
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 2e-5 * np.abs(value).max(), name
    found, expected = summary(workdir), summary(reference)
    for name in ("before", "after"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12)
