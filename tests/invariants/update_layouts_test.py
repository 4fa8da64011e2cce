"""The layout of the update (mesh, micro-batches, rows) never changes its result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(
    scope="module", params=[("few", 15), pytest.param(("all", 20), marks=pytest.mark.slow)]
)
def printed(request):
    """Eight devices need their own process: their number is fixed when jax starts."""
    which, count = request.param
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", HERE / "update_layouts.py", which],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["updates"]) == count
    return found


@pytest.fixture(scope="module")
def report(printed):
    return printed["updates"]


def test_loss_and_state_are_those_of_one_device(report):
    worst = {
        name: max(entry["differences"].items(), key=lambda item: item[1])
        for name, entry in report.items()
    }
    assert all(value <= 1e-5 for _, value in worst.values()), worst


def test_every_layout_donates_its_state(report):
    assert {name: entry["kept"] for name, entry in report.items()} == dict.fromkeys(report, 0)


def test_parameters_are_really_cut(report):
    cut = {name: entry["cut"] for name, entry in report.items()}
    assert cut["grpo: one device"] == cut["grpo: 8,1,1"] == 0
    assert min(cut["grpo: 1,8,1"], cut["grpo: 2,2,2 and 2 micro-batches"]) >= 10


def test_a_device_has_the_logits_of_its_part_of_the_vocabulary_and_of_a_chunk(printed):
    """96 tokens over four devices; 4 rows over two, two tokens at a time."""
    assert "f32[2,2,24]" in printed["logits"]
    assert not [shape for shape in printed["logits"] if shape.endswith("96]")]
    assert not [shape for shape in printed["logits"] if shape.startswith(("f32[2,12,", "f32[6,2,"))]
