"""Every mistake in the input ends in one line that names the thing and the remedy."""

import json
import os
import re
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.e2e.runs import arguments, command, environment, records
from vtriune_jax import models
from vtriune_jax.data import digits
from vtriune_jax.data.schema import arrow_schema, to_row
from vtriune_jax.errors import UserError
from vtriune_jax.main import main
from vtriune_jax.verifiers import known_verifiers
from vtriune_jax.writers import MetricsWriter


@pytest.fixture
def fails(tmp_path, data, warm, capsys):
    """Runs main with changed keys, which must fail, and returns what it says of it."""

    def run(**changes):
        keys = {"model_path": warm / "final", "sft_steps": 1, "grpo_steps": 1, **data, **changes}
        capsys.readouterr()
        assert main(arguments(tmp_path / "run", **keys)) == 2
        return one_line(capsys.readouterr().err)

    return run


def one_line(stderr: str) -> str:
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1
    return stderr


def rows(**changes) -> list[dict]:
    """Two rows, of which the second is changed."""
    one, other = map(to_row, digits.samples("math", "train", 2))
    return [one, other | changes]


def file_of(folder, content: list[dict]) -> dict:
    path = folder / "mine.parquet"
    pq.write_table(pa.Table.from_pylist(content, schema=arrow_schema()), path)
    return {"data_train": ((str(path), 1.0),)}


def test_a_row_without_its_image(fails, tmp_path):
    text = fails(**file_of(tmp_path, rows(images=[])))
    assert "mine.parquet row 1: the prompt has 1 <image> but the row has 0 images" in text
    assert "write <image> once per image" in text


def test_an_image_that_is_none(fails, tmp_path):
    text = fails(**file_of(tmp_path, rows(images=[{"bytes": b"not a picture", "path": None}])))
    assert "mine.parquet row 1: image 0 (13 bytes) cannot be read" in text
    assert "drop the row" in text


def test_an_unknown_verifier(fails, tmp_path):
    reward = rows()[1]["reward_model"] | {"verifier": "mathverfy"}
    text = fails(**file_of(tmp_path, rows(reward_model=reward)))
    assert "mine.parquet row 1: unknown verifier 'mathverfy'; did you mean 'mathverify'?" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ground_truth": "seven"}, "math-verify cannot read the ground truth 'seven'; write it"),
        ({"verifier": "detection"}, "verifier detection: the ground truth holds no box: "),
        (
            {"verifier": "counting", "verifier_parm": {"json": '{"tolerence": 1}'}},
            "verifier counting: unknown parameter 'tolerence'; did you mean 'tolerance'?",
        ),
    ],
)
def test_a_row_that_its_verifier_could_never_judge(fails, tmp_path, changes, said):
    reward = rows()[1]["reward_model"] | changes
    text = fails(**file_of(tmp_path, rows(reward_model=reward)))
    assert "mine.parquet row 1: verifier " in text
    assert said in text
    assert text.endswith("; correct reward_model or drop the row\n")
    shutil.rmtree(tmp_path / "run")
    keys = file_of(tmp_path, rows(reward_model=reward)[1:])
    text = fails(data_on_bad_row="skip", **keys)
    assert "mine.parquet: no usable rows (1 skipped): " in text
    assert said in text


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Makes the training rows ask for a verifier of the user's, of that source."""
    info = tmp_path / "site" / "own-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vtriune_jax.verifiers]\nown = own_verifier")
    monkeypatch.syspath_prepend(info.parent)
    monkeypatch.setenv("PYTHONPATH", str(info.parent))
    known_verifiers.cache_clear()

    def add(source):
        (info.parent / "own_verifier.py").write_text(source)
        own = {"reward_model": rows()[1]["reward_model"] | {"verifier": "own"}}
        return file_of(tmp_path, [each | own for each in rows()])

    yield add
    known_verifiers.cache_clear()


@pytest.mark.parametrize("mode", ["in_process", "server"])
def test_a_verifier_that_cannot_be_imported(fails, own, mode):
    keys = own("def verify(completion, ground_truth, params, progress)\n    return {}\n")
    text = fails(verifiers_mode=mode, data_on_bad_row="skip", **keys)
    assert "own_verifier.py: verifier 'own' cannot be imported (SyntaxError: expected ':'" in text


