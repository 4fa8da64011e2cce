"""`report.html`: a run on one page that needs no network and no server, on a phone too.

The held-out rewards before and after, every metric as a curve per data source, and held-out samples
with their pictures, the true and the predicted boxes drawn in.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vtriune_jax.charts import ALL, Points, dumbbell, legend, line_chart
from vtriune_jax.metrics import SourceMean, mean_over_sources, metric_name
from vtriune_jax.types import Verdict
from vtriune_jax.verifiers.parsing import LabelledBox
from vtriune_jax.writers import changes, paired, write_atomic, writing

TRUE_COLOR, PREDICTED_COLOR = "#1e90ff", "#ff8c00"
"""Blue and orange: apart for colour-blind eyes, on white paper and on black."""

CURVES = {
    "reward": "Reward",
    "correct": "Share of correct completions",
    "reward_accuracy": "Accuracy",
    "reward_format": "Format",
    "reward_iou_50": "IoU of pairs above 0.50",
    "reward_iou_75": "IoU of pairs above 0.75",
    "reward_iou_95": "IoU of pairs above 0.95",
    "reward_iou_99": "IoU of pairs above 0.99",
    "length": "Tokens per completion",
    "truncated": "Share of truncated completions",
    "reflection": "Share of completions with reflection words",
    "zero_variance": "Share of groups with equal rewards",
    "entropy": "Entropy (nats per token)",
    "kl": "KL to the sampling policy",
    "clip_fraction": "Share of clipped tokens",
    "loss": "Loss",
    "grad_norm": "Gradient norm",
    "verifier_failed": "Share of failed verifications",
    "time": "Seconds per step",
}
"""Metrics shown at once, in this order, with their titles; all others are folded away."""

_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_VISIBLE |= dict.fromkeys(range(127, 160), 0xFFFD)
"""Control character → what stands for it: Unicode has symbols for the first 32."""


@dataclass(frozen=True)
class SampleView:
    """A held-out sample as the report shows it; boxes in pixels of `image`."""

    source: str
    prompt: str
    completion: str
    truth: str
    verdict: Verdict
    image: bytes | None = None
    predicted: Sequence[LabelledBox] = ()
    true: Sequence[LabelledBox] = ()


def write_report(
    workdir: str | os.PathLike[str],
    *,
    title: str,
    before: Mapping[str, SourceMean],
    after: Mapping[str, SourceMean],
    facts: Mapping[str, str],
    samples: Sequence[SampleView],
) -> None:
    """Writes `report.html`, and the pictures of the samples as `samples/<number>_<source>.png`.

    The curves are read from `metrics.jsonl` in the same folder. `facts` are shown under the title
    (duration, devices, …); `before` and `after` may be empty, as in a run that is still going.
    """
    folder = Path(workdir)
    body = [f"<header><h1>{escape(title)}</h1>{_facts(facts)}</header>"]
    if before or after:
        body.append(_rewards(before, after))
    if records := read_records(folder / "metrics.jsonl"):
        body.append(_curves(records))
    if samples:
        cards = [_card(index, sample, folder) for index, sample in enumerate(samples, start=1)]
        body.append(
            "<section><h2>Held-out samples</h2>"
            f'<p class="keys"><b style="color:{TRUE_COLOR}">■ true</b> '
            f'<b style="color:{PREDICTED_COLOR}">■ predicted</b></p>'
            f'<div class="cards">{"".join(cards)}</div></section>'
        )
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))
    write_atomic(folder / "report.html", page.encode(errors="replace"))


def draw_boxes(
    image: bytes,
    predicted: Sequence[LabelledBox],
    true: Sequence[LabelledBox],
    side: int = 560,
) -> bytes:
    """The picture as PNG, its longer side about `side` pixels, with both sets of boxes.

    Small pictures grow by a whole factor without smoothing, so that their pixels stay what they
    are. Predicted boxes are thin and lie on the thick true ones: a perfect answer shows both. What
    reaches beyond the picture is cut at its border.
    """
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    scale = side / max(picture.size)
    scale = float(math.floor(scale)) if scale >= 1 else scale
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    picture = picture.resize(size, resample)
    draw = ImageDraw.Draw(picture)
    for boxes, color, width in ((true, TRUE_COLOR, 5), (predicted, PREDICTED_COLOR, 2)):
        for box in boxes:
            x1, y1, x2, y2 = (
                min(max(value * scale, 0.0), limit - 1.0)
                for value, limit in zip(box.coords, (*size, *size), strict=True)
            )
            left, right, top, bottom = *sorted((x1, x2)), *sorted((y1, y2))
            draw.rectangle((left, top, right, bottom), outline=color, width=width)
            at = (left, bottom + 2 if color == TRUE_COLOR else top - 20)
            _label(draw, box.label, at, color)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def escape(text: str) -> str:
    """Text as HTML; control characters, which HTML cannot have, as visible symbols."""
    return html.escape(text.translate(_VISIBLE))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without a last one that is still being written."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curves(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """Metric → series (a data source, or `all`) → points, from the lines of a metrics.jsonl."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        for name, value in record.items():
            if name in ("step", "stage") or value is None:
                continue
            metric, _, series = name.partition("/")
            points = found.setdefault(metric, {}).setdefault(series or ALL, [])
            points.append((record["step"], value))
    return found


