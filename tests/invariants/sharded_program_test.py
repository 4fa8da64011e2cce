"""What devices send each other in an update, and kernels that each device runs on its part."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def report():
    """Eight devices need their own process: their number is fixed when jax starts."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # what is read from it is not partitioned again
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", HERE / "sharded_program.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_parameters_are_gathered_in_bfloat16(report):
    gathers = [shape for shape in report["collectives"]["all-gather"] if shape[:3] != "s32"]
    assert len(gathers) == 2 * 7 + 2  # a layer's, once forward and once back, table and head
    assert {shape.split("[")[0] for shape in gathers} == {"bf16"}
    assert {"bf16[64,32]", "bf16[32,64]"} <= set(gathers)


def test_gradients_are_added_up_in_float32(report):
    sums = report["collectives"]["all-reduce"]
    assert {shape.split("[")[0] for shape in sums} == {"f32"}
    assert {"f32[32,48]", "f32[32]", "f32[16]"} <= set(sums)  # a matrix, a norm, a bias


def test_the_gradient_of_the_head_is_added_up_once_for_all_chunks(report):
    assert report["head sums"] == 1


def test_the_sampler_gathers_parameters_once_and_each_device_decodes_its_own_rows(report):
    """For each token devices look up their embeddings, whose width is cut, and no more."""
    loop, outside = report["sampler"]["loop"], report["sampler"]["outside"]
    assert len([line for line in outside if line.startswith("all-gather ")]) >= 2 * 7
    assert sorted(line.split("[")[0] for line in loop) == ["all-gather s32", "all-to-all (f32"]


def test_a_kernel_on_every_device_gives_what_xla_gives_on_one(report):
    assert len(report["errors"]) == 3
    assert max(report["errors"].values()) < 1e-5, report["errors"]
