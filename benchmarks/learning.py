"""What GRPO was good for, over finished runs: python benchmarks/learning.py runs/seed0 runs/seed1 …

Prints the README's table (held-out reward per source, before → after), the training reward per
source over the last 20 GRPO steps, and, for the sources of boxes, the share of well-formed answers
and the accuracy of those, first 5 against last 20 GRPO steps.
"""

import json
import sys
from pathlib import Path
from statistics import mean

ENDS = (slice(None, 5), slice(-20, None))


def rewards(runs: list[Path]) -> None:
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
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
    wanted = [f"reward_format/{source}", f"reward_accuracy/{source}"]
    parts = []
    for end in ENDS:
        of_runs = []
        for run in runs:
            steps = grpo_steps(run)[end]
            of_runs.append([mean(r[name] for r in steps if name in r) for name in wanted])
        form, accuracy = (mean(values) for values in zip(*of_runs, strict=True))
        parts.append((form, accuracy / form))
    (form, accuracy), (later_form, later_accuracy) = parts
    print(
        f"{source}: well-formed {form:.2f} → {later_form:.2f}, "
        f"accuracy of those {accuracy:.2f} → {later_accuracy:.2f}"
    )


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]]
    rewards(folders)
    training(folders)
    for boxes in ("digits_detection", "digits_grounding"):
        form_and_content(folders, boxes)