@pytest.mark.parametrize(("rows_before", "what"), [(0, "32 grpo"), (2, "2 held-out")])
def test_a_start_at_which_nothing_is_judged(fails, own, rows_before, what):
    keys = own("def verify(completion, ground_truth, params, progress):\n    return params['no']\n")
    ((file, _),) = keys["data_train"]
    text = fails(**keys, data_heldout=(file,), eval_rows_per_source=rows_before)
    assert f"none of {what} completions could be judged, the first because: verifier err" in text
    assert re.search(r"in digits_math, row math-train-0-[01]: KeyError: 'no'; correct rew", text)


def test_completions_longer_than_their_slot(fails, tmp_path):
    text = fails(stages="sft", batch_completion_tokens=3, eval_rows_per_source=0)
    assert re.match(r"error: /\S+/train_\w+.parquet row \d+: the demonstration has \d+ tok", text)
    assert "tokens, its slot 3; raise batch.completion_tokens or drop the row" in text


def test_a_corrupt_parquet(fails, tmp_path):
    keys = file_of(tmp_path, rows())
    path = tmp_path / "mine.parquet"
    os.truncate(path, path.stat().st_size // 2)
    text = fails(**keys)
    assert f"{path}: not a readable parquet file" in text
    assert "write or download it again" in text


def test_a_source_that_does_not_exist(fails, tmp_path):
    assert "does not exist; give a parquet file" in fails(data_train=((str(tmp_path / "x"), 1),))


def test_a_built_in_name_with_a_typo(fails):
    assert "did you mean 'digits/counting'?" in fails(data_heldout=("digits/cuonting",))


def test_keys_that_are_wrong_are_named_together(fails):
    text = fails(grpo_sampels=8, sft_lr="fast", batch_micro_batches=3)
    for part in ("4 mistakes", "did you mean grpo.samples?", "sft.lr='fast'", "choose 6 or 9"):
        assert part in text


def test_a_model_that_is_no_checkpoint(fails, tmp_path, warm):
    assert f"cannot read {tmp_path / 'config.json'}" in fails(model_path=tmp_path)
    shutil.copytree(warm / "final", tmp_path / "copy")
    (tmp_path / "copy" / "preprocessor_config.json").unlink()
    shutil.rmtree(tmp_path / "run")
    text = fails(model_path=tmp_path / "copy")
    assert "preprocessor_config.json is missing; give a folder of a Qwen2.5-VL checkpoint" in text
    (tmp_path / "copy" / "model.safetensors").write_bytes(b"\0" * 100)
    assert str(tmp_path / "copy" / "model.safetensors") in fails(model_path=tmp_path / "copy")


def test_a_run_and_a_name_on_the_hub_given_as_the_model(fails, tmp_path, warm):
    assert f"is the workdir of a run, not a model; did you mean {warm}/final?" in fails(
        model_path=warm
    )
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    text = fails(model_path=tmp_path / "unfinished")
    assert f"python -m vtriune_jax.export --checkpoint={tmp_path / 'unfinished'}" in text
    text = fails(model_path="Qwen/Qwen2.5-VL-3B-Instruct")
    assert "names on the hub are not fetched, download it first: hf download Qwen/Qwen2.5" in text
    assert f"model.path={tmp_path / 'no'} is no folder; give the folder" in fails(
        model_path=tmp_path / "no"
    )


@pytest.mark.parametrize(("stage", "heldout"), [("sft", 0), ("grpo", 0), ("grpo", 2)])
def test_prompts_longer_than_their_slot(fails, stage, heldout):
    """In imitation, in a rollout and in the evaluation."""
    text = fails(stages=stage, batch_prompt_tokens=20, eval_rows_per_source=heldout)
    assert re.match(r"error: /\S+/(train|heldout)_\w+.parquet row \d+: the prompt has", text)
    assert "20" in text
    assert "raise batch.prompt_tokens or drop the row" in text


def test_images_that_fill_more_windows(fails):
    text = fails(stages="sft", batch_windows=1)
    assert "windows, batch.windows=1; raise batch.windows or lower data.max_pixels" in text


def test_more_devices_than_there_are(fails):
    assert "mesh data=3 fsdp=-1 tensor=1 does not divide 1 devices" in fails(mesh_data=3)


def test_a_verifier_server_that_does_not_start(fails, tmp_path, monkeypatch):
    (tmp_path / "fastapi.py").write_text("raise ImportError('no fastapi here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    text = fails(verifiers_mode="server")
    assert "the verifier server did not start: ImportError: no fastapi here" in text
    assert "verifiers.mode='in_process'" in text


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of so many KiB and returns its folder; a second call resizes it."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        again = ",remount" if folder.is_mount() else ""
        options = ["-t", "tmpfs", "-o", f"size={size}k{again}", "none", str(folder)]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_small_at_first_and_then_larger(small_disk, warm, data, capsys):
    keys = {"model_path": warm / "final", "stages": "sft", **data}
    workdir = small_disk(1000) / "run"
    assert main(arguments(workdir, **keys)) == 2
    text = one_line(capsys.readouterr().err)
    assert f"no space left to write {workdir}/checkpoints/sft (1.7 MiB needed" in text
    assert "free some space" in text
    small_disk(20000)
    assert main(arguments(workdir, **keys)) == 0
    assert len(records(workdir)) == 3


def test_a_disk_that_is_too_small_for_the_model(small_disk, warm):
    model = models.load_pretrained(warm / "final")
    with pytest.raises(UserError, match=r"cannot write the checkpoint .*No space left .*free"):
        models.save_pretrained(model, small_disk(100) / "final")


FULL = Path("/dev/full")
needs_dev_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full to write to")


def full_from_now_on(writer: MetricsWriter, step: int) -> None:
    writer._file.close()
    writer._file = FULL.open("a")


@needs_dev_full
def test_a_disk_that_is_full_at_a_line_of_metrics(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(MetricsWriter, "resume", full_from_now_on)
    text = fails()
    assert f"no space left to write {tmp_path / 'run' / 'metrics.jsonl'}" in text
    assert "free some space" in text
    assert "start the same command again" in text


@needs_dev_full
def test_a_disk_that_is_full_at_a_line_of_progress(fails, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "progress.log").symlink_to(FULL)
    assert f"no space left to write {tmp_path / 'run' / 'progress.log'}" in fails()


def test_a_disk_that_is_too_full_for_a_checkpoint(fails, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 1000))
    text = fails()
    assert f"no space left to write {tmp_path / 'run' / 'checkpoints' / 'sft'}" in text
    assert "MiB needed" in text


def test_settings_of_another_run(fails, tmp_path, warm, data):
    """They are refused once something was trained, and what is refused leaves all as it was."""
    keys = {"model_path": warm / "final", "stages": "sft", "sft_steps": 2, **data}
    fails(stages="sft", batch_windows=1)
    assert main(arguments(tmp_path / "run", **keys)) == 0
    noted = (tmp_path / "run" / "config.json").read_bytes()
    text = fails(stages="sft", sft_steps=2, grpo_steps=3, seed=7)
    assert "holds a run with other settings (seed 0 → 7): choose a new --workdir" in text
    text = fails(stages="sft", sft_steps=1, grpo_steps=3)
    assert "sft.steps=1, but the run in" in text
    assert "has trained 2 steps already: choose 2 or more, or a new --workdir" in text
    fails(stages="sft", sft_steps=3, grpo_steps=3, mesh_data=3)
    assert (tmp_path / "run" / "config.json").read_bytes() == noted


def test_a_resume_that_other_data_refuse_leaves_the_settings(fails, tmp_path, warm, data):
    keys = {"model_path": warm / "final", "stages": "sft", "sft_steps": 1, "grpo_steps": 1}
    keys |= data | file_of(tmp_path, rows())
    assert main(arguments(tmp_path / "run", **keys)) == 0
    noted = (tmp_path / "run" / "config.json").read_bytes()
    text = fails(**keys | file_of(tmp_path, [*rows(), rows()[0]]) | {"sft_steps": 2})
    assert "has 3 rows, the checkpoint saw 2" in text
    assert (tmp_path / "run" / "config.json").read_bytes() == noted
    keys |= file_of(tmp_path, rows()) | {"sft_steps": 2}
    assert main(arguments(tmp_path / "run", **keys)) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sft"]["steps"] == 2


def test_a_mistake_at_the_first_start_locks_nothing(fails, tmp_path, warm, data):
    fails(data_heldout=("nowhere.parquet",))
    assert main(arguments(tmp_path / "run", model_path=warm / "final", stages="sft", **data)) == 0


def test_as_a_program(tmp_path, warm, data):
    """Nothing else is written to stderr, by no library; the metrics so far stay."""
    keys = {"model_path": warm / "final", "sft_steps": 1, **data}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "grpo").write_text("a file where a folder should be")
    ended = subprocess.run(
        command(tmp_path / "run", **keys), env=environment(), capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert str(tmp_path / "run" / "checkpoints" / "grpo") in one_line(ended.stderr)
    assert len(records(tmp_path / "run")) == 1
