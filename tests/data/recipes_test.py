import ast
import json
import re
from pathlib import Path

import pytest

from configs import base
from tests.data.conftest import png
from vtriune_jax import config as configs
from vtriune_jax.data import recipes, sources
from vtriune_jax.errors import UserError
from vtriune_jax.verifiers import known_verifiers
from vtriune_jax.verifiers.checking import faults

SHARED = Path(__file__).parents[3] / "shared" / "data"
VOC = """<annotation><size><width>200</width><height>100</height><depth>3</depth></size>{}
</annotation>"""
OBJECT = """<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>
<ymax>{}</ymax></bndbox></object>"""


def need(name):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is missing: it comes with the workplace, not with a clone")
    return SHARED / name


def voc_folder(folder, *pictures):
    """Write pictures, each a list of (kind, x1, y1, x2, y2)."""
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True)
    for number, objects in enumerate(pictures):
        (folder / "images" / f"p{number}.jpg").write_bytes(png(200, 100))
        text = VOC.format("".join(OBJECT.format(*item) for item in objects))
        (folder / "annotations" / f"p{number}.xml").write_text(text)
    return folder


def load(folder, split):
    return list(sources.load(str(folder), split, known_verifiers=known_verifiers(), check=faults))


def test_voc_boxes_become_rows(tmp_path):
    picture = [("WBC", 20, 10, 60, 50), ("Platelets", 100, 0, 201, 40), ("RBC", 5, 5, 5, 9)]
    folder = voc_folder(tmp_path / "in", picture, picture)
    files = recipes.convert("bccd", folder, tmp_path / "out")
    assert [f.name for f in files] == [
        "test_counting_bccd_2.parquet",
        "test_detection_bccd_1.parquet",
        "train_counting_bccd_2.parquet",
        "train_detection_bccd_1.parquet",
    ]
    *counting, detection = load(tmp_path / "out", "train")
    assert [s.reward.answer for s in counting] == ["1", "1"]
    assert {s.data_source for s in counting} == {"bccd_counting"}
    assert "\n- platelet\n- white blood cell\n" in detection.messages[0].content
    assert detection.reward.params["det_verifier_normalized"] is True
    assert ast.literal_eval(detection.reward.ground_truth.split("\n")[1]) == [
        {"bbox_2d": [100, 100, 300, 500], "label": "white blood cell"},
        {"bbox_2d": [500, 0, 1000, 400], "label": "platelet"},
    ]
    # the demonstration speaks in pixels of the picture as the model sees it, here 196×112
    assert json.loads(detection.demonstration.split("\n")[4])[0]["bbox_2d"] == [20, 11, 59, 56]


def test_crowds_and_large_boxes_are_not_for_detection(tmp_path):
    crowd = [("RBC", k, 0, k + 5, 5) for k in range(11)]
    large = [("WBC", 0, 0, 200, 60)]
    folder = voc_folder(tmp_path / "in", crowd, crowd, large)
    files = recipes.convert("bccd", folder, tmp_path / "out")
    assert not any("detection" in file.name for file in files)
    assert [s.reward.answer for s in load(tmp_path / "out", "train")] == ["11", "1"]


def test_puzzles_become_rows(tmp_path):
    (tmp_path / "x.png").write_bytes(png())
    puzzle = {"image": "x.png", "question": "Which?", "explanation": "A.", "deduction": "B."}
    lines = [
        puzzle | {"answer": 9, "options": ["4", "9"]},
        puzzle | {"answer": "dark red", "options": ["dark red", "red"]},
    ]
    (tmp_path / "toy.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipes.convert("puzzlevqa", tmp_path, tmp_path / "out")
    (number,) = load(tmp_path / "out", "heldout")
    (word,) = load(tmp_path / "out", "train")
    assert number.reward.ground_truth == "\\boxed{9}"
    assert word.reward.ground_truth == "\\boxed{dark red}"
    assert word.messages[0].content == "<image>Which? The answer is one of: dark red, red."
    assert word.demonstration == "A. B.\n\\boxed{dark red}"


def test_bad_input(tmp_path, capsys):
    def fails(recipe, folder, match):
        with pytest.raises(UserError, match=match):
            recipes.convert(recipe, folder, tmp_path / "out")

    fails("bccd", tmp_path, r"no \*\.xml here; check --input")
    folder = voc_folder(tmp_path / "in", [("RBC", 1, 2, 30, 40)])
    (folder / "images" / "p0.jpg").rename(folder / "p0.jpg")
    fails("bccd", folder, "p0.jpg: No such file or directory; the recipe needs every picture")
    (folder / "p0.jpg").rename(folder / "images" / "p0.jpg")
    annotation = folder / "annotations" / "p0.xml"
    for text in ("<annotation>", "<annotation/>", VOC.format("<object/>"), VOC.replace("200", "0")):
        annotation.write_text(text.format(OBJECT.format("RBC", 1, 2, 3, 4)))
        fails("bccd", folder, "p0.xml: not a VOC annotation")
    (tmp_path / "toy.jsonl").write_text('{"image": "x.png"}')
    fails("puzzlevqa", tmp_path, "toy.jsonl line 1: not a puzzle")
    assert not (tmp_path / "out").exists()
    arguments = ["bccd", "--input", str(tmp_path / "no"), "--out", str(tmp_path)]
    assert recipes.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_other_files_in_the_way(tmp_path):
    folder = voc_folder(tmp_path / "in", [("RBC", 1, 2, 30, 40)])
    recipes.convert("bccd", folder, tmp_path / "out")
    recipes.convert("bccd", folder, tmp_path / "out")  # the same again is fine
    (tmp_path / "out" / "test" / "old.parquet").touch()
    with pytest.raises(UserError, match=r"old\.parquet is there already; give an empty folder"):
        recipes.convert("bccd", folder, tmp_path / "out")


def test_help_names_the_data_sets_and_keys_that_there_are(capsys):
    with pytest.raises(SystemExit):
        recipes.main(["--help"])
    text = capsys.readouterr().out
    assert "BCCD" in text
    assert "PuzzleVQA" in text
    keys = re.findall(r"config\.([\w.]+)", recipes.__doc__)
    assert keys == ["data.train", "data.heldout"]
    assert set(keys) <= set(configs.flatten(base.get_config()))


def test_real_blood_cells(tmp_path, capsys):
    folder = need("bccd")
    assert recipes.main(["bccd", "--input", str(folder), "--out", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.split()) == 4
    heldout = load(tmp_path, "heldout")
    assert {s.data_source for s in heldout} == {"bccd_counting", "bccd_detection"}
    for sample in heldout:
        if sample.data_source == "bccd_detection":
            for box in ast.literal_eval(sample.reward.answer):
                x1, y1, x2, y2 = box["bbox_2d"]
                assert 0 <= x1 < x2 <= 1000
                assert 0 <= y1 < y2 <= 1000
    assert not {s.id for s in heldout} & {s.id for s in load(tmp_path, "train")}


def test_real_puzzles(tmp_path):
    assert len(recipes.convert("puzzlevqa", need("puzzlevqa"), tmp_path)) == 2
    rows = load(tmp_path, "train") + load(tmp_path, "heldout")
    assert len(rows) == 600
    numbers = [s.reward.answer.isdigit() for s in rows]
    assert 100 < sum(numbers) < 500
