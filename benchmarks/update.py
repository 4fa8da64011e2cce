"""The update and a whole GRPO step against torch's, in turn, on the same tokens, images and cores.

    python benchmarks/update.py [--presets=nano,micro] [--cases=separate,shared,step] [--cores=2]
        [--steps=5] [--peer=PYTHON] [--json=FILE]

separate   8 sequences of 384 tokens, each with a prompt (3/4 of them) and an image of its own
shared     one prompt with an image, 8 completions: group rows; torch repeats both, as TRL does
step       2 prompts × 8 completions are sampled, rewarded and trained on, against TRL's GRPOTrainer

Both towers are trained, in float32, on a checkpoint of random weights that is drawn here. Each side
is a process that waits while the other one steps; the first two steps of each are warm-up, and the
first one's loss and gradient norm are compared. --peer is a Python with torch, transformers 5 and,
for `step`, trl: by default this one, which has the first two from requirements-dev.txt. Another:

    python -m venv peer && peer/bin/pip install torch==2.13.0 'transformers>=5,<6' trl accelerate \\
        datasets pillow jmespath

Cases whose packages are missing are left out. Speed: torch's median seconds / ours. Leave nothing
else running: torch's threads spin while they wait, and lose much where others want the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from update_work import MARK, PRESETS, names

HERE = Path(__file__).resolve().parent
OURS = HERE / "update_ours.py"
WARMUP = 2
TARGETS = {"separate": 0.9, "shared": 2.0, "step": 3.0}
HEAD = """\
| case | preset | ours, s | torch, s | speed | CPU time | memory, ours / torch | target | parity |
|---|---|--:|--:|--:|--:|--:|--:|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", type=names(PRESETS), default="nano,micro")
    parser.add_argument("--cases", type=names(TARGETS), default="separate,shared,step")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    found = []
    print(HEAD, flush=True)
    for preset in args.presets:
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run([sys.executable, OURS, "prepare", scratch, preset], check=True)
            for case in args.cases:
                if missing := lacking(args.peer, case):
                    print(f"{case}: {args.peer} has no {missing}; see --help", file=sys.stderr)
                    continue
                found.append({"preset": preset, "case": case, **run(args, case, Path(scratch))})
                print(line(found[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def lacking(python: str, case: str) -> str:
    """The names of packages that the peer's Python does not have."""
    names = ["torch", "transformers"] + ["trl", "accelerate", "datasets"] * (case == "step")
    code = (
        "import sys; from importlib.util import find_spec;"
        "print(*(name for name in sys.argv[1:] if not find_spec(name)))"
    )
    return subprocess.check_output([python, "-c", code, *names], text=True).strip()


def run(args: Any, case: str, folder: Path) -> dict[str, Any]:
    """Every step of both sides, turn about."""
    if case == "step":
        theirs = [args.peer, HERE / "update_trl.py", folder]
    else:
        theirs = [args.peer, HERE / "update_torch.py", folder, case]
    sides = {"ours": Side([sys.executable, OURS, case, folder]), "torch": Side(theirs)}
    told: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    try:
        for round_ in range(WARMUP + args.steps):
            for name in sorted(sides, reverse=round_ % 2 == 1):
                time.sleep(0.3)  # threads of the other side may still be spinning
                told[name].append(sides[name].step())
    finally:
        for side in sides.values():
            side.close()
    return told


class Side:
    """A process that makes a step when asked."""

    def __init__(self, command: Sequence[Any]):
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._asking: Any = self._process.stdin
        self._answers: Any = self._process.stdout
        self._read()

    def step(self) -> dict[str, float]:
        self._asking.write("\n")
        self._asking.flush()
        return self._read()

    def close(self) -> None:
        self._asking.close()
        self._process.wait()

    def _read(self) -> dict[str, float]:
        for text in self._answers:
            if text.startswith(MARK):
                return json.loads(text.removeprefix(MARK))
        sys.exit(f"{self._process.args} ended with status {self._process.wait()}")


def line(found: dict[str, Any]) -> str:
    """A row of the table; times are medians, ratios torch's by ours but for memory."""
    timed = [found[name][WARMUP:] for name in ("ours", "torch")]
    wall, cpu = (
        [statistics.median(step[name] for step in side) for side in timed]
        for name in ("wall", "cpu")
    )
    memory = [side[-1]["peak_mb"] for side in timed]
    cells = [
        *(found["case"], found["preset"]),
        *(f"{seconds:.3f}" for seconds in wall),
        *(f"{theirs / ours:.2f}" for ours, theirs in (wall, cpu)),
        *(f"{memory[0] / memory[1]:.2f}", f"{TARGETS[found['case']]}", parity(found)),
    ]
    return f"| {' | '.join(cells)} |"


def parity(found: dict[str, Any]) -> str:
    """How the first step's results differ; of whole steps, which sample anew, what they made."""
    ours, theirs = found["ours"], found["torch"]
    if found["case"] == "step":
        return "; ".join(
            f"{statistics.mean(step['tokens'] for step in side):.0f} tokens, "
            f"reward {statistics.mean(step['reward'] for step in side):.2f}"
            for side in (ours, theirs)
        )
    loss = abs(ours[0]["loss"] - theirs[0]["loss"])
    norm = abs(ours[0]["grad_norm"] / theirs[0]["grad_norm"] - 1)
    return f"loss {loss:.0e}, norm {norm:.0e}"


if __name__ == "__main__":
    main()
