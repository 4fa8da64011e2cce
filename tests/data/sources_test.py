import contextlib
import dataclasses
import io
import multiprocessing
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.conftest import make_sample, png
from vtriune_jax.data import digits, schema, sources
from vtriune_jax.errors import UserError
from vtriune_jax.types import Message

KNOWN = {"mathverify", "detection"}


def row(**changes):
    """One row as plain Python, with dotted names for the changes."""
    cells = {
        "data_source": "toy",
        "images": [{"bytes": png(), "path": None}],
        "prompt": [{"role": "user", "content": "<image>How many?"}],
        "reward_model": {"verifier": "mathverify", "ground_truth": "\\boxed{4}"},
    }
    for name, value in changes.items():
        outer, _, inner = name.partition("__")
        if inner:
            cells[outer] = {**cells[outer], inner: value}
        else:
            cells[outer] = value
    return cells


def write_plain(path, *rows, schema=None):
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
    return str(path)


def write(path, *samples):
    sources.write_parquet([schema.to_row(s) for s in samples], path)
    return path


def error_of(path, **options):
    with pytest.raises(UserError) as caught:
        sources.load(str(path), "train", **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------ what is read


def test_every_field_survives_the_file(tmp_path):
    box = schema.DETECTION_RATIOS | {"map": 0.5}
    boxes = make_sample(verifier="detection")
    params = {"det_verifier_normalized": True, "det_reward_ratio": box}
    boxes = dataclasses.replace(boxes, reward=dataclasses.replace(boxes.reward, params=params))
    talk = (Message("system", "Be brief."), Message("user", "<image>a<image>"))
    two = make_sample(messages=talk, images=(png(), png(seed=1)), id="8")
    none = make_sample("No picture", images=(), id="9")
    path = write(tmp_path / "a.parquet", boxes, two, none)
    read = list(sources.load(str(path), "train", known_verifiers=KNOWN))
    assert read[1:] == [two, none]
    ratios = dict(read[0].reward.params["det_reward_ratio"])
    assert ratios == pytest.approx(box)
    assert read[0].reward.params["det_verifier_normalized"] is True
    assert read[1].reward.params == {}


def test_parameters_of_any_verifier_survive_the_file(tmp_path):
    params = {"choices": ["a cat", "a dog"], "iou_threshold": {"bounds": [], "values": [0.7]}}
    sample = make_sample()
    sample = dataclasses.replace(sample, reward=dataclasses.replace(sample.reward, params=params))
    path = write(tmp_path / "a.parquet", sample)
    (read,) = sources.load(str(path), "train")
    assert read.reward.params == params


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_parameters_that_are_no_json_object(tmp_path, text):
    bad = row()
    bad["reward_model"]["verifier_parm"] = {"json": text}
    assert "verifier_parm.json is" in error_of(write_plain(tmp_path / "a.parquet", bad))


def test_a_minimal_file_of_plain_pyarrow(tmp_path):
    path = write_plain(
        tmp_path / "mine.parquet",
        row(),
        row(images=None, prompt=[{"role": "user", "content": "No picture"}]),
    )
    source = sources.load(path, "train")
    assert len(source) == 2
    assert source.data_sources == ("toy",)
    first, second = source
    assert first.images == (png(),)
    assert first.id == "mine:0"
    assert first.demonstration == first.reward.ground_truth == "\\boxed{4}"
    assert (first.reward.accuracy_ratio, first.reward.format_ratio) == (1.0, 0.0)
    assert (second.images, second.id) == ((), "mine:1")
    assert source[:1] == [first]
    assert source[-1] == second


def test_images_as_plain_binary_and_as_files(tmp_path):
    path = write_plain(tmp_path / "binary.parquet", row(images=[png(seed=3)]))
    assert sources.load(path, "train")[0].images == (png(seed=3),)
    (tmp_path / "x.png").write_bytes(png(seed=4))
    cell = {"bytes": None, "path": str(tmp_path / "x.png")}
    path = write_plain(tmp_path / "paths.parquet", row(images=[cell]))
    assert sources.load(path, "train")[0].images == (png(seed=4),)
    (tmp_path / "x.png").unlink()
    assert "row 0: image file" in error_of(path)


def test_hf_datasets_decodes_our_files(tmp_path):
    path = write(tmp_path / "a.parquet", make_sample())
    read = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf")
    )
    picture = read[0]["images"][0]
    assert isinstance(picture, Image.Image)
    np.testing.assert_array_equal(picture, Image.open(io.BytesIO(png())))
    assert read[0]["reward_model"]["verifier_parm"]["det_verifier_normalized"] is None


