import numpy as np
import pytest

from vtriune_jax.rewards.buckets import buckets, pad


def test_samples_are_sorted_by_powers_of_two():
    sizes = [3, 20, 16, 17, 0, 100]
    found = {tuple(bucket) for bucket in map(freeze, buckets(sizes, least=16, pairs=2**16))}
    assert found == {((0, 2, 4), 16, 256), ((1, 3), 32, 64), ((5,), 128, 4)}


def freeze(bucket):
    return (tuple(bucket.places), bucket.boxes, bucket.rows)


def test_a_full_bucket_is_followed_by_another():
    found = list(buckets([8] * 10, least=8, pairs=256))
    assert [bucket.places for bucket in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert {bucket.rows for bucket in found} == {4}
    assert [bucket.rows for bucket in buckets([5000], pairs=256)] == [1]
    assert list(buckets([])) == []


def test_padding():
    box = [1.0, 2, 3, 4]
    found = pad([[box], [], [box, box]], [[5], [], [6, 7]], boxes=3, rows=4)
    assert found.coords.shape == (4, 3, 4)
    assert found.mask.sum(axis=1).tolist() == [1, 0, 2, 0]
    assert found.labels[2].tolist() == [6, 7, 0]
    assert found.coords[2, 1].tolist() == box
    assert pad([[box]], [[0]]).coords.shape == (1, 1, 4)
    assert pad([], []).mask.shape == (0, 0)
    with pytest.raises(ValueError, match=r"2 samples of up to 2 boxes do not fit into \[2, 1\]"):
        pad([[box], [box, box]], [[0], [0, 0]], boxes=1)
    np.testing.assert_array_equal(found.coords[~found.mask], 0)
