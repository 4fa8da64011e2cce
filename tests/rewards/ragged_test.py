"""Ragged lists are judged as padded arrays are, crowded images and odd thresholds included."""

import numpy as np
import pytest

from vtriune_jax.rewards.detection import WEIGHTS, detection_parts
from vtriune_jax.rewards.ragged import ragged_parts
from vtriune_jax.rewards.ragged_boxes import Ragged
from vtriune_jax.rewards.uncontested import uncontested_parts


def ragged(sides):
    """From lists of (box, label), one a image."""
    boxes = [each for side in sides for each in side]
    return Ragged(
        np.array([box for box, _ in boxes], float).reshape(-1, 4),
        np.array([label for _, label in boxes], int),
        np.array([len(side) for side in sides]),
    )


def images(rng, count, *, most, room, labels):
    """True boxes and predictions near them; the smaller the `room`, the more crowded."""
    pairs = []
    for _ in range(count):
        corner = rng.integers(0, room, (rng.integers(1, most + 1), 2))
        true = [([*xy, *(xy + rng.integers(4, 12, 2))], int(rng.integers(labels))) for xy in corner]
        predicted = [
            (np.array(box) + rng.integers(0, 3, 4) * [0, 0, 1, 1], label)
            for box, label in true
            if rng.random() < 0.9
        ]
        stray = rng.integers(0, room, (rng.integers(0, 4), 2))
        predicted += [
            ([*xy, *(xy + rng.integers(0, 9, 2))], int(rng.integers(labels))) for xy in stray
        ]
        pairs.append(([predicted[k] for k in rng.permutation(len(predicted))], true))
    predicted, true = zip(*pairs, strict=True)
    return ragged(predicted), ragged(true)


def settings(rng, count):
    thresholds = rng.choice([0.0, 1e-30, 0.05, 0.5, 0.7, 0.85, 0.95, 0.99, 1.0, np.nan], count)
    return thresholds, rng.random((count, len(WEIGHTS))), rng.random(count)


@pytest.mark.parametrize(
    ("room", "labels", "most"), [(300, 4, 20), (60, 3, 20), (20, 2, 8), (8, 1, 12), (40, 3, 60)]
)
def test_equals_the_padded_arrays(room, labels, most):
    rng = np.random.default_rng(room)
    predicted, true = images(rng, 150, most=most, room=room, labels=labels)
    given = settings(rng, 150)
    expected = detection_parts(predicted.padded(), true.padded(), *given, average=True)
    found = ragged_parts(predicted, true, *given)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-12, err_msg=name)


def test_roomy_images_are_without_doubt_and_crowded_ones_are_not():
    rng = np.random.default_rng(0)
    for room, least, most in ((400, 0.0, 0.1), (8, 0.3, 1.0)):
        predicted, true = images(rng, 100, most=12, room=room, labels=2)
        threshold, weights, share = np.full(100, 0.5), np.ones((100, 5)), np.full(100, 0.3)
        some = np.flatnonzero(predicted.counts)
        sides, of_each = (predicted.take(some), true.take(some)), (threshold, weights, share)
        doubtful = uncontested_parts(*sides, *(each[some] for each in of_each))[1]
        assert least <= doubtful.mean() <= most


def test_an_image_has_the_same_numbers_in_any_company():
    rng = np.random.default_rng(1)
    predicted, true = images(rng, 60, most=15, room=50, labels=3)
    given = settings(rng, 60)
    together = ragged_parts(predicted, true, *given)
    some = rng.permutation(60)[:25]
    apart = ragged_parts(predicted.take(some), true.take(some), *(each[some] for each in given))
    for name, values in together.items():
        np.testing.assert_array_equal(apart[name], values[some], err_msg=name)
        for k in (0, 7):
            one = np.array([k])
            alone = ragged_parts(predicted.take(one), true.take(one), *(g[one] for g in given))
            assert alone[name][0] == values[k], name


def test_ties_duplicates_huge_boxes_and_long_lists():
    box, half, other = [0, 0, 10, 10], [0, 0, 20, 10], [10, 0, 20, 10]
    huge, point = [0, 0, 2e5, 1e5], [3, 3, 3, 3]
    pairs = [
        ([(half, 0), (other, 0)], [(box, 0), (other, 0)]),
        ([(box, 0), (box, 1)], [(box, 1), (half, 0)]),
        ([(huge, 0), (box, 0)], [(box, 0)]),
        ([(point, 0), (box, 5)], [(point, 0), (box, 0)]),
        ([(other, 0)] * 120 + [(box, 0)], [(box, 0)]),
        ([], [(box, 0)]),
    ]
    predicted, true = map(ragged, zip(*pairs, strict=True))
    given = np.full(6, 0.5), np.ones((6, len(WEIGHTS))), np.full(6, 0.3)
    expected = detection_parts(predicted.padded(), true.padded(), *given)
    for name, values in ragged_parts(predicted, true, *given).items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-12, err_msg=name)