def _label(draw: ImageDraw.ImageDraw, text: str, at: tuple[float, float], color: str) -> None:
    """A word on a coloured ground, moved into the picture where it would stick out."""
    font = ImageFont.load_default(16)
    _, _, width, height = font.getbbox(text)
    limits = (draw.im.size[0] - width - 4.0, draw.im.size[1] - height - 3.0)
    x, y = (max(0.0, min(value, limit)) for value, limit in zip(at, limits, strict=True))
    if text:
        draw.rectangle((x, y, x + width + 3, y + height + 2), fill=color)
        draw.text((x + 2, y + 1), text, fill="black", font=font)


def _facts(facts: Mapping[str, str]) -> str:
    entries = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{"".join(entries)}</dl>'


def _rewards(before: Mapping[str, SourceMean], after: Mapping[str, SourceMean]) -> str:
    """The table; its last row is the mean in which every source weighs the same."""
    rows = [
        _row(name, b.reward, a.reward, str(a.count) + (f" + {a.failed} failed" if a.failed else ""))
        for name, b, a in paired(before, after)
    ]
    judged = str(sum(mean.count for mean in after.values()))
    rows.append(_row("mean", mean_over_sources(before), mean_over_sources(after), judged))
    heads = "".join(
        f"<th>{head}</th>" for head in ("source", "before", "after", "change", "judged", "")
    )
    return (
        '<section><h2>Held-out reward</h2><div class="wide"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _row(name: str, before: float | None, after: float | None, judged: str) -> str:
    first, second, change = changes(before, after)
    way = {"+": "up", "-": "down"}.get(change[0], "")
    picture = dumbbell(before, after) if before is not None and after is not None else ""
    return (
        f"<tr><th>{escape(name)}</th><td>{first}</td><td>{second}</td>"
        f'<td class="{way}">{change}</td><td>{judged}</td><td>{picture}</td></tr>'
    )


def _curves(records: Sequence[Mapping[str, Any]]) -> str:
    found = curves(records)
    marks = [
        (now["step"], now["stage"])
        for last, now in zip([{}, *records], records, strict=False)
        if now["stage"] != last.get("stage")
    ]
    sources = sorted(
        {name for metric in ("reward", "loss") for name in found.get(metric, {})} - {ALL}
    )
    colors = {name: index for index, name in enumerate(sources)}

    def charts(metrics: Iterable[str]) -> str:
        drawn = (
            line_chart(CURVES.get(metric, metric.replace("_", " ")), found[metric], marks, colors)
            for metric in metrics
        )
        return f'<div class="charts">{"".join(drawn)}</div>'

    others = sorted(found.keys() - CURVES.keys())
    shown = charts(metric for metric in CURVES if metric in found)
    folded = f"<details><summary>{len(others)} more curves</summary>{charts(others)}</details>"
    return (
        f"<section><h2>Training</h2>{legend(colors, with_all=True)}{shown}"
        f"{folded if others else ''}</section>"
    )


def _card(index: int, sample: SampleView, folder: Path) -> str:
    """One sample as HTML; its picture is also written to the samples folder."""
    image = ""
    if sample.image is not None:
        png = draw_boxes(sample.image, sample.predicted, sample.true)
        source = re.sub(r"[^\w.-]", "_", metric_name(sample.source))
        path = folder / "samples" / f"{index:02d}_{source}.png"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png)
        data = base64.b64encode(png).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="sample {index}" loading="lazy">'
    if sample.verdict.status == "ok":
        parts = [f"<b>reward {sample.verdict.score:.3f}</b>"]
        parts += [f"{escape(k)} {v:.3g}" for k, v in sample.verdict.parts.items()]
    else:
        parts = [f"<b>not judged: {sample.verdict.status}</b>", escape(sample.verdict.reason)]
    texts = "".join(
        f"<h4>{head}</h4><pre>{escape(text)}</pre>"
        for head, text in (
            ("prompt", sample.prompt),
            ("completion", sample.completion),
            ("truth", sample.truth),
        )
    )
    scores = "".join(f"<li>{part}</li>" for part in parts)
    return (
        f"<article><h3>{escape(sample.source)}</h3>{image}"
        f'<ul class="scores">{scores}</ul>{texts}</article>'
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #656d76; --line: #d8dee4; --page: #fff;
  --card: #f6f8fa; --up: #1a7f37; --down: #cf222e; --c0: #2563eb; --c1: #d97706; --c2: #059669;
  --c3: #db2777; --c4: #7c3aed; --c5: #0891b2; --c6: #65a30d; --c7: #dc2626; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d;
  --page: #0d1117; --card: #161b22; --up: #3fb950; --down: #f85149; --c0: #60a5fa; --c1: #fbbf24;
  --c2: #34d399; --c3: #f472b6; --c4: #a78bfa; --c5: #22d3ee; --c6: #a3e635; --c7: #f87171; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem clamp(.8rem, 3vw, 2rem) 4rem;
  background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; }
