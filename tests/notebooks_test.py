import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FIRST_STEPS = ROOT / "notebooks" / "01_first_steps.ipynb"

PROBE = """
dict(
    answers={name: (v.status, v.score) for name, v in (box_verdicts | math_verdicts).items()},
    rewards=rewards.tolist(),
    ious=ious.tolist(),
    counts=counts.tolist(),
    paths=sorted(tree),
    image_positions=prompt.positions[:, image_tokens].tolist(),
    noise_rewards=noise_rewards,
    advantages=by_hand.values.tolist(),
    weights=by_hand.weights.tolist(),
    gain=float(advantage @ (after - before)),
    curve=curve,
)
"""
"""A last cell: what the notebook has computed."""


def read():
    return nbformat.read(FIRST_STEPS, as_version=4)


def source(cell_id):
    return next(cell.source for cell in read().cells if cell.id == cell_id)


def printed(outputs):
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Cell id → outputs, of a run in an empty folder that knows the checkout but no network."""
    home = tmp_path_factory.mktemp("notebook")
    notebook = read()
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE, id="probe"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            patch.setenv(name, str(home / name))
        place = {"metadata": {"path": str(home)}}
        NotebookClient(notebook, kernel_name="python3", timeout=300, resources=place).execute()
    return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def found(outputs):
    return ast.literal_eval(outputs["probe"][0].data["text/plain"])


def test_it_is_stored_without_outputs():
    notebook = read()
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert "execution" not in cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_opened_in_its_folder_it_finds_the_package():
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = source("setup") + "\nimport configs.quickstart, vtriune_jax.types"
    environment["JAX_PLATFORMS"] = "cpu"
    subprocess.run(
        [sys.executable, "-c", code], cwd=FIRST_STEPS.parent, env=environment, check=True
    )


def test_no_cell_complains(outputs):
    for cell, results in outputs.items():
        assert not [r.text for r in results if r.get("name") == "stderr"], cell


def test_the_picture_and_its_row_are_shown(outputs):
    assert "84×84 pixels" in printed(outputs["picture"])
    assert any("image/png" in output.get("data", {}) for output in outputs["picture"])
    row = printed(outputs["reward"])
    assert "<image>" in row
    assert "format_ratio 0.1" in row


def test_answers_are_worth_what_they_should(found):
    answers = found["answers"]
    assert answers.pop("bad truth")[0] == "error"
    assert {status for status, _ in answers.values()} == {"ok"}
    score = {name: score for name, (_, score) in answers.items()}
    assert score["perfect"] == score["last ] missing"] == score["as asked"] == pytest.approx(1)
    assert 0.9 < score["one pixel off"] < 1
    assert score["wrong label"] == pytest.approx(0.1 / 1.1)  # the format alone
    assert score["as a fraction"] == pytest.approx(1 / 1.1)  # all but the format
    assert score["broken JSON"] == score["wrong"] == score["not in a box"] == 0


def test_the_threshold_rises_over_the_same_boxes(found):
    assert found["ious"] == pytest.approx([(28 - d) / (28 + d) for d in (0, 0.5, 1, 3)])
    assert [sum(row) for row in found["counts"]] == [3, 2, 1, 0]
    for rewards, counts in zip(found["rewards"], found["counts"], strict=True):
        assert [reward > 0.5 for reward in rewards] == counts


def test_the_model_and_its_prompt_are_laid_open(found, outputs):
    assert "language/layers/mlp/gate/kernel" in found["paths"]
    time, height, width = found["image_positions"]
    assert len(set(time)) == 1
    assert len(set(zip(height, width, strict=True))) == 9
    assert printed(outputs["tokens"]).count("'<|image_pad|>'") == 9
    assert printed(outputs["window-table"]).count("of 16 slots used") == 4


def test_what_failed_or_stands_alone_has_no_advantage(found):
    assert found["noise_rewards"] == [0] * 16
    assert found["advantages"][0] == pytest.approx([1, -1, 0, 0], abs=1e-4)
    assert found["advantages"][1:] == [[0] * 4] * 2
    assert found["weights"] == [[1, 1, 1, 0], [1] * 4, [0] * 4]


def test_the_step_goes_towards_the_better_answers(found, outputs):
    metrics = dict(line.split() for line in printed(outputs["grpo-step"]).splitlines())
    assert 0 < float(metrics["reward"]) < 1
    assert float(metrics["rollout_gap"]) < 1e-4
    assert float(metrics["grad_norm"]) > 0
    assert float(metrics["skipped_steps"]) == 0
    assert found["gain"] > 0
    assert len(found["curve"]) == 13
    assert sum(found["curve"][-4:]) / 4 > found["curve"][0]
