import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vtriune_jax.metrics import SourceMean
from vtriune_jax.report import SampleView, curves, draw_boxes, read_records, write_report
from vtriune_jax.types import Verdict
from vtriune_jax.verifiers.parsing import LabelledBox

BLUE, ORANGE, BLACK = (30, 144, 255), (255, 140, 0), (0, 0, 0)


def png(width: int = 112, height: int = 84, mode: str = "L") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, "PNG")
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def box(*coords: float, label: str = "") -> LabelledBox:
    x1, y1, x2, y2 = coords
    return LabelledBox((x1, y1, x2, y2), label)


class Balance(HTMLParser):
    """Collects tags; complains about one that closes what is not open."""

    VOID = frozenset(("meta", "img"))

    def __init__(self, page: str):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def workdir(tmp_path):
    lines = [{"step": s, "stage": "sft", "loss": 3.0 - s, "grad_norm": None} for s in (1, 2)]
    lines += [
        {"step": s, "stage": "grpo", "reward": 0.5, "reward/a_b": s / 9, "kl/c": 0.1, "odd/c": 1.0}
        for s in (3, 4, 5)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 6, "st')
    return tmp_path


def write(workdir, *samples: SampleView) -> str:
    write_report(
        workdir,
        title="a < b",
        before={"a/b": SourceMean(0.25, 8), "c": SourceMean(None, 0, 8)},
        after={"a/b": SourceMean(0.75, 6, 2), "c": SourceMean(0.5, 8)},
        facts={"devices": "1 × cpu"},
        samples=samples,
    )
    return (workdir / "report.html").read_text("utf-8")


def test_boxes_are_drawn_where_they_are_on_a_picture_grown_by_a_whole_factor():
    picture = opened(draw_boxes(png(), [box(20, 20, 60, 60)], [box(70, 10, 100, 40)]))
    assert (picture.format, picture.size) == ("PNG", (560, 420))
    assert picture.getpixel((100, 200)) == ORANGE
    assert picture.getpixel((350, 100)) == BLUE
    assert picture.getpixel((200, 200)) == BLACK


def test_a_perfect_answer_shows_both_colours():
    picture = opened(draw_boxes(png(), [box(20, 20, 60, 60)], [box(20, 20, 60, 60)]))
    assert {color for _, color in picture.getcolors()} == {BLUE, ORANGE, BLACK}


@pytest.mark.parametrize("coords", [(-1e9, -5, 1e9, 5e8), (200, 200, 300, 300), (90, 80, 10, 5)])
def test_boxes_beyond_the_picture_or_turned_round_are_drawn_at_its_border(coords):
    drawn = draw_boxes(png(), [box(*coords, label="a long label of many words " * 9)], [])
    assert opened(drawn).size == (560, 420)


@pytest.mark.parametrize("mode", ["RGBA", "P", "1", "L"])
def test_large_pictures_shrink_and_every_mode_is_read(mode):
    assert opened(draw_boxes(png(2000, 10, mode), [], [])).size == (560, 3)


def test_the_page_is_whole_escaped_and_needs_no_network(workdir):
    sample = SampleView(
        source="a/b",
        prompt="<script>alert(1)</script>",
        completion="<answer>[{'label': 'x'}]</answer>\ud800",
        truth='"&"',
        verdict=Verdict("ok", 0.75, {"accuracy": 0.7, "iou_50": 0.9}),
        image=png(),
        predicted=[box(1, 2, 30, 40, label="x")],
    )
    page = write(
        workdir, sample, SampleView("c", "p", "", "t", Verdict("timeout", reason="<30 s>"))
    )
    parsed = Balance(page)
    assert parsed.open == []
    tags = {tag for tag, _ in parsed.seen}
    assert not tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"https?:|@import|url\(", page)
    assert all(a.get("src", "data:").startswith("data:") for _, a in parsed.seen)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "reward 0.750" in page
    assert "not judged: timeout" in page
    assert "&lt;30 s&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_control_characters_of_a_completion_become_visible(workdir):
    text = "".join(map(chr, range(160)))
    page = write(workdir, SampleView("a", text, text, text, Verdict("error", reason=text)))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    assert "␀␁␂␃␄␅␆␇␈\t\n␋␌␍" in page


def test_the_pictures_of_the_page_are_files_too(workdir):
    page = write(workdir, SampleView("a/b c", "p", "c", "t", Verdict("ok"), image=png()))
    [data] = re.findall(r"base64,([^\"]+)", page)
    assert base64.b64decode(data) == (workdir / "samples" / "01_a_b_c.png").read_bytes()


def test_the_table_has_every_source_and_the_mean(workdir):
    page = write(workdir)
    rows = re.findall(r"<tr><th>(.*?)</tr>", page)
    texts = [re.sub(r"<svg.*?</svg>|<[^>]*>", " ", row).split() for row in rows[1:]]
    assert texts == [
        ["a/b", "0.250", "0.750", "+0.500", "6", "+", "2", "failed"],
        ["c", "–", "0.500", "–", "8"],
        ["mean", "0.250", "0.625", "+0.375", "14"],
    ]


def test_curves_are_grouped_by_metric_and_what_is_uncommon_is_folded(workdir):
    found = curves(read_records(workdir / "metrics.jsonl"))
    assert set(found) == {"loss", "reward", "kl", "odd"}
    assert found["loss"] == {"all": [(1, 2.0), (2, 1.0)]}
    assert set(found["reward"]) == {"all", "a_b"}
    page = write(workdir)
    assert "1 more curves" in page
    assert page.index("<h3>Reward</h3>") < page.index("<h3>KL") < page.index("<h3>odd</h3>")
    assert ">sft</text>" in page
    assert ">grpo</text>" in page


def test_a_run_without_steps_samples_or_rewards_has_a_page(tmp_path):
    write_report(tmp_path, title="empty", before={}, after={}, facts={}, samples=[])
    assert "<section>" not in (tmp_path / "report.html").read_text()


def test_the_picture_keeps_its_pixels():
    values = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    drawn = np.asarray(opened(draw_boxes(out.getvalue(), [], [], side=40)))[..., 0]
    assert np.array_equal(drawn, np.kron(values, np.ones((10, 10), np.uint8)))