h1 { font-size: 1.6rem; margin: 0 0 .6rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .8rem; padding-top: .8rem;
  border-top: 1px solid var(--line); }
h3 { font-size: .9rem; font-weight: 600; margin: 0 0 .3rem; }
h4 { font-size: .75rem; font-weight: 600; color: var(--soft); margin: .7rem 0 .1rem; }
ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: 0; }
dt { font-size: .75rem; color: var(--soft); } dd { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .35rem .9rem .35rem 0; text-align: right; font-weight: 400; white-space: nowrap; }
th:first-child { text-align: left; }
thead th { font-size: .75rem; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { font-weight: 600; border-top: 1px solid var(--line); }
.up { color: var(--up); } .down { color: var(--down); }
.dumbbell { width: 120px; height: 12px; display: block; stroke: currentColor; fill: currentColor; }
.dumbbell .from { fill: var(--page); }
.charts, .cards { display: grid; gap: 1.4rem 1.6rem; margin-top: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; }
svg text { font-size: 10.5px; fill: var(--soft); stroke: none; }
svg .y { text-anchor: end; } svg .x { text-anchor: middle; }
.grid { stroke: var(--line); fill: none; } .mark { stroke: var(--soft); stroke-dasharray: 2 3; }
.line { fill: none; stroke: var(--color); stroke-width: 1.7; stroke-linejoin: round;
  stroke-linecap: round; }
.raw { opacity: .25; stroke-width: 1; } .all { --color: var(--ink); }
.c0 { --color: var(--c0); } .c1 { --color: var(--c1); } .c2 { --color: var(--c2); }
.c3 { --color: var(--c3); } .c4 { --color: var(--c4); } .c5 { --color: var(--c5); }
.c6 { --color: var(--c6); } .c7 { --color: var(--c7); }
.legend { font-size: .85rem; }
.legend li::before { content: ""; display: inline-block; width: .9em; height: .25em;
  margin-right: .4em; vertical-align: middle; background: var(--color); }
details { margin-top: 1.4rem; } summary { cursor: pointer; color: var(--soft); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .9rem; min-width: 0; }
article img { width: 100%; display: block; border-radius: 4px; }
.keys { margin: 0; } .scores { font-size: .85rem; margin-top: .5rem; }
pre { margin: 0; font: .8rem/1.45 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; max-height: 16em; overflow-y: auto; }
"""
