"""Which rows a batch gets, and that everything finds a place in them."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.packing_test import CONFIG, make_group, make_prompt
from vtriune_jax.data.rows import Needs, Slots, assign, choose, needs, packed_rows, slot

SLOTS = Slots(prompt_tokens=1000, completion_tokens=512, windows=4, pad_id=0)


WIDE = replace(CONFIG, text=replace(CONFIG.text, mlp=4096))
"""A model in which attention is a small part of the work, as in real ones."""


def chosen(kind="auto", longest=512, together=1, samples=8, model=WIDE, **more):
    keys = {"groups": 16, "samples": samples, "unit": 1, "vision_trained": False} | more
    return choose(kind, Needs(longest, together), SLOTS, model=model, **keys)


def test_groups_where_there_are_several_completions():
    assert chosen().kind == "group"
    assert (chosen().n, chosen().tokens) == (8, 1000 + 8 * 512)
    assert (chosen(samples=1).kind, chosen(samples=1).tokens) == ("single", 1512)


@pytest.mark.parametrize(
    ("groups", "samples", "unit", "n"),
    [(16, 8, 16, 8), (16, 8, 32, 4), (16, 8, 128, 1), (24, 6, 48, 3)],
)
def test_a_group_is_cut_where_there_are_too_few_rows(groups, samples, unit, n):
    found = chosen("group", groups=groups, samples=samples, unit=unit)
    assert (found.n, found.tokens) == (n, 1000 + n * 512)


def test_packed_where_sequences_are_much_shorter_than_their_slots():
    """16 groups are 16 · 5096 tokens; their 128 sequences are 128 · 1512 / 4 or / 2."""
    assert chosen(together=4).kind == "packed"
    assert (chosen(together=4).n, chosen(together=4).tokens) == (4, 1512)
    assert chosen(together=2).kind == "group"
    assert chosen(together=2, model=CONFIG).kind == "packed"  # where attention is most of the work
    assert chosen(samples=1, together=2).kind == "packed"


def test_a_tower_that_is_trained_speaks_for_groups():
    """Packed rows encode the images of a prompt once for each of its completions."""
    large = replace(WIDE, vision=replace(WIDE.vision, depth=64, embed=512, mlp=2048))
    assert chosen(together=4, model=large).kind == "packed"
    assert chosen(together=4, model=large, vision_trained=True).kind == "group"


def test_the_slot_is_the_smallest_of_four_that_holds_the_longest_completion():
    sizes = {longest: slot(longest, 512) for longest in (1, 64, 65, 200, 256, 257, 512)}
    assert sizes == {1: 64, 64: 64, 65: 128, 200: 256, 256: 256, 257: 512, 512: 512}
    assert slot(20, 56) == 28
    assert chosen(longest=100).tokens == 1000 + 8 * 128
    assert {chosen(kind, longest=100).kind for kind in ("single", "group", "packed")} == {
        "single",
        "group",
        "packed",
    }


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_every_sequence_gets_a_place_or_none_does(lengths, together, unit):
    rows = packed_rows(len(lengths), together, unit)
    assert rows % unit == 0
    assert rows * together >= len(lengths)
    found = assign(lengths, rows, together, 40)
    if found is None:
        assert together > 1
        return
    assert sorted(index for row in found for index in row) == list(range(len(lengths)))
    assert max(map(len, found)) <= together
    assert max(sum(lengths[index] for index in row) for row in found) <= 40


def test_long_sequences_are_put_beside_short_ones():
    assert assign([30, 10, 25, 15], 2, 2, 40) == [[0, 1], [2, 3]]
    assert assign([30, 10, 25, 16], 2, 2, 40) is None


@pytest.mark.parametrize(
    ("lengths", "parts", "unit", "together"),
    [
        ([1, 1, 1, 1], 1, 1, 4),
        ([1, 1, 1, 1], 2, 1, 2),
        ([1, 1, 1, 1], 1, 2, 2),
        ([1, 1, 1, 1], 1, 4, 1),
        ([40, 40, 40, 40], 1, 1, 1),
        ([40, 40, 1, 1], 1, 1, 2),
        ([40, 40, 1, 1], 2, 1, 1),
    ],
)
def test_needs(lengths, parts, unit, together):
    """Prompts of 5 words; a row has 60 tokens."""
    groups = [make_group(make_prompt(text=5), length) for length in lengths]
    slots = Slots(prompt_tokens=20, completion_tokens=40, windows=1, pad_id=0)
    assert needs(groups, slots, parts, unit) == Needs(max(lengths), together)


def test_rows_follow_from_counts_alone():
    """Processes that have agreed on the needs agree on the rows."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        keys = {"longest": int(rng.integers(1, 513)), "together": int(2 ** rng.integers(0, 5))}
        assert chosen(**keys) == chosen(**keys)
