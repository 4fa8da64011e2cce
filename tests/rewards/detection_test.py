"""The jitted detection reward against plain NumPy loops, and against the original's sub-scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.rewards.arrays import in_chunks
from vtriune_jax.rewards.boxes import Boxes, pairwise_iou
from vtriune_jax.rewards.detection import (
    AVERAGED,
    REPORTED,
    WEIGHTS,
    coco_map,
    detection_parts,
    iou_first,
    label_first,
)

THRESHOLDS = (0.3, 0.5, 0.75, 0.95)
PARTS = jax.jit(detection_parts)
MAP = jax.jit(jax.vmap(coco_map))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


# ------------------------------------------------------------------- the reference, loops and all


def iou_of(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    sizes = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(sizes) - width * height)


def reference_label_first(predicted, true, threshold):
    unused, credit, count = list(range(len(predicted))), 0.0, 0
    for box, label in true:
        best, best_iou = None, -1.0
        for k in unused:
            if predicted[k][1] == label and iou_of(predicted[k][0], box) > best_iou:
                best, best_iou = k, iou_of(predicted[k][0], box)
        if best is not None and best_iou >= threshold:
            unused.remove(best)
            credit, count = credit + best_iou, count + 1
    return credit, count


def reference_iou_first(predicted, true, threshold):
    pairs = [
        (iou_of(p[0], t[0]), -i, -j) for i, p in enumerate(predicted) for j, t in enumerate(true)
    ]
    rows, columns, credit, count = set(), set(), 0.0, 0
    for iou, i, j in sorted(pairs, reverse=True):
        if iou >= threshold and -i not in rows and -j not in columns:
            rows.add(-i)
            columns.add(-j)
            count += 1
            credit += iou * (predicted[-i][1] == true[-j][1])
    return credit, count


def reference_map(predicted, true):
    scores = np.zeros((0, 10))
    for label in dict.fromkeys(label for _, label in true):
        boxes = [box for box, other in true if other == label]
        ranked = [box for box, other in predicted if other == label][:100]
        row = []
        for threshold in np.linspace(0.5, 0.95, 10):
            free, hits = set(range(len(boxes))), []
            for box in ranked:
                best, best_iou = None, min(threshold, 1 - 1e-10)
                for k in sorted(free):
                    if iou_of(box, boxes[k]) >= best_iou:
                        best, best_iou = k, iou_of(box, boxes[k])
                free -= {best}
                hits.append(best is not None)
            found = np.cumsum(hits)
            precision = found / (np.arange(len(hits)) + 1 + np.spacing(1))
            recall = found / len(boxes)
            sampled = []
            for point in np.arange(101) * 0.01:
                at = np.searchsorted(recall, point, side="left")
                sampled.append(precision[at:].max() if at < len(precision) else 0.0)
            row.append(np.mean(sampled))
        scores = np.vstack([scores, row])
    means = scores.mean(axis=0)
    return means.mean(), means[0], means[5]


# --------------------------------------------------------------------------------- random images


def random_image(rng, most, labels=3):
    """True boxes, and predictions that are jittered copies of some of them among strays."""
    true = []
    for _ in range(rng.integers(1, most + 1)):
        corner, size = rng.integers(0, 60, 2), rng.integers(5, 40, 2)
        true.append(([*map(float, corner), *map(float, corner + size)], int(rng.integers(labels))))
    predicted = []
    for box, label in true:
        if rng.random() < 0.8:
            moved = np.array(box) + rng.integers(0, 4, 4) * (rng.random() < 0.7)
            predicted.append((moved.tolist(), label if rng.random() < 0.9 else labels))
    while len(predicted) < most and rng.random() < 0.4:
        corner = rng.integers(0, 60, 2)
        predicted.append(
            ([*map(float, corner), *map(float, corner + 9)], int(rng.integers(labels)))
        )
    return [predicted[k] for k in rng.permutation(len(predicted))], true


def padded(sides, boxes):
    coords, labels = np.zeros((len(sides), boxes, 4)), np.full((len(sides), boxes), 7)
    mask = np.zeros((len(sides), boxes), bool)
    for row, side in enumerate(sides):
        for k, (box, label) in enumerate(side):
            coords[row, k], labels[row, k], mask[row, k] = box, label, True
    return Boxes(*map(jnp.asarray, (coords, labels, mask)))


def pairs(predicted, true):
    real = predicted.mask[:, :, None] & true.mask[:, None, :]
    same = real & (predicted.labels[:, :, None] == true.labels[:, None, :])
    return pairwise_iou(predicted.coords, true.coords), same, real


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [random_image(rng, most=12) for _ in range(400)]


def test_matching_equals_the_loops(images):
    predicted, true = (padded(side, 14) for side in zip(*images, strict=True))
    iou, same, real = pairs(predicted, true)
    thresholds = np.tile(THRESHOLDS, (len(images), 1))
    by_label = jax.jit(jax.vmap(label_first))(iou, same, thresholds)
    by_iou = jax.jit(jax.vmap(iou_first))(iou, same, real, thresholds)
    for found, reference in ((by_label, reference_label_first), (by_iou, reference_iou_first)):
        expected = np.array([[reference(*image, t) for t in THRESHOLDS] for image in images])
        np.testing.assert_allclose(found.credit, expected[..., 0], atol=1e-12)
        np.testing.assert_array_equal(found.count, expected[..., 1])


def test_map_equals_the_loops(images):
    predicted, true = (padded(side, 14) for side in zip(*images, strict=True))
    iou, same, _ = pairs(predicted, true)
    found = MAP(iou, predicted, true, same)
    np.testing.assert_allclose(found, [reference_map(*image) for image in images], atol=1e-9)


def test_map_ranks_no_more_than_100_predictions_of_a_class():
    stray, box = ([90.0, 90.0, 95.0, 95.0], 0), ([0.0, 0.0, 10.0, 10.0], 0)
    image = ([stray] * 99 + [box, stray], [box]), ([stray] * 100 + [box], [box])
    predicted, true = (padded(side, 101) for side in zip(*image, strict=True))
    iou, same, _ = pairs(predicted, true)
    found = MAP(iou, predicted, true, same)
    np.testing.assert_allclose(found[:, 0], [0.01, 0], atol=1e-9)


def test_a_recall_just_below_a_grid_point_does_not_reach_it():
    """7 / 10 is less than COCO's 70th recall, 0.7000000000000001."""
    true = [([10.0 * k, 0.0, 10.0 * k + 9, 9.0], 0) for k in range(10)]
    predicted, truth = padded([true[:7]], 10), padded([true], 10)
    iou, same, _ = pairs(predicted, truth)
    found = MAP(iou, predicted, truth, same)
    np.testing.assert_allclose(found[0], 70 / 101, atol=1e-9)


