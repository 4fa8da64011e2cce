"""How completions lie in the rows of a batch, and which way is the cheapest.

    single   a row is a prompt and one completion: of n completions each repeats the prompt
    group    a row is a prompt and its completions, each in a slot of its own
    packed   a row is as long as a single one, and holds several (prompt, completion) sequences

The result of an update is the same in all of them; the time is not. Shapes are static, and few:
completion slots are the configured one or its half, quarter or eighth, whichever holds the longest
completion of the batch, and a packed row holds 2, 4, 8 … sequences. Each shape is compiled once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from vtriune_jax.models.config import ModelConfig
from vtriune_jax.types import Group

Kind = Literal["single", "group", "packed"]
KINDS: tuple[Kind, ...] = get_args(Kind)

HALVINGS = 3
"""How often the completion slot may be halved."""


@dataclass(frozen=True)
class Slots:
    """The static sizes of a row, and what its padding is made of."""

    prompt_tokens: int
    completion_tokens: int
    windows: int
    pad_id: int


@dataclass(frozen=True)
class Rows:
    """The shape of the rows of a batch."""

    kind: Kind
    n: int
    """Completions of a row."""
    completion_tokens: int
    """Of the slot of each."""
    tokens: int
    """Of the row."""


@dataclass(frozen=True)
class Needs:
    """What the completions of a batch ask of its rows; over processes, the most demanding hold."""

    longest: int
    """Tokens of the longest completion."""
    together: int
    """So many sequences fit into each row, if they are packed; a power of two."""


def needs(groups: Sequence[Group], slots: Slots, parts: int, unit: int) -> Needs:
    """Of `groups`, which are cut into `parts` minibatches of a multiple of `unit` rows each."""
    longest = max(len(each.ids) for group in groups for each in group.completions)
    together = 1
    lengths = [sequence_lengths(part) for part in cut(groups, parts)]
    count, capacity = max(map(len, lengths)), slots.prompt_tokens + slots.completion_tokens
    while packed_rows(count, 2 * together, unit) < packed_rows(count, together, unit):
        rows = packed_rows(count, 2 * together, unit)
        if not all(assign(each, rows, 2 * together, capacity) for each in lengths):
            break
        together *= 2
    return Needs(longest, together)


def choose(
    kind: Kind | Literal["auto"],
    needs: Needs,
    slots: Slots,
    groups: int,
    samples: int,
    unit: int,
    model: ModelConfig,
    vision_trained: bool,
) -> Rows:
    """The rows of a minibatch of `groups` prompts with `samples` completions each.

    "auto" takes the kind with the least multiplications, padding counted as if it were tokens;
    whoever has the same arguments gets the same answer. `unit` as for `needs`, and it divides the
    completions. A group is cut into several rows, with the prompt in each, where there would be
    too few rows for the unit otherwise: many micro-batches make small rows.
    """
    size, total = slot(needs.longest, slots.completion_tokens), groups * samples
    whole = slots.prompt_tokens + slots.completion_tokens
    mates = next(n for n in range(samples, 0, -1) if samples % n == total // n % unit == 0)
    shapes: dict[Kind, Rows] = {
        "single": Rows("single", 1, size, slots.prompt_tokens + size),
        "group": Rows("group", mates, size, slots.prompt_tokens + mates * size),
        "packed": Rows("packed", needs.together, size, whole),
    }
    if kind != "auto":
        return shapes[kind]
    counts = {
        "single": total,
        "group": total // mates,
        "packed": packed_rows(total, needs.together, unit),
    }
    windows = slots.windows if vision_trained else 0
    return min(shapes.values(), key=lambda rows: counts[rows.kind] * _work(rows, windows, model))


def slot(longest: int, most: int) -> int:
    """The smallest slot that holds `longest` tokens: `most`, its half, quarter or eighth."""
    return min(
        size for k in range(HALVINGS + 1) if (size := -(-most // 2**k)) >= min(longest, most)
    )


def packed_rows(sequences: int, together: int, unit: int) -> int:
    """Rows of `together` sequences each, rounded up to a multiple of `unit`."""
    return -(-sequences // (together * unit)) * unit


def sequence_lengths(groups: Sequence[Group]) -> list[int]:
    """Tokens of every prompt with its completion."""
    return [len(group.prompt.ids) + len(each.ids) for group in groups for each in group.completions]


def cut(groups: Sequence[Group], parts: int) -> list[Sequence[Group]]:
    """The groups as `parts` stretches of equal length."""
    size = len(groups) // parts
    return [groups[k * size : (k + 1) * size] for k in range(parts)]


def assign(
    lengths: Sequence[int], rows: int, together: int, capacity: int
) -> list[list[int]] | None:
    """Puts sequences into rows: the indices in each row, or None where they do not fit.

    The longest first, each into the row with the fewest tokens yet. With the number of rows and the
    sequences of a row given, that fits more often than first-fit, and leaves the rows about equal.
    """
    found: list[list[int]] = [[] for _ in range(rows)]
    open_rows = [(0, row) for row in range(rows)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not open_rows:
            return None
        tokens, row = heapq.heappop(open_rows)
        tokens += lengths[index]
        if tokens > capacity:
            return None
        found[row].append(index)
        if len(found[row]) < together:
            heapq.heappush(open_rows, (tokens, row))
    return found


def _work(rows: Rows, windows: int, model: ModelConfig) -> int:
    """Multiplications of the forward pass of one row, as exact integers."""
    text, vision = model.text, model.vision
    layer = 2 * text.embed * (text.embed + text.kv_heads * text.head_dim)
    layer += 3 * text.embed * text.mlp
    slots = rows.n * rows.completion_tokens
    prompt = rows.tokens - slots
    seen = rows.tokens**2 // 2
    if rows.kind == "group":
        seen = prompt**2 // 2 + slots * (prompt + rows.completion_tokens // 2)
    language = text.layers * (rows.tokens * layer + 2 * text.embed * seen)
    head = slots * text.embed * text.vocab
    patches = windows * vision.slots * (rows.n if rows.kind == "packed" else 1)
    tower = patches * vision.depth * vision.embed * (4 * vision.embed + 3 * vision.mlp)
    return language + head + tower