def test_saved_hf_datasets(tmp_path):
    path = write(tmp_path / "a.parquet", *(make_sample(id=str(k)) for k in range(4)))
    read = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf")
    )
    read.select([2, 0]).save_to_disk(tmp_path / "saved")
    source = sources.load(str(tmp_path / "saved"), "train")
    assert [s.id for s in source] == ["2", "0"]
    assert source[0].images == (png(),)
    datasets.DatasetDict(test=read).save_to_disk(tmp_path / "splits")
    assert len(sources.load(str(tmp_path / "splits"), "heldout")) == 4
    assert "no split 'train', only test" in error_of(tmp_path / "splits")
    (tmp_path / "saved" / "state.json").write_text("{")
    assert "not a readable dataset folder" in error_of(tmp_path / "saved")


def test_names_on_the_hub(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", make_sample())
    read = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "hf")
    )
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: {("o/n", "test"): read}[name, split]
    )
    assert sources.load("o/n", "heldout")[0] == make_sample()

    def fails(name, split):
        raise FileNotFoundError(f"{name} is not there")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    text = error_of("digit/ocr")
    assert "'digit/ocr' is no local path" in text
    assert "digits/ocr" in text


def test_folders_and_globs(tmp_path):
    for name in ("train/train_a_x_1", "train/train_b_x_1", "test/test_a_x_1"):
        write(tmp_path / f"{name}.parquet", make_sample(id=name))
    assert [s.id[-5:] for s in sources.load(str(tmp_path), "train")] == ["a_x_1", "b_x_1"]
    assert [s.id for s in sources.load(str(tmp_path), "heldout")] == ["test/test_a_x_1"]
    assert len(sources.load(f"{tmp_path}/*/*_a_*.parquet", "train")) == 2

    flat = tmp_path / "flat"
    write(flat / "train_a_x_1.parquet", make_sample(id="1"))
    write(flat / "test_a_x_1.parquet", make_sample(id="2"))
    assert [s.id for s in sources.load(str(flat), "train")] == ["1"]
    assert [s.id for s in sources.load(str(flat), "heldout")] == ["2"]

    write(tmp_path / "loose" / "mine.parquet", make_sample(id="3"))
    assert [s.id for s in sources.load(str(tmp_path / "loose"), "train")] == ["3"]
    with pytest.raises(UserError, match=r"no parquet file for the heldout split; expected test/"):
        sources.load(str(tmp_path / "loose"), "heldout")


# ------------------------------------------------------------------------------------ built in


@pytest.mark.parametrize("task", digits.TASKS)
def test_builtin_sources_come_through_the_same_door(tmp_path, task):
    source = sources.load(
        f"digits/{task}", "heldout", cache=tmp_path, heldout_rows=7, known_verifiers=KNOWN
    )
    made = list(digits.samples(task, "heldout", 7))
    assert len(source) == 7
    for read, expected in zip(source, made, strict=True):
        assert (read.images, read.messages) == (expected.images, expected.messages)
        assert read.demonstration == expected.demonstration
        assert read.reward.ground_truth == expected.reward.ground_truth
    (file,) = tmp_path.rglob("*.parquet")
    assert file.name == f"test_{task}_digits_7.parquet"
    before = file.stat().st_mtime_ns
    sources.load(f"digits/{task}", "heldout", cache=tmp_path, heldout_rows=7)
    assert file.stat().st_mtime_ns == before
    sources.load(f"digits/{task}", "heldout", cache=tmp_path, heldout_rows=7, seed=1)
    assert len(list(tmp_path.rglob("*.parquet"))) == 2


