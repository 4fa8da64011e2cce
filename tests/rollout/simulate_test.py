"""`python -m vtriune_jax.rollout.simulate`, from the command line to the file."""

import json

import pytest

from vtriune_jax import config as configs
from vtriune_jax.rollout.simulate import main

QUICKSTART = f"--config={configs.REPOSITORY / 'configs' / 'quickstart.py'}"
ORSTA = f"--config={configs.REPOSITORY / 'configs' / 'orsta_7b.py'}"
KNOWN = (
    *("--config.grpo.prompts=32", "--config.grpo.samples=8", "--config.verifiers.workers=2"),
    *("--lengths=constant:100", "--prompt_tokens=10", "--steps=6", "--capacity=64"),
    *("--decode=1:100,64:6400", "--prefill=100", "--update=30@3", "--publish=2", "--load=1"),
    "--verify=0.01",
)
"""100 tokens in 1 s, however many are in flight."""


def simulated(capsys, *words):
    assert main(words) == 0
    return capsys.readouterr().out.splitlines()


def test_one_split_by_hand(capsys, tmp_path):
    """A server reads 8 of 32 prompts in 0.8 s, while completions wait; then it decodes for 1 s."""
    file = tmp_path / "numbers.json"
    split = ("--trainer_chips=6", "--servers=4", "--gpus_per_server=2", f"--json={file}")
    head, table, *lines = simulated(capsys, QUICKSTART, *KNOWN, *split)
    assert "6 steps of 32 prompts × 8 completions, 10 tokens a prompt" in head
    assert table.split()[:4] == ["chips:", "trainer", "fleet", "ahead"]
    assert [line.split()[:3] for line in lines] == [["6", "8", "0"], ["6", "8", "1"]]
    found = json.loads(file.read_text())
    assert found["assumed"] == []
    off, on = (run["mean"] for run in found["runs"])
    assert off["time/rollout"] == pytest.approx(1.8)
    assert off["time/verify"] == pytest.approx(32 * 8 * 0.01 / 2)
    assert off["time/update"] == pytest.approx(30 * 3 / 6)
    assert off["time/sync"] == pytest.approx(3)
    assert off["time/step"] == pytest.approx(1.8 + 1.28 + 15 + 3)
    assert on["time/step"] == pytest.approx(15 + 3)
    assert [len(run["steps"]) for run in found["runs"]] == [6, 6]


def test_the_best_split_of_budgets(capsys):
    _, _, *lines = simulated(capsys, QUICKSTART, *KNOWN, "--budget=4,8", "--ahead=1")
    rows = [line.split() for line in lines]
    assert [int(row[0]) + int(row[1]) for row in rows] == [4, 8]
    # Rollouts are short: nearly all chips train.
    assert [row[:2] for row in rows] == [["3", "1"], ["7", "1"]]


def test_what_is_assumed_is_said(capsys):
    words = ("--trainer_chips=16", "--servers=16", "--steps=2", "--config.grpo.prompts=128")
    assumed = [line for line in simulated(capsys, ORSTA, *words) if line.startswith("assumed")]
    flags = [line.split("--")[1].split("=")[0] for line in assumed]
    assert sorted(flags) == ["decode", "lengths", "load", "prefill", "publish", "update"]


def test_an_estimate_of_compile_is_the_update(capsys, tmp_path):
    file, out = tmp_path / "7b.json", tmp_path / "out.json"
    file.write_text('{"estimated_step_seconds": 5.0, "devices": 4}')
    split = ("--trainer_chips=8", "--servers=4", "--ahead=0", f"--json={out}")
    more = (f"--update={file}", "--config.grpo.minibatches=2")
    simulated(capsys, QUICKSTART, *KNOWN, *split, *more)
    (run,) = json.loads(out.read_text())["runs"]
    assert run["mean"]["time/update"] == pytest.approx(5.0 * 2 * 4 / 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--config=configs/orsta_7b.py is missing"),
        ([QUICKSTART, "--trainer_chips=2"], "give both"),
        ([QUICKSTART, *KNOWN, "--budget=1"], "--budget=1 must be whole numbers from 2 on"),
        ([QUICKSTART, *KNOWN, "--ahead=-1"], "--ahead=-1 must be whole numbers from 0 on"),
        ([QUICKSTART, *KNOWN, "--update=fast"], "--update=fast: give seconds"),
        ([QUICKSTART, *KNOWN, "--update=none.json"], "no file of vtriune_jax.compile"),
        ([QUICKSTART, *KNOWN, "--decode=5"], "IN_FLIGHT:TOKENS_PER_SECOND"),
        ([QUICKSTART, *KNOWN, "--steps=0"], "steps"),
        ([QUICKSTART, "--config.model.path=none", "--lengths=constant:5"], "is no folder"),
        ([QUICKSTART, *KNOWN, "--budget=4", "--ahead=0", "--json=/none/x"], "cannot be written"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, capsys):
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