def test_parts_do_not_depend_on_padding_or_company(images):
    few = images[:6]
    rows = len(few)
    share, weights = np.full(rows, 0.25), np.tile([0.3, 0.2, 0.2, 0.2, 0.1], (rows, 1))
    at = np.linspace(0.5, 0.99, rows)
    results = []
    for boxes in (12, 20):
        sides = [padded(side, boxes) for side in zip(*few, strict=True)]
        results.append(PARTS(*sides, at, weights, share))
    for name, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][name], err_msg=name)


def test_in_chunks_it_is_the_same(images):
    rows = 12
    sides = [padded(side, 14) for side in zip(*images[:rows], strict=True)]
    args = (*sides, np.full(rows, 0.5), np.ones((rows, len(WEIGHTS))), np.full(rows, 0.3))
    whole, chunked = PARTS(*args), jax.jit(in_chunks(detection_parts, 4))(*args)
    for name, values in whole.items():
        np.testing.assert_allclose(chunked[name], values, atol=1e-12, err_msg=name)


def test_the_average_threshold_and_numpy(images):
    """NaN is the mean over the eleven thresholds; NumPy gives what JAX does."""
    sides = [padded(side, 14) for side in zip(*images[:8], strict=True)]
    weights, share = np.ones((8, len(WEIGHTS))), np.full(8, 0.3)
    given = jax.jit(detection_parts, static_argnames="average")
    each = [given(*sides, np.full(8, at), weights, share) for at in AVERAGED]
    average = given(*sides, np.full(8, np.nan), weights, share, average=True)
    mixed = given(*sides, np.full(8, AVERAGED[0]), weights, share, average=True)
    for name in ("label_first", "iou_first", "accuracy"):
        mean = np.mean([parts[name] for parts in each], axis=0)
        np.testing.assert_allclose(average[name], mean, atol=1e-12)
        np.testing.assert_allclose(mixed[name], each[0][name], atol=1e-12)
    plain = [Boxes(*map(np.asarray, side)) for side in sides]
    in_numpy = detection_parts(*plain, np.full(8, np.nan), weights, share, average=True)
    for name, values in average.items():
        np.testing.assert_allclose(in_numpy[name], values, atol=1e-12, err_msg=name)


