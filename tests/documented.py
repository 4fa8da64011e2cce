"""The names of metrics that docs/metrics.md lists."""

import re
from collections.abc import Iterable
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text("utf-8")
CELLS = re.findall(r"^\| (`.*?`) \|", TEXT.split("## Held-out")[0], re.MULTILINE)
NAMES = [name for cell in CELLS for name in re.findall("`(.+?)`", cell)]
"""From the first columns: with `{a,b}` for either, `[/X]` for with or without, and SOURCE."""


def undocumented(names: Iterable[str]) -> list[str]:
    """Those that the document does not know."""
    return sorted(name for name in set(names) - {"step", "stage"} if not KNOWN.fullmatch(name))


def _pattern(name: str) -> str:
    found = re.escape(name).replace(r"\[", "(?:").replace(r"\]", ")?")
    found = re.sub(r"\\{(.*?)\\}", lambda m: f"(?:{m[1].replace(',', '|')})", found)
    return re.sub("SOURCE|ADDRESS", "[^/]+", found)


KNOWN = re.compile("|".join(map(_pattern, NAMES)))
