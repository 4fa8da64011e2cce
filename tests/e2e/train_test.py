"""Whole runs in this process: what they write, and what they change."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.documented import undocumented
from tests.e2e.runs import arguments, params, records, summary
from vtriune_jax.main import main

pytestmark = pytest.mark.usefixtures("optimised")

SOURCES = [f"digits_{task}" for task in ("counting", "detection", "grounding", "math", "ocr")]
BOX_SOURCES = ["digits_detection", "digits_grounding"]


@pytest.fixture(scope="module")
def run(warm, data, tmp_path_factory):
    """Three steps of GRPO, each with eight updates, as in V-Triune's off-policy setting."""
    workdir = tmp_path_factory.mktemp("train") / "run"
    keys = {"stages": "grpo", "model_path": warm / "final"}
    assert main(arguments(workdir, grpo_minibatches=8, **keys, **data)) == 0
    return workdir


def test_metrics_of_every_kind_and_source(run):
    lines = records(run)
    assert [(line["step"], line["stage"]) for line in lines] == [(k, "grpo") for k in range(3)]
    per_source = [
        *("reward", "reward_accuracy", "reward_format", "length", "truncated", "reflection"),
        *("verifier_failed", "zero_variance", "kl", "entropy", "clip_fraction", "loss"),
    ]
    wanted = {f"{name}/{source}" for name in per_source for source in SOURCES}
    wanted |= {f"reward_iou_{at}/{s}" for at in (50, 75, 95, 99) for s in BOX_SOURCES}
    wanted |= {f"time/{part}" for part in ("encode", "rollout", "verify", "update")}
    wanted |= {"reward", "loss", "grad_norm", "kl", "entropy", "clip_fraction", "skipped_steps"}
    for line in lines:
        assert not wanted - line.keys()
        assert not [name for name, value in line.items() if value is None]
        assert not [n for n, v in line.items() if n.startswith("verifier_") and v]
        assert line["grad_norm"] > 0
        assert line["kl"] > 0  # to the policy before the first of the step's updates
        assert line["skipped_steps"] == 0


def test_every_metric_is_documented(run, warm):
    for line in (*records(run), *records(warm)):
        assert undocumented(line) == []


def test_tensorboard_has_the_same_names(run):
    [events] = (run / "tensorboard").iterdir()
    content = events.read_bytes()
    names = records(run)[0].keys() - {"step", "stage"}
    assert not [name for name in names if name.encode() not in content]


def test_summary(run):
    found = summary(run)
    assert list(found) == ["before", "after", "steps", "seconds", "devices"]
    assert list(found["before"]) == list(found["after"]) == SOURCES
    assert all(0 <= value <= 1 for value in [*found["before"].values(), *found["after"].values()])
    assert found["steps"] == 3
    assert found["seconds"] > 0
    assert found["devices"] == ["cpu:0 cpu"]


def test_report_and_pictures(run):
    page = (run / "report.html").read_text()
    pictures = sorted((run / "samples").iterdir())
    assert [picture.stem[3:] for picture in pictures] == SOURCES
    for picture, source in zip(pictures, SOURCES, strict=True):
        Image.open(picture).verify()
        assert source in page


def test_grpo_leaves_the_vision_tower_alone_and_changes_the_rest(run, warm):
    before, after = params(warm / "final"), params(run / "final")
    assert before.keys() == after.keys()
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert same == {path for path in before if path.startswith("visual/")}


def test_imitation_trains_everything(warm):
    before, after = params(warm / "model"), params(warm / "final")
    assert not [path for path in before if np.array_equal(before[path], after[path])]
    first, *_, last = records(warm)
    assert last["loss"] < first["loss"] / 4
    assert {f"loss/{source}" for source in SOURCES} < first.keys()
    assert not [name for name in first if name.startswith(("reward", "length"))]


def test_a_run_without_steps_only_evaluates(warm, data, tmp_path, capsys):
    keys = {"stages": "('grpo',)", "grpo_steps": 0, "model_path": warm / "final", **data}
    assert main(arguments(tmp_path / "run", **keys)) == 0
    assert "digits_ocr" in capsys.readouterr().out
    found = summary(tmp_path / "run")
    assert list(found["before"]) == SOURCES
    assert found["after"] == found["before"]
    before, after = params(warm / "final"), params(tmp_path / "run" / "final")
    assert all(np.array_equal(before[path], after[path]) for path in before)


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, height), 60).convert("RGB").save(out, "PNG")
    return out.getvalue()


def row(source: str, text: str, truth: str, verifier: str, *sizes: tuple[int, int], **parm) -> dict:
    """A row as somebody else's script would write it."""
    return {
        "data_source": source,
        "images": [{"bytes": png(*size), "path": None} for size in sizes],
        "prompt": [{"content": "<image>" * len(sizes) + text, "role": "user"}],
        "ability": "any",
        "reward_model": {
            "answer": None,
            "ground_truth": truth,
            "accuracy_ratio": 1.0,
            "format_ratio": None,
            "verifier": verifier,
            "verifier_parm": {"det_verifier_normalized": None, "det_reward_ratio": None} | parm,
        },
        "extra_info": {"id": None},
    }


def test_a_parquet_file_of_ones_own_and_the_verifier_server(warm, tmp_path, capsys):
    """Plain pyarrow, nulls where a verifier has no parameters, no or two images, one step each."""
    boxes = "<answer>\n[{'bbox_2d': [1, 2, 30, 40], 'label': 'Dog'}]\n</answer>"
    ratio = {"iou_max_label_first": 1.0, "iou_max_iou_first": None, "map": 0.5}
    parm = {"det_verifier_normalized": True, "det_reward_ratio": ratio}
    rows = [
        row("boxes", "Find the dogs.", boxes, "detection", (60, 50), **parm),
        row("sums", "2 + 2?", "\\boxed{4}", "mathverify"),
        row("both", "Same?", "\\boxed{no}", "mathverify", (30, 30), (90, 40)),
        row("sums", "What is this?", "\\boxed{8}", "mathverify", (28, 28)),
        row("square", "How large?", "\\boxed{28}", "mathverify", (28, 28)),
        row("dark", "Is it dark?", "\\boxed{no}", "mathverify", (57, 83)),
    ]
    file = tmp_path / "mine.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file)
    keys = {
        "data_train": ((str(file), 1.0),),
        "model_path": warm / "final",
        "verifiers_mode": "server",
        "eval_rows_per_source": 0,
    }
    steps = {"sft_steps": 1, "grpo_steps": 1, "grpo_minibatches": 2}
    assert main(arguments(tmp_path / "run", data_heldout=(str(file),), **keys, **steps)) == 0
    sft, grpo = records(tmp_path / "run")
    assert sft["loss"] > 0
    assert sft["skipped_steps"] == grpo["skipped_steps"] == 0
    for source in ("boxes", "sums", "both", "square", "dark"):
        assert grpo[f"verifier_failed/{source}"] == 0
        assert grpo[f"length/{source}"] > 0
    assert "reward_iou_50/boxes" in grpo
    assert summary(tmp_path / "run")["before"] == {}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["verifiers"]["workers"] == 1
