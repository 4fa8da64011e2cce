import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from tests.data.conftest import png
from vtriune_jax.data import images, resize

SIDE = st.integers(1, 150)


def noise(size, levels=256, seed=0):
    pixels = np.random.default_rng(seed).integers(0, levels, (*size[::-1], 3))
    return Image.fromarray((pixels * (255 // (levels - 1))).astype(np.uint8))


@settings(max_examples=150, deadline=None)
@given(
    old=st.tuples(SIDE, SIDE),
    new=st.tuples(SIDE, SIDE),
    rows=SIDE,
    levels=st.sampled_from([2, 256]),  # black and white overshoots, and is clipped
)
@example(old=(64, 3000), new=(56, 28), rows=112, levels=256)  # Pillow 13 begins with columns
@example(old=(3000, 64), new=(28, 56), rows=112, levels=256)
@example(old=(1, 1), new=(150, 140), rows=1, levels=2)
@example(old=(150, 140), new=(1, 1), rows=150, levels=2)
def test_equals_pillow_in_every_bit(old, new, rows, levels):
    picture = noise(old, levels)
    strips = list(resize.bicubic(picture, new, rows))
    assert [len(strip) for strip in strips[:-1]] == [rows] * (len(strips) - 1)
    assert resize.joined(strips) == picture.resize(new, Image.Resampling.BICUBIC)


def test_the_order_of_passes_is_known_and_matters():
    assert resize._order() is not None  # otherwise images take longer: look what Pillow does now
    picture, size = noise((64, 96)), (60, 40)
    orders = [resize.joined(resize._resized(picture, size, 40, first)) for first in (False, True)]
    assert orders[0] != orders[1]


def test_a_pillow_that_resizes_otherwise_is_taken_as_it_is(monkeypatch, caplog, processor):
    plain = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args: ImageOps.invert(plain(*args)))
    resize._order.cache_clear()
    try:
        picture = noise((100, 80))
        strips = resize.bicubic(picture, (84, 56), 28)
        assert resize.joined(strips) == picture.resize((84, 56), Image.Resampling.BICUBIC)
        assert "resizes in a way of its own" in caplog.text
    finally:
        monkeypatch.undo()
        resize._order.cache_clear()


@pytest.mark.parametrize("method", [Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
def test_patches_and_pngs_follow_the_processors_method(processor, monkeypatch, method):
    monkeypatch.setattr(processor.image_processor, "resample", method)
    data = png(150, 130)
    patches, grid = images.patches([data], processor.image_processor, "x")
    size = int(grid[0, 2]) * 14, int(grid[0, 1]) * 14
    wanted = images.decode(data, "x").resize(size, method)
    same = images.as_png(data, size, processor.image_processor, "x")
    assert images.decode(same, "x").tobytes() == wanted.tobytes()
    again, _ = images.patches([same], processor.image_processor, "x")
    np.testing.assert_array_equal(patches, again)
