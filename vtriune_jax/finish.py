"""The end of a run: the table, summary.json, report.html and the trained model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vtriune_jax import hosts
from vtriune_jax.assemble import Parts
from vtriune_jax.data.images import decode
from vtriune_jax.evaluate import HeldOut
from vtriune_jax.export import write_folder
from vtriune_jax.metrics import SourceMean
from vtriune_jax.models import weights
from vtriune_jax.models.pretrained import give_params
from vtriune_jax.report import SampleView, write_report
from vtriune_jax.types import Completion, Group, Verdict
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
    """Writes and prints what a run was good for; `seconds` are those of training.

    The first of several processes does so, with what the others give it.
    """
    after, views = heldout.means(), list(sample_views(heldout, parts))
    devices = [f"{d.platform}:{d.id} {d.device_kind}" for d in jax.devices()]
    fetch = weights.flatten(params).__getitem__
    if not hosts.is_first():
        give_params(parts.model_config, fetch)
        return
    write_folder(
        workdir / "final",
        parts.checkpoint_path,
        parts.model_config,
        fetch,
        parts.config.data,
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
        samples=views,
    )
    if before or after:
        print(f"\nheld-out reward before and after {parts.config.stages[-1]}\n")
        print(summary_table(before, after))
    print(f"\n{workdir}/report.html has curves and samples, {workdir}/final the trained model")


def sample_views(heldout: HeldOut, parts: Parts) -> Iterator[SampleView]:
    """The first `config.log.samples` held-out samples of every data source."""
    most, patch = parts.config.log.samples, parts.model_config.vision.patch_size
    rows = [
        (group.prompt.sample.data_source, number, group, verdict)
        for group, (verdict,), number in zip(
            heldout.groups, heldout.verdicts, heldout.numbers, strict=True
        )
    ]
    own = {row[:2]: row[2:] for row in _first_of_each(rows, most)}
    told = [
        (*place, group.completions[0].text, asdict(verdict))
        for place, (group, verdict) in own.items()
    ]
    everyone = [row for theirs in hosts.gather(told) for row in theirs]
    for source, number, text, verdict in _first_of_each(everyone, most):
        if (source, number) in own:
            group, own_verdict = own[source, number]
            yield sample_view(group, own_verdict, patch)
        elif hosts.is_first():  # another process has it
            answer = Completion(np.zeros(0), np.zeros(0), text, "stop")
            prompt = parts.prompter(parts.heldout[number])
            yield sample_view(Group(prompt, (answer,)), Verdict(**verdict), patch)


def _first_of_each(rows: Iterable[tuple[Any, ...]], most: int) -> Iterator[tuple[Any, ...]]:
    """The first so many rows of every source, which is their first column; the second one is their
    order."""
    ordered = sorted(rows, key=lambda row: row[:2])
    for _, of_source in groupby(ordered, key=lambda row: row[0]):
        yield from islice(of_source, most)


def sample_view(group: Group, verdict: Verdict, patch: int) -> SampleView:
    """A completion with its boxes, true and predicted, in pixels of the stored picture."""
    sample, text = group.prompt.sample, group.completions[0].text
    truth = sample.reward.ground_truth
    image, predicted, true = None, [], []
    if sample.images:
        image = sample.images[0]
        stored = decode(image, sample.place).size
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
