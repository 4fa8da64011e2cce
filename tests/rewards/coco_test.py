"""mAP against pycocotools, on random images full of ties, duplicates and strays."""

import contextlib
import io

import jax
import numpy as np
import pytest

from vtriune_jax.rewards.boxes import pairwise_iou
from vtriune_jax.rewards.buckets import buckets, pad
from vtriune_jax.rewards.coco import coco_map
from vtriune_jax.rewards.ragged import ragged_parts
from vtriune_jax.rewards.ragged_boxes import Ragged

cocoeval = pytest.importorskip("pycocotools.cocoeval")
coco = pytest.importorskip("pycocotools.coco")

CASES = 1_000


def random_image(rng):
    """Predicted and true (box, label), coordinates few enough that IoUs tie."""
    step = rng.choice([1, 5, 10])
    labels = rng.integers(1, 5)

    def boxes(n):
        corner, size = step * rng.integers(0, 60 // step, (n, 2)), step * rng.integers(1, 5, (n, 2))
        return [(b.tolist(), int(rng.integers(labels))) for b in np.hstack([corner, corner + size])]

    true = boxes(rng.integers(1, 16))
    predicted = boxes(rng.integers(0, 6))
    for box, label in true:
        if rng.random() < 0.8:
            moved = np.array(box) + rng.integers(-1, 2, 4) * (rng.random() < 0.5)
            moved[2:] = np.maximum(moved[2:], moved[:2])
            predicted.append((moved.tolist(), label if rng.random() < 0.9 else 7))
    return [predicted[k] for k in rng.permutation(len(predicted))], true


def oracle(predicted, true):
    """pycocotools on one image, all scores 1, the truth's classes."""
    evaluation = cocoeval.COCOeval(iouType="bbox")
    params = evaluation.params
    params.imgIds, params.catIds = [1], sorted({label for _, label in true})
    params.areaRng, params.areaRngLbl = [[0, 1e10]], ["all"]

    def annotations(side):
        found = {}
        for k, ((x1, y1, x2, y2), label) in enumerate(side):
            size = [x2 - x1, y2 - y1]
            found.setdefault((1, label), []).append(
                {"id": k + 1, "bbox": [x1, y1, *size], "area": size[0] * size[1], "score": 1.0}
                | {"iscrowd": 0, "ignore": 0, "image_id": 1, "category_id": label}
            )
        return found

    def prepare():
        evaluation._gts, evaluation._dts = (coco.defaultdict(list, annotations(s)) for s in sides)
        evaluation.evalImgs, evaluation.eval = coco.defaultdict(list), {}

    sides = true, predicted
    evaluation._prepare = prepare
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [thresholds, recalls, classes]
    return precision.mean(), precision[0].mean(), precision[5].mean()


@pytest.fixture(scope="module")
def cases():
    rng = np.random.default_rng(0)
    images = [random_image(rng) for _ in range(CASES)]
    return images, np.array([oracle(*image) for image in images])


def ours(images, compute, boxes=None, rows=None):
    predicted, true = (
        pad(
            [[box for box, _ in side] for side in sides],
            [[label for _, label in side] for side in sides],
            boxes,
            rows,
        )
        for sides in zip(*images, strict=True)
    )
    return np.asarray(compute(predicted, true))[: len(images)]


def maps(predicted, true):
    iou = pairwise_iou(predicted.coords, true.coords)
    real = predicted.mask[..., :, None] & true.mask[..., None, :]
    same = real & (predicted.labels[..., :, None] == true.labels[..., None, :])
    return coco_map(iou, predicted, true, same)


def test_numpy_equals_pycocotools(cases):
    images, expected = cases
    np.testing.assert_allclose(ours(images, maps), expected, rtol=0, atol=1e-12)
    assert 0.2 < expected[:, 0].mean() < 0.8


def test_ragged_lists_equal_pycocotools(cases):
    """What the verifier service computes."""
    images, expected = cases
    predicted, true = (
        Ragged(
            np.array([box for side in sides for box, _ in side], float),
            np.array([label for side in sides for _, label in side]),
            np.array([len(side) for side in sides]),
        )
        for sides in zip(*images, strict=True)
    )
    settings = np.full(CASES, 0.5), np.ones((CASES, 5)), np.zeros(CASES)
    found = ragged_parts(predicted, true, *settings)
    found = np.stack([found[name] for name in ("map", "map50", "map75")], axis=-1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_of_equally_good_boxes_the_later_one_is_taken():
    image = (
        [([0.0, 0, 20, 10], 1), ([10.0, 0, 20, 10], 1)],
        [([0.0, 0, 10, 10], 1), ([10.0, 0, 20, 10], 1)],
    )
    expected = oracle(*image)
    assert expected[1] == pytest.approx(51 / 101)
    np.testing.assert_allclose(ours([image], maps), [expected], atol=1e-12)


def test_a_miss_of_the_size_of_a_city_does_not_count():
    hit, large = ([0.0, 0, 10, 10], 1), ([0.0, 0, 2e5, 1e5], 1)
    image = [large, hit], [hit]
    assert oracle(*image)[0] == pytest.approx(1)
    np.testing.assert_allclose(ours([image], maps), [oracle(*image)], atol=1e-12)


def test_jitted_in_buckets_it_equals_pycocotools_and_compiles_each_bucket_once(cases):
    images, expected = cases
    jitted = jax.jit(maps)
    sizes = [max(len(side) for side in image) for image in images]
    with jax.enable_x64(True):
        shapes = set()
        for places, boxes, rows in buckets(sizes, least=8, pairs=2**14):
            shapes.add((boxes, rows))
            chosen = [images[k] for k in places]
            found = ours(chosen, jitted, boxes, rows)
            np.testing.assert_allclose(found, expected[places], rtol=0, atol=1e-12)
    assert jitted._cache_size() == len(shapes)