def load_in_process(folder, queue):
    queue.put(len(sources.load("digits/ocr", "train", cache=folder, train_rows=50)))


def test_two_processes_may_write_the_cache_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=load_in_process, args=(tmp_path, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [50, 50]
    for worker in workers:
        worker.join()
    assert len(list(tmp_path.rglob("*"))) == 3  # two folders and one file: no drafts left


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(UserError, match=r"cannot be written.*No space left.*free some space"):
        sources.write_parquet([schema.to_row(make_sample())], tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []


def test_builtin_errors(tmp_path):
    assert "did you mean 'digits/counting'?" in error_of("digits/countin", cache=tmp_path)
    assert "needs a cache folder" in error_of("digits/ocr")


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row(images=[]), "the prompt has 1 <image> but the row has 0 images"),
        (row(images=None), "the prompt has 1 <image> but the row has 0 images"),
        (row(images=[{"bytes": png(), "path": None}] * 2), "1 <image> but the row has 2 images"),
        (row(images=[{"bytes": None, "path": None}]), "an image is null"),
        (row(images=[{"bytes": None, "path": "a\0b"}]), "image file 'a\\x00b' cannot be read (emb"),
        (row(images=[{"bytes": None, "path": "no.png"}]), "'no.png' cannot be read (No such file"),
        (row(images=[{"bytes": b"GIF?", "path": None}]), "image 0 (4 bytes) cannot be read"),
        (row(prompt=[]), "prompt is [], expected one or more chat turns"),
        (row(prompt=None), "prompt is None"),
        (row(prompt=[None]), "prompt is [None]"),
        (row(prompt=[{"role": "user", "content": None}]), "prompt.content is None"),
        (row(prompt=[{"role": "user", "content": "<image><video>"}]), "the prompt has <video>,"),
        (row(prompt=[{"role": "user", "content": "<|video_pad|>"}]), "has <|video_pad|>, but rows"),
        (row(prompt=[{"role": "<|image_pad|>", "content": "?"}]), "the prompt has <|image_pad|>,"),
        (row(videos=[b"mp4"]), "the column videos is not empty, but rows cannot have videos yet"),
        (row(data_source=None), "data_source is None"),
        (row(data_source=""), "data_source is ''"),
        (row(reward_model=None), "reward_model.verifier is None"),
        (row(reward_model__ground_truth=None), "reward_model.ground_truth is None"),
        (row(reward_model__verifier="mathverfy"), "did you mean 'mathverify'?"),
        (row(reward_model__format_ratio=-0.5), "format_ratio is -0.5, expected a number ≥ 0"),
        (row(reward_model__accuracy_ratio=float("nan")), "accuracy_ratio is nan"),
        (row(reward_model__accuracy_ratio=0.0), "both 0, so the row has no reward"),
    ],
)
def test_bad_rows_are_named_or_skipped(tmp_path, bad, message):
    path = write_plain(tmp_path / "bad.parquet", row(videos=[]), bad, row())
    text = error_of(path, known_verifiers=KNOWN)
    assert text.startswith(f"{path} row 1: ")
    assert message in text
    source = sources.load(path, "train", known_verifiers=KNOWN, on_bad_row="skip")
    assert [s.id for s in source] == ["bad:0", "bad:2"]
    assert (source.skipped, source.first_fault) == (1, text)


