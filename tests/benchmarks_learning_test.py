"""benchmarks/learning.py, on what runs leave behind."""

import json

import pytest

from benchmarks.learning import main


def make_run(folder, steps=30, sources=("digits_detection", "digits_ocr")):
    folder.mkdir()
    means = dict.fromkeys(sources, 0.25)
    (folder / "summary.json").write_text(json.dumps({"before": means, "after": means}))
    record = {"stage": "grpo", "reward": 0.5}
    record |= {f"reward/{source}": 0.5 for source in sources}
    record |= {
        f"reward_{part}/{source}": 0.0 for part in ("format", "accuracy") for source in sources
    }
    lines = [json.dumps(record | {"step": step}) + "\n" for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return str(folder)


def test_tables_of_the_sources_that_there_are(tmp_path, capsys):
    assert main([make_run(tmp_path / "a"), make_run(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run | digits_detection | digits_ocr | mean"
    assert lines[-1].startswith("digits_detection: well-formed 0.00 → 0.00")
    assert len(lines) == 6
    assert main([make_run(tmp_path / "c", sources=("mine",))]) == 0


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (None, "a/metrics.jsonl is missing; expected the workdir of a run that has ended"),
        ({"steps": 3}, "a has 3 GRPO steps; at least 25 are compared"),
        ({"sources": ()}, "a was evaluated on []; expected some sources"),
    ],
)
def test_other_runs_are_refused_in_one_line(tmp_path, capsys, made, expected):
    if made is not None:
        make_run(tmp_path / "a", **made)
    assert main([str(tmp_path / "a")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_no_run_and_different_runs(tmp_path, capsys):
    assert main([]) == 2
    assert "no run is named" in capsys.readouterr().err
    assert main([make_run(tmp_path / "a"), make_run(tmp_path / "b", sources=("x",))]) == 2
    assert "the same in all runs" in capsys.readouterr().err
