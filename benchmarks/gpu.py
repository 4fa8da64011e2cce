"""Updates and the sampler on one GPU at real sizes, in bfloat16, against transformers.

    python benchmarks/gpu.py [--sizes=3B,7B] [--cases=separate,shared,sample] [--steps=5]
        [--unroll] [--peer=PYTHON] [--json=FILE]

separate   32 (7B: 16) sequences of 1,024 tokens, each with a prompt (3/4 of them) and an image
shared     the same with 8 completions to a prompt: group rows; torch repeats it, as TRL does
sample     256 new tokens for each of 16 prompts with an image, against `generate`

Weights are random, parameters and AdamW's moments float32 on both sides, products bfloat16 (torch:
autocast; `generate`: all bfloat16). Of 3B both towers are trained, of 7B the language model.
Sequences fill their slots, so that torch's attention (sdpa) needs no mask. Each side makes all
steps of all cases in one process, torch first: together they do not fit into a GPU. torch's side
makes the checkpoint too. --peer is a Python with torch and transformers 5.

MFU counts what the model needs (`aot.flops.model_flops`), each image once per sequence in torch's
rows, at the peak of the data sheet. Times are medians, without the first two steps. --unroll sets
`model.unroll` on our side.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_work import SIZES, scratch
from update_work import MARK, names

HERE = Path(__file__).resolve().parent
CASES = ("separate", "shared", "sample")
HEAD = """\
| size | case | ours, s | torch, s | speed | MFU, ours | torch | GPU memory, ours / torch | parity |
|---|---|--:|--:|--:|--:|--:|--:|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=names(SIZES), default="3B,7B")
    parser.add_argument("--cases", type=names(CASES), default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--unroll", action="store_true", help="our layers, compiled one by one")
    parser.add_argument("--peer", default=sys.executable)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found, lines = [], [HEAD]
    for size in args.sizes:
        folder = Path(tempfile.mkdtemp(dir=scratch(size)))
        try:
            words = [str(folder), size, str(args.steps), *args.cases]
            subprocess.run([sys.executable, HERE / "gpu_ours.py", "prepare", *words], check=True)
            theirs = run([args.peer, HERE / "gpu_torch.py", *words])
            how = ["unroll"] if args.unroll else []
            ours = run([sys.executable, HERE / "gpu_ours.py", "run", *words, *how])
        finally:
            shutil.rmtree(folder)
        for case in args.cases:
            both = {"ours": ours.get(case), "torch": theirs.get(case)}
            found.append({"size": size, "case": case, **both})
            lines.append(line(found[-1]))
    print("\n".join(lines), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def run(command: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """What a side tells of each case; a case that it did not end is missing."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, text=True, env=environment
    )
    told = {}
    for text in process.stdout or ():
        if text.startswith(MARK):
            numbers = json.loads(text.removeprefix(MARK))
            told[numbers["case"]] = numbers
            print(Path(command[1]).stem, text.removeprefix(MARK).strip(), flush=True)
    if process.wait():
        print(f"{command[1]} ended with status {process.returncode}", file=sys.stderr)
    return told


def line(found: dict[str, Any]) -> str:
    """A row of the table; ratios are torch's by ours but for memory."""
    ours, theirs = found["ours"], found["torch"]
    if not ours or not theirs:
        return f"| {found['size']} | {found['case']} | failed: see above |"
    seconds = [statistics.median(side["seconds"]) for side in (ours, theirs)]
    mfus = [
        f"{ours[flops] / wall / ours['peak_flops']:.1%}" if flops in ours else ""
        for flops, wall in zip(("flops", "torch_flops"), seconds, strict=True)
    ]
    parity = ""
    if "loss" in ours:
        norm = abs(ours["grad_norm"] / theirs["grad_norm"] - 1)
        parity = f"loss {abs(ours['loss'] - theirs['loss']):.0e}, norm {norm:.0e}"
    cells = [
        *(found["size"], found["case"], *(f"{wall:.3f}" for wall in seconds)),
        *(f"{seconds[1] / seconds[0]:.2f}", *mfus),
        *(f"{ours['peak_gb']:.0f} / {theirs['peak_gb']:.0f} GB", parity),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
