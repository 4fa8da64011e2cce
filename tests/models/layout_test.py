"""Windows, units and M-RoPE positions on the host."""

import numpy as np
import pytest

from vtriune_jax.errors import UserError
from vtriune_jax.models import layout

GRIDS = np.array([[1, 4, 4], [2, 6, 2], [1, 2, 10]])


def test_every_patch_has_its_own_slot(config):
    where = layout.window_layout(GRIDS, config)
    # Windows of 2×2 units: 1, then 2 frames of 2×1, then 1×3.
    assert where.windows == 1 + 4 + 3
    assert len(where.order) == len(set(where.order.tolist())) == GRIDS.prod(axis=1).sum()
    np.testing.assert_array_equal(
        where.order.reshape(-1, 4) // 4, where.unit_index[:, None] + 0 * where.order.reshape(-1, 4)
    )
    np.testing.assert_array_equal(
        np.unique(where.segments, return_counts=True), [[1, 2, 3, 4], [16, 12, 12, 20]]
    )


def test_a_window_is_a_square_of_one_image(config):
    where = layout.window_layout(GRIDS, config)
    window = where.order // config.vision.slots
    for number in range(where.windows):
        inside = window == number
        assert len(set(where.segments[inside])) == 1
        corner = where.positions[inside] // 4
        assert (corner == corner[0]).all()


def test_pack_vision_puts_patches_where_the_layout_says(config):
    where = layout.window_layout(GRIDS, config)
    patches = np.arange(60.0)[:, None] + np.zeros(config.vision.patch)
    vision, unit_index = layout.pack_vision(patches, GRIDS, config, windows=10)
    assert vision.patches.shape == (10, 16, config.vision.patch)
    np.testing.assert_array_equal(vision.patches.reshape(160, -1)[where.order], patches)
    assert (vision.segments != 0).sum() == 60
    units = vision.patches[..., 0].reshape(-1, 4)[unit_index]
    np.testing.assert_array_equal(units, np.arange(60).reshape(-1, 4))


def test_no_images(config):
    empty = np.zeros((0, config.vision.patch))
    vision, unit_index = layout.pack_vision(empty, np.zeros((0, 3), int), config)
    assert vision.segments.shape == (0, 16)
    assert len(unit_index) == 0
    stacked = layout.stack_visions([vision, vision], windows=3)
    assert stacked.patches.shape == (2, 3, 16, config.vision.patch)


def test_positions_of_text(config):
    positions = layout.mrope_positions(np.arange(5), np.zeros((0, 3), int), config)
    np.testing.assert_array_equal(positions, np.tile(np.arange(5), (3, 1)))


def test_positions_of_neighbouring_images(config):
    ids = np.array([1, *[36] * 2, *[36] * 6, 2])
    positions = layout.mrope_positions(ids, np.array([[1, 2, 4], [1, 6, 4]]), config)
    np.testing.assert_array_equal(
        positions,
        [
            [0, 1, 1, 3, 3, 3, 3, 3, 3, 6],
            [0, 1, 1, 3, 3, 4, 4, 5, 5, 6],
            [0, 1, 2, 3, 4, 3, 4, 3, 4, 6],
        ],
    )


def test_positions_of_a_video(config):
    """Frames of 0.7 s at 2 tokens per second start at 0, 1.4 and 2.8; the text does not wait."""
    ids = np.array([1, *[37] * 6, 38, 36, 2])
    grids = np.array([[3, 2, 4], [1, 2, 2]])
    positions = layout.mrope_positions(ids, grids, config, seconds=[0.7])
    np.testing.assert_array_equal(
        positions,
        [
            [0, 1, 1, 2, 2, 3, 3, 3, 4, 5],
            [0, 1, 1, 1, 1, 1, 1, 3, 4, 5],
            [0, 1, 2, 1, 2, 1, 2, 3, 4, 5],
        ],
    )
    # Without seconds a frame lasts one: 0, 2, 4.
    unknown = layout.mrope_positions(ids, grids, config)
    np.testing.assert_array_equal(unknown[0, 1:7], [1, 1, 3, 3, 5, 5])


def test_user_errors(config):
    patches = np.zeros((60, config.vision.patch))
    with pytest.raises(UserError, match="3×4 patches does not divide"):
        layout.window_layout(np.array([[1, 3, 4]]), config)
    with pytest.raises(UserError, match="need 8 vision windows, more than the 7 allowed"):
        layout.pack_vision(patches, GRIDS, config, windows=7)
    with pytest.raises(UserError, match=r"59 image patches .* asks for 60"):
        layout.pack_vision(patches[1:], GRIDS, config)
    with pytest.raises(UserError, match="3 image tokens but 4 image features"):
        layout.mrope_positions(np.array([36] * 3), np.array([[1, 4, 4]]), config)
    one, video = np.array([[1, 2, 2]]), np.array([37])
    with pytest.raises(UserError, match="second_per_grid_ts has 2 entries for 1 videos"):
        layout.mrope_positions(video, one, config, seconds=[0.5, 0.5])
    for interrupted in ([36, 37], [36, 1, 36], [37, 36]):
        with pytest.raises(UserError, match=r"the 2 tokens .* not one run \(from token 0 on\)"):
            layout.mrope_positions(np.array(interrupted), np.array([[2, 2, 2]]), config)
    with pytest.raises(UserError, match="8 vision windows, more than the 2 allowed"):
        layout.stack_visions([layout.pack_vision(patches, GRIDS, config)[0]], windows=2)
