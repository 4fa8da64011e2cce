import io
import json
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from vtriune_jax.errors import UserError
from vtriune_jax.metrics import SourceMean
from vtriune_jax.writers import (
    MetricsWriter,
    Progress,
    duration,
    summary_table,
    write_atomic,
    write_summary,
)

BEFORE = {"count": SourceMean(0.25, 8), "ocr": SourceMean(0.5, 8), "dead": SourceMean(None, 0, 4)}
AFTER = {"count": SourceMean(0.75, 8), "ocr": SourceMean(0.4, 6, 2), "dead": SourceMean(None, 0, 4)}


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(file: Path) -> list[Event]:
    """The events of a file, read by the TFRecord framing: length u64, crc u32, data, crc u32."""
    data, found = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        found.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return found


def test_a_line_per_step_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 0.5, "reward/count": 1.0}, stage="grpo")
    assert lines(tmp_path) == [{"step": 1, "stage": "grpo", "loss": 0.5, "reward/count": 1.0}]
    writer.write(2, {"loss": float("nan"), "grad_norm": float("inf")}, stage="grpo")
    assert lines(tmp_path)[1] == {"step": 2, "stage": "grpo", "loss": None, "grad_norm": None}
    writer.close()


def test_tensorboard_has_the_same_scalars_and_purges_what_a_resume_repeats(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2, "reward/count": 1.0}, stage="grpo")
    [file] = (tmp_path / "tensorboard").iterdir()
    scalars = [(e.step, v.tag, v.simple_value) for e in events(file) for v in e.summary.value]
    assert scalars[:2] == [(1, "loss", 0.5), (1, "reward/count", 1.0)]
    assert len(scalars) == 6
    writer.close()
    file.rename(file.with_name("older" + file.name))

    resumed = MetricsWriter(tmp_path)
    resumed.resume(2)
    resumed.write(2, {"loss": 7.0}, stage="grpo")
    resumed.close()
    [file] = (tmp_path / "tensorboard").glob("events*")
    _, start, again = events(file)
    assert (start.step, start.session_log.status) == (2, SessionLog.START)
    assert (again.step, again.summary.value[0].simple_value) == (2, 7.0)


def test_the_record_framing_of_this_test_is_tensorboards(tmp_path):
    record = RecordWriter(str(tmp_path / "x"))
    record.write(Event(step=3).SerializeToString())
    record.close()
    assert [event.step for event in events(tmp_path / "x")] == [3]


def test_resume_drops_the_steps_to_come_and_keeps_the_rest(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)}, stage="sft" if step < 3 else "grpo")
    writer.close()
    writer = MetricsWriter(tmp_path)
    writer.resume(4)
    writer.write(4, {"loss": 40.0}, stage="grpo")
    writer.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_a_torn_last_line_is_cut_off(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0}, stage="sft")
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sta')
    writer = MetricsWriter(tmp_path)
    writer.write(2, {"loss": 2.0}, stage="sft")
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_progress_lines_say_stage_step_speed_time_left_and_reward_per_source(tmp_path):
    now, out = [0.0], io.StringIO()
    progress = Progress(tmp_path, every=5, stream=out, clock=lambda: now[0])
    for step in range(1, 11):
        now[0] += 2
        progress("sft", step, 10, {"loss": 4.0 - step / 10})
    progress("grpo", 1, 200, {"reward": 0.5, "reward/count": 0.25, "reward_format/count": 1.0})
    shown = out.getvalue().splitlines()
    assert shown[0] == "sft   1/10 · loss 3.9"
    assert shown[1] == "sft   4/10 · 0.5 steps/s · 12s left · loss 3.7"
    assert shown[3] == "sft  10/10 · 0.5 steps/s · 0s left · loss 3.1"
    assert shown[4] == "grpo    1/200 · reward 0.500 (count 0.25)"
    assert (tmp_path / "progress.log").read_text() == out.getvalue()


def test_durations():
    assert [duration(s) for s in (0.4, 59.4, 185, 7800)] == ["0s", "59s", "3m05s", "2h10m"]


def test_summary_json(tmp_path):
    write_summary(tmp_path, BEFORE, AFTER, steps=12, seconds=3.21, devices=["cpu"])
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "before": {"count": 0.25, "ocr": 0.5},
        "after": {"count": 0.75, "ocr": 0.4},
        "steps": 12,
        "seconds": 3.2,
        "devices": ["cpu"],
    }


def test_summary_table():
    assert summary_table(BEFORE, AFTER).splitlines() == [
        "source  before  after  change  judged  failed",
        "──────  ──────  ─────  ──────  ──────  ──────",
        "count    0.250  0.750  +0.500       8       0",
        "dead         –      –       –       0       4",
        "ocr      0.500  0.400  -0.100       6       2",
        "──────  ──────  ─────  ──────  ──────  ──────",
        "mean     0.375  0.575  +0.200      14       6",
    ]


def test_a_full_disk_is_one_line_with_the_path_and_the_remedy(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(tmp_path)
    with pytest.raises(UserError, match=r"^no space left to write .*metrics\.jsonl; free [^\n]*$"):
        writer.write(1, {"loss": 1.0}, stage="sft")
    with pytest.raises(UserError, match="no space left"):
        writer.close()


def test_a_workdir_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .* choose a --workdir"):
        MetricsWriter(tmp_path / "file")


def test_an_atomic_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomic(path, "old")

    def fail(_):
        raise OSError(28, "full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UserError, match="no space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
