"""Line charts as inline SVG, drawn with strings: no library, no script, no network.

Colours are CSS classes (`c0` … `c7`, `all`), so that the page decides on light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
"""(step, value), in the order of steps."""

COLORS = 8
ALL = "all"
"""The series of a metric over all sources; drawn in the colour of the text."""

_WIDTH, _HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 352, 14, 178
_MOST_POINTS = 150


def line_chart(
    title: str,
    series: Mapping[str, Points],
    marks: Sequence[tuple[float, str]] = (),
    colors: Mapping[str, int] | None = None,
) -> str:
    """One `<figure>`: a line per series over steps, and a dashed line where a stage begins.

    A noisy series is drawn faintly, its running mean boldly; long ones are averaged to at most 150
    points. Series that `colors` (name → index) does not
    know get the next colours and a legend of their own below the chart.
    """
    series = {name: _thinned(points) for name, points in series.items() if points}
    own = [name for name in series if name not in (colors or {}) and name != ALL]
    colors = dict(colors or {}) | {name: index for index, name in enumerate(own)}
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    xticks, yticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)
    y0, y1 = min(yticks[0], *ys), max(yticks[-1], *ys)

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)

    parts = []
    for tick in yticks:
        _, y = at(x0, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" class="y">{tick:g}</text>')
    for tick in xticks:
        if x0 <= tick <= x1 and tick == int(tick):
            x, _ = at(tick, y0)
            parts.append(f'<text x="{x:.1f}" y="{_BOTTOM + 16}" class="x">{tick:g}</text>')
    started = [mark for mark in marks if mark[0] <= x0][-1:]
    for step, label in [*started, *(mark for mark in marks if x0 < mark[0] <= x1)]:
        x, _ = at(max(step, x0), y0)
        parts.append(f'<path class="mark" d="M{x:.1f} {_TOP}V{_BOTTOM}"/>')
        parts.append(f'<text x="{x + 3:.1f}" y="{_TOP - 3}">{escape(label)}</text>')
    starts = [step for step, _ in marks]
    for name, points in series.items():
        pieces = [[at(*point) for point in piece] for piece in _split(points, starts)]
        parts.append(_line(name, pieces, points[-1][1], colors))
    return (
        f'<figure><h3>{escape(title)}</h3><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)} over steps">{"".join(parts)}</svg>'
        f"{legend({name: colors[name] for name in own}) if own else ''}</figure>"
    )


def legend(colors: Mapping[str, int], with_all: bool = False) -> str:
    """Names with their colours."""
    entries = "".join(
        f'<li class="c{index % COLORS}">{escape(name)}</li>' for name, index in colors.items()
    )
    total = f'<li class="{ALL}">{ALL}</li>' if with_all else ""
    return f'<ul class="legend">{total}{entries}</ul>'


def dumbbell(before: float, after: float) -> str:
    """A small picture of a change on the scale 0 … 1: ○ before, ● after."""
    x, y = (4 + 112 * min(max(value, 0.0), 1.0) for value in (before, after))
    way = "up" if after >= before else "down"
    return (
        f'<svg class="dumbbell {way}" viewBox="0 0 120 12" aria-hidden="true">'
        f'<path class="grid" d="M4 6H116"/><path d="M{x:.1f} 6H{y:.1f}"/>'
        f'<circle class="from" cx="{x:.1f}" cy="6" r="3"/><circle cx="{y:.1f}" cy="6" r="4"/></svg>'
    )


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose low … high."""
    if max(abs(low), abs(high)) < 1e-30:  # as good as 0, and fractions of it may have no logarithm
        low, high = 0.0, 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = sorted((0.0, 2.0 * low or 1.0))
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    gap = power * min((m for m in (1, 2, 5, 10) if m * power >= raw * 0.999), default=10)
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    digits = max(0, -math.floor(math.log10(gap)))
    return [round(index * gap, digits) for index in range(first, last + 1)]


def _line(name: str, pieces: Sequence[Points], last: float, colors: Mapping[str, int]) -> str:
    color = ALL if name == ALL else f"c{colors[name] % COLORS}"
    dashed = ' stroke-dasharray="5 3"' if name != ALL and colors[name] >= COLORS else ""
    smooth = [_smoothed(piece) for piece in pieces]
    return (
        f'<path class="{color} line raw" d="{_path(pieces)}"/>'
        f'<path class="{color} line" d="{_path(smooth)}"{dashed}>'
        f"<title>{escape(name)}: {last:.4g} at the end</title></path>"
    )


def _path(pieces: Sequence[Points]) -> str:
    """One stroke per piece; one point is a stroke of no length, which its round ends show."""
    lines = ([f"{x:.1f} {y:.1f}" for x, y in piece] for piece in pieces)
    return "".join(f"M{line[0]}L{' '.join(line[1:] or line)}" for line in lines)


def _split(points: Points, starts: Sequence[float]) -> list[Points]:
    """The points of each stage by themselves: another stage's loss is another quantity."""
    pieces: dict[int, list[tuple[float, float]]] = {}
    for x, y in points:
        pieces.setdefault(sum(start <= x for start in starts), []).append((x, y))
    return list(pieces.values())


def _smoothed(places: Points) -> Points:
    """Means over a window of at most 8 % of the points, as wide on the left as on the right."""
    heights = [y for _, y in places]
    smooth = []
    for i, (x, _) in enumerate(places):
        reach = min(len(places) // 25, i, len(places) - 1 - i)
        near = heights[i - reach : i + reach + 1]
        smooth.append((x, sum(near) / len(near)))
    return smooth


def _thinned(points: Points) -> Points:
    """Means of neighbours, so that at most `_MOST_POINTS` remain."""
    size = math.ceil(len(points) / _MOST_POINTS)
    chunks = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk))
        for chunk in chunks
    ]
