"""What GRPO was good for, over finished runs: python benchmarks/learning.py runs/seed0 runs/seed1 …

Prints the README's table (held-out reward per source, before → after), the training reward per
source over the last 20 GRPO steps, and, for the sources of boxes, the share of well-formed answers
and the accuracy of those, first 5 against last 20 GRPO steps. Runs have one config, but for seeds.
"""

import json
import sys
from pathlib import Path
from statistics import mean

from vtriune_jax.errors import UserError

ENDS = (slice(None, 5), slice(-20, None))
LEAST = 25
"""GRPO steps, without which the two ends would overlap."""


def read_summary(run: Path) -> dict:
    for path in (run / "metrics.jsonl", run / "summary.json"):
        if not path.is_file():
            raise UserError(f"{path} is missing; expected the workdir of a run that has ended")
    return json.loads((run / "summary.json").read_text())


def check(runs: list[Path]) -> None:
    """UserError unless the tables can be made of these runs."""
    if not runs:
        raise UserError("no run is named; give workdirs, as runs/quickstart")
    for run in runs:
        sources = sorted(read_summary(run)["before"])
        if not sources or sources != sorted(read_summary(runs[0])["before"]):
            raise UserError(
                f"{run} was evaluated on {sources}; expected some sources, the same in all runs"
            )
        if (steps := len(grpo_steps(run))) < LEAST:
            raise UserError(f"{run} has {steps} GRPO steps; at least {LEAST} are compared")


def rewards(runs: list[Path]) -> None:
    summaries = [read_summary(run) for run in runs]
    sources = sorted(summaries[0]["before"])
    print("run", *sources, "mean", sep=" | ")
    for run, summary in zip(runs, summaries, strict=True):
        pairs = [(summary["before"][s], summary["after"][s]) for s in sources]
        pairs.append((mean(p[0] for p in pairs), mean(p[1] for p in pairs)))
        print(run.name, *(f"{b:.3f} → {a:.3f}" for b, a in pairs), sep=" | ")


def grpo_steps(run: Path) -> list[dict]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["stage"] == "grpo"]


def training(runs: list[Path]) -> None:
    """Rewards as GRPO saw them at its end."""
    for run in runs:
        last = grpo_steps(run)[ENDS[1]]
        names = sorted({name for r in last for name in r if name.startswith("reward/")})
        found = [mean(r[name] for r in last if name in r) for name in ["reward", *names]]
        print(run.name, *(f"{value:.3f}" for value in found[1:] + found[:1]), sep=" | ")


def form_and_content(runs: list[Path], source: str) -> None:
    """Of a source that all runs trained on."""
    wanted = [f"reward_format/{source}", f"reward_accuracy/{source}"]
    parts = []
    for end in ENDS:
        of_runs = []
        for run in runs:
            steps = grpo_steps(run)[end]
            of_runs.append([mean(r[name] for r in steps if name in r) for name in wanted])
        form, accuracy = (mean(values) for values in zip(*of_runs, strict=True))
        parts.append((form, accuracy / form if form else 0.0))
    (form, accuracy), (later_form, later_accuracy) = parts
    print(
        f"{source}: well-formed {form:.2f} → {later_form:.2f}, "
        f"accuracy of those {accuracy:.2f} → {later_accuracy:.2f}"
    )


def main(names: list[str]) -> int:
    folders = [Path(name) for name in names]
    try:
        check(folders)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rewards(folders)
    training(folders)
    for boxes in ("digits_detection", "digits_grounding"):
        if any(f"reward_format/{boxes}" in record for record in grpo_steps(folders[0])):
            form_and_content(folders, boxes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