def test_rows_are_checked_for_their_verifiers(tmp_path):
    asked = []

    def check(rows):
        asked.extend(rows)
        return [f"{name} cannot judge {truth}" if truth == "7" else "" for name, truth, _ in rows]

    bad = row(reward_model__ground_truth="7", data_source="sevens")
    path = write_plain(tmp_path / "a.parquet", row(), row(images=[]), bad, row())
    source = sources.load(path, "train", on_bad_row="skip", check=check)
    assert [s.id for s in source] == ["a:0", "a:3"]
    assert source.skipped == 2
    assert "sevens" not in source.data_sources
    name, truth = row()["reward_model"]["verifier"], row()["reward_model"]["ground_truth"]
    assert asked == [(name, truth, {}), (name, "7", {}), (name, truth, {})]
    path = write_plain(tmp_path / "b.parquet", row(), bad)
    text = error_of(path, check=check)
    words = f"{name} cannot judge 7; correct reward_model or drop the row"
    assert text == f"{path} row 1: {words}"


def test_a_verifier_at_fault_is_no_fault_of_rows(tmp_path):
    def check(rows):
        raise UserError("own.py: verifier 'own' cannot be imported")

    path = write_plain(tmp_path / "a.parquet", row())
    assert error_of(path, check=check, on_bad_row="skip").startswith(
        "own.py: verifier 'own' cannot"
    )


def test_a_picture_that_pillow_takes_amiss(tmp_path):
    """A damaged AVIF is a RuntimeError of Pillow's."""
    Image.init()
    if "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow writes no AVIF")
    Image.new("RGB", (20, 20)).save(buffer := io.BytesIO(), "AVIF")
    head, _, rest = buffer.getvalue().partition(b"pitm")  # tells which item is shown
    broken = head + b"\0\0\0\0" + rest
    text = error_of(write_plain(tmp_path / "a.parquet", row(images=[broken])))
    assert re.search(r"row 0: image 0 \(\d+ bytes\) cannot be read as a picture", text)


def test_only_bad_rows(tmp_path):
    path = write_plain(tmp_path / "bad.parquet", row(images=[]))
    text = error_of(path, on_bad_row="skip")
    assert "no usable rows (1 skipped)" in text
    assert "row 0: the prompt has 1 <image>" in text


def test_text_that_is_not_utf8(tmp_path):
    table = pa.Table.from_pylist([row()])
    broken = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    table = table.set_column(0, "data_source", broken)
    pq.write_table(table, tmp_path / "a.parquet")
    assert "row 0: a text is not UTF-8" in error_of(tmp_path / "a.parquet")


def test_damaged_files(tmp_path):
    whole = write(tmp_path / "a.parquet", *[make_sample()] * 3).read_bytes()
    rng = np.random.default_rng(0)
    bad = tmp_path / "bad.parquet"
    for data in (b"", b"hello", whole[:100], whole[: len(whole) // 2], whole[:-1], whole[100:]):
        bad.write_bytes(data)
        assert "not a readable parquet file" in error_of(bad)
    for _ in range(40):
        data = bytearray(whole)
        for place in rng.integers(0, len(whole), 5):
            data[place] = rng.integers(256)
        bad.write_bytes(bytes(data))
        with contextlib.suppress(UserError):  # any other exception is a failure
            sources.load(str(bad), "train")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jsonl", "json"), ("a.json", "json"), ("a.csv", "csv"), ("a.jsonl.gz", "json")],
)
def test_other_formats_are_told_how_to_become_parquet(tmp_path, name, kind):
    (tmp_path / name).write_text('{"data_source": "toy"}\n')
    for given in (tmp_path / name, tmp_path / "a.*"):
        text = error_of(given)
        assert f'load_dataset("{kind}", data_files="{tmp_path / name}", split="train")' in text
        assert text.endswith(f'.to_parquet("{tmp_path / "a.parquet"}")')


def test_empty_and_missing(tmp_path):
    path = write_plain(tmp_path / "a.parquet", schema=schema.arrow_schema())
    assert "the file has no rows" in error_of(path)
    for name in (
        tmp_path / "nothing.parquet",
        "data/nothing.parquet",
        "tests/nothing",
        "nothing",
        "o/n.jsonl",
    ):
        assert "does not exist" in error_of(name)
    assert "matches no file" in error_of(tmp_path / "*.parquet.gz")
    (tmp_path / "empty").mkdir()
    assert "no parquet file for the train split" in error_of(tmp_path / "empty")