def test_accuracy_is_the_published_formula(images):
    share, at = 0.3, 0.75
    sides = [padded(side, 14) for side in zip(*images, strict=True)]
    rows = len(images)
    weights = np.tile([1.0, 0, 0, 0, 0], (rows, 1))
    parts = PARTS(*sides, np.full(rows, at), weights, np.full(rows, share))
    for k, (predicted, true) in enumerate(images):
        credit, count = reference_label_first(predicted, true, at)
        complete = 1 - ((len(true) - count) / len(true) + 1 - count / max(len(predicted), 1)) / 2
        expected = 0.7 * credit / len(true) + 0.3 * complete
        expected *= 0.6 ** abs(len(predicted) - len(true))
        assert parts["accuracy"][k] == pytest.approx(expected if predicted else 0, abs=1e-12)
        for threshold in REPORTED:
            credit, _ = reference_label_first(predicted, true, threshold)
            name = f"iou_{100 * threshold:.0f}"
            assert parts[name][k] == pytest.approx(credit / len(true), abs=1e-12)


def test_nothing_predicted_and_an_empty_batch():
    true = [([0.0, 0.0, 9.0, 9.0], 0)]
    sides = padded([[]], 3), padded([true], 3)
    parts = PARTS(*sides, np.ones(1), np.ones((1, len(WEIGHTS))), np.full(1, 0.3))
    assert all(float(value[0]) == 0 for value in parts.values())
    for counts in ((0, 3), (3, 0), (0, 0)):  # arrays without room for a box, not only masked ones
        none = [padded([[]], count) for count in counts]
        for sides, compute in ((none, PARTS), (jax.tree.map(np.asarray, none), detection_parts)):
            parts = compute(*sides, np.ones(1), np.ones((1, len(WEIGHTS))), np.full(1, 0.3))
            assert all(float(value[0]) == 0 for value in parts.values())
    none = padded([], 3)
    parts = PARTS(none, none, np.ones(0), np.ones((0, len(WEIGHTS))), np.ones(0))
    assert all(value.shape == (0,) for value in parts.values())


def test_float32_serves_on_an_accelerator(images):
    with jax.enable_x64(False):
        sides = [padded(side, 14) for side in zip(*images[:8], strict=True)]
        sides = [Boxes(jnp.float32(s.coords), jnp.int32(s.labels), s.mask) for s in sides]
        one = jnp.ones(8, jnp.float32)
        parts = PARTS(*sides, one * 0.5, jnp.ones((8, len(WEIGHTS))), one * 0.3)
    assert {value.dtype for value in parts.values()} == {jnp.dtype("float32")}
    expected = [reference_map(*image)[1] for image in images[:8]]
    np.testing.assert_allclose(parts["map50"], expected, atol=1e-5)
