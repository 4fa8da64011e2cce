"""The end of a run: the table, summary.json, report.html and the trained model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import jax

from vtriune_jax.assemble import Parts
from vtriune_jax.data.images import decode
from vtriune_jax.evaluate import HeldOut
from vtriune_jax.export import write_folder
from vtriune_jax.metrics import SourceMean
from vtriune_jax.models import weights
from vtriune_jax.report import SampleView, write_report
from vtriune_jax.types import Group, Verdict
from vtriune_jax.verifiers.parsing import LabelledBox, last_answer, parse_boxes
from vtriune_jax.writers import duration, summary_table, write_summary

GRID = 1000.0
"""Sides of the grid that normalized boxes are on."""


def finish(
    parts: Parts,
    workdir: Path,
    params: Any,
    before: Mapping[str, SourceMean],
    heldout: HeldOut,
    steps: int,
    seconds: float,
) -> None:
    """Writes and prints what a run was good for; `seconds` are those of training."""
    after = heldout.means()
    devices = [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]
    write_folder(
        workdir / "final",
        parts.checkpoint_path,
        parts.model_config,
        weights.flatten(params).__getitem__,
        replace=True,
    )
    write_summary(workdir, before, after, steps, seconds, devices)
    write_report(
        workdir,
        title=f"vtriune_jax · {workdir.name}",
        before=before,
        after=after,
        facts={
            "steps": str(steps),
            "training": duration(seconds),
            "devices": ", ".join(devices),
            "started from": str(parts.checkpoint_path),
        },
        samples=list(sample_views(heldout, parts)),
    )
    print(f"\nheld-out reward before and after {parts.config.stages[-1]}\n")
    print(summary_table(before, after))
    print(f"\n{workdir}/report.html has curves and samples, {workdir}/final the trained model")


def sample_views(heldout: HeldOut, parts: Parts) -> Iterator[SampleView]:
    """The first `config.log.samples` held-out samples of every data source."""
    rows = sorted(
        zip(heldout.groups, heldout.verdicts, strict=True),
        key=lambda row: row[0].prompt.sample.data_source,
    )
    for _, of_source in groupby(rows, key=lambda row: row[0].prompt.sample.data_source):
        for group, (verdict,) in list(of_source)[: parts.config.log.samples]:
            yield sample_view(group, verdict, parts.model_config.vision.patch_size)


def sample_view(group: Group, verdict: Verdict, patch: int) -> SampleView:
    """A completion with its boxes, true and predicted, in pixels of the stored picture."""
    sample, text = group.prompt.sample, group.completions[0].text
    truth = sample.reward.ground_truth
    image, predicted, true = None, [], []
    if sample.images:
        image = sample.images[0]
        stored = decode(image, sample.id).size
        rows, columns = (int(n) * patch for n in group.prompt.grid_thw[0, 1:])
        processed = (columns, rows)
        normalized = sample.reward.params.get("det_verifier_normalized")
        predicted = _scaled(parse_boxes(last_answer(text) or ""), processed, stored)
        true = _scaled(
            parse_boxes(last_answer(truth) or ""), (GRID, GRID) if normalized else processed, stored
        )
    return SampleView(
        source=sample.data_source,
        prompt=sample.messages[-1].content,
        completion=text,
        truth=truth,
        verdict=verdict,
        image=image,
        predicted=predicted,
        true=true,
    )


def _scaled(
    boxes: list[LabelledBox], have: tuple[float, float], want: tuple[float, float]
) -> list[LabelledBox]:
    x, y = (w / h for w, h in zip(want, have, strict=True))
    return [
        LabelledBox((x1 * x, y1 * y, x2 * x, y2 * y), label) for (x1, y1, x2, y2), label in boxes
    ]
