"""The README's table of topologies: every Orsta config compiled for devices that are not here.

    python benchmarks/topologies.py [FOLDER]

One `python -m vtriune_jax.compile` a row, some minutes each; it needs the compilers of TPUs and of
CUDA (pip install 'jax[tpu,cuda13]', or one after the other). Their JSON files go into FOLDER
(runs/topologies/COMMIT), and rows that are there already are not compiled again. The table is
printed, and put between its marks in README.md. "Held" is what training has beside state and batch.
"""

import json
import subprocess
import sys
from pathlib import Path

PROGRAMS = (
    ("orsta_3b", "v6e:2x4", ""),
    ("orsta_7b", "v5p:2x2x4", ""),
    ("orsta_32b", "v5p:4x4x4", ""),
    ("orsta_72b", "v5p:4x4x8", ""),
    ("orsta_3b", "h100:8", ""),
    ("orsta_7b", "h100:8", "model.remat=full batch.micro_batches=128"),
    ("orsta_32b", "h200:4x8", ""),
    ("orsta_72b", "h200:8x8", ""),
)
"""Config, topology, and keys that are set on the command line."""
HEAD = """\
| config | topology | devices | GiB per device | arguments | temporaries | held | limit | free \
| tokens per update | sent per device, TB | bound, s | MFU, at most |
|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"""
GIB = 2**30
README = Path(__file__).resolve().parents[1] / "README.md"
MARKS = "<!-- by benchmarks/topologies.py -->\n", "<!-- end -->\n"


def main(folder: Path) -> None:
    """Compiles what is missing, then prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [line(numbers(*program, folder), program[2]) for program in PROGRAMS]
    table = "\n".join([HEAD, *rows]) + "\n"
    print(table, end="")
    README.write_text(put(table, README.read_text()))


def put(table: str, text: str) -> str:
    """The text with the table between its marks; as it was, if there are none."""
    if not all(mark in text for mark in MARKS):
        return text
    before, rest = text.split(MARKS[0], 1)
    return before + MARKS[0] + table + MARKS[1] + rest.split(MARKS[1], 1)[1]


def numbers(config: str, topology: str, keys: str, folder: Path) -> dict:
    """What `vtriune_jax.compile` writes, now or earlier."""
    name = "-".join([config, topology, *keys.split()])
    file = folder / f"{name.replace(':', '-')}.json"
    if not file.exists():
        words = [f"--config=configs/{config}.py", f"--topology={topology}", f"--json={file}"]
        words += [f"--config.{pair}" for pair in keys.split()]
        command = [sys.executable, "-m", "vtriune_jax.compile", *words]
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode > 1:
            sys.exit(f"{' '.join(command)} failed, for the reason above")  # 1: it does not fit
    return json.loads(file.read_text())


def line(found: dict, keys: str) -> str:
    """One row of the table."""
    total, limit = found["bytes_per_device"], found["bytes_limit"]
    names = ("bytes_per_device", "argument_bytes", "temp_bytes", "held_bytes")
    memory = (found[name] / GIB for name in names)
    cells = [
        f"`{found['config']}`" + (f" {keys}" if keys else ""),
        found["topology"],
        str(found["devices"]),
        *(f"{size:.1f}" for size in memory),
        f"{limit / GIB:.1f}",
        f"{1 - total / limit:.0%}" if found["fits"] else "does not fit",
        f"{found['tokens_per_step'] / 1e6:.1f} M",
    ]
    if found["estimated_mfu"] is None:
        cells += ["not known"] * 3
    else:
        cells += [
            f"{found['collective_bytes_per_step'] / 1e12:.1f}",
            f"{found['estimated_step_seconds']:.0f}",
            f"{found['estimated_mfu']:.0%}",
        ]
    return f"| {' | '.join(cells)} |"


def commit() -> str:
    """Of the code that is compiled, short."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=README.parent, capture_output=True, text=True, check=True)
    return found.stdout.strip()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else f"runs/topologies/{commit()}"))
