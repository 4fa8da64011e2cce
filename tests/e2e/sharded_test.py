"""A run on eight devices is the run on one, rounding aside."""

import subprocess
import sys

import pytest

from tests.e2e.runs import arguments, environment, records, summary
from vtriune_jax.main import main

pytestmark = pytest.mark.slow  # invariants/ and hosts_test.py try the same by parts

STEPS = {"sft_steps": 2, "grpo_steps": 2, "checkpoint_every": 5}
TWO_RUNS = """
import sys
from vtriune_jax.main import main

cut = sys.argv.index("--")
assert main(sys.argv[1:cut]) == 2
sys.exit(main(sys.argv[cut + 1 :]))
"""


@pytest.fixture(scope="module")
def one(warm, data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert main(arguments(workdir, model_path=warm / "final", **STEPS, **data)) == 0
    return workdir


@pytest.fixture(scope="module")
def eight(warm, data, tmp_path_factory):
    """The workdir of such a run, and what was said before it to rows that do not divide."""
    workdir = tmp_path_factory.mktemp("eight") / "run"
    keys = {"model_path": warm / "final", **STEPS, **data}
    bad = arguments(workdir.with_name("bad"), **{**keys, "sft_prompts": 6})
    ended = subprocess.run(
        [sys.executable, "-c", TWO_RUNS, *bad, "--", *arguments(workdir, **keys)],
        env=environment(JAX_NUM_CPU_DEVICES="8"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return workdir, ended.stderr


def test_losses_are_the_same(one, eight):
    want, got = records(one), records(eight[0])
    assert len(got) == len(want) == 4
    for record, reference in zip(got[:3], want[:3], strict=True):
        for name in [name for name in reference if name.split("/")[0] in ("loss", "grad_norm")]:
            assert record[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-5), name
    assert got[2]["reward"] == pytest.approx(want[2]["reward"], abs=1e-5)


def test_all_devices_took_part(eight):
    assert summary(eight[0])["devices"] == [f"cpu:{k} cpu" for k in range(8)]


def test_rows_that_do_not_divide_the_mesh(eight):
    assert eight[1].startswith("error: ")
    assert eight[1].count("\n") == 1
    assert "sft.prompts=6 is not a multiple of 8, choose 8" in eight[1]
    assert "data×fsdp=8" in eight[1]
