import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.conftest import png
from vtriune_jax.data import images
from vtriune_jax.errors import UserError


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG")],
)
def test_every_mode_becomes_rgb(mode, kind):
    grey = Image.new("L", (30, 20), 255).convert("RGB").convert(mode)
    decoded = images.decode(encode(grey, kind), "x")
    assert decoded.mode == "RGB"
    assert decoded.size == (30, 20)
    np.testing.assert_allclose(np.asarray(decoded), 255, atol=3)


def test_transparent_becomes_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert np.asarray(images.decode(encode(clear), "x")).min() == 255
    palette = Image.new("P", (4, 4), 0)
    assert np.asarray(images.decode(encode(palette, transparency=0), "x")).min() == 255


def test_sixteen_bit_grey_is_scaled_not_clipped():
    deep = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert set(np.asarray(images.decode(encode(deep), "x")).ravel()) == {0x80}


def test_exif_rotation_is_applied():
    wide = Image.new("RGB", (30, 10))
    wide.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90° clockwise
    upright = images.decode(encode(wide, exif=exif), "x")
    assert upright.size == (10, 30)
    assert upright.getpixel((9, 0)) == (255, 255, 255)


def test_patches_and_grids(processor):
    data = [png(112, 56), png(84, 84, seed=1)]
    patches, grid = images.patches(data, processor.image_processor, "x")
    assert grid.tolist() == [[1, 4, 8], [1, 6, 6]]
    assert patches.shape == (32 + 36, 1176)
    assert patches.dtype == np.float32
    plain = processor.image_processor(
        [Image.open(io.BytesIO(d)) for d in data], return_tensors="np"
    )
    np.testing.assert_array_equal(patches, plain["pixel_values"])


def test_no_images(processor):
    patches, grid = images.patches([], processor.image_processor, "x")
    assert patches.shape == (0, 1176)
    assert grid.shape == (0, 3)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (640, 480), (1000, 9)])
@pytest.mark.parametrize("limits", [(28 * 28, 56 * 56), (112 * 112, 224 * 224)])
def test_pixel_limits(processor, size, limits):
    low, high = limits
    patches, grid = images.patches(
        [png(*size)], processor.image_processor, "x", min_pixels=low, max_pixels=high
    )
    _, rows, columns = grid[0]
    assert rows % 2 == columns % 2 == 0
    assert len(patches) == rows * columns
    if max(size) / min(size) < 4:
        assert low <= rows * columns * 14**2 <= high


def test_errors_name_the_sample(processor):
    for data in (b"", b"not an image", png()[:60], png()[:-30]):
        with pytest.raises(UserError, match="sample 3 of toy: the image cannot be decoded"):
            images.patches([data], processor.image_processor, "sample 3 of toy")
    with pytest.raises(UserError, match="2000×2 pixels is too narrow"):
        images.patches([png(2000, 2)], processor.image_processor, "x")


def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="DecompressionBomb"):
        images.decode(png(), "x")


@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20),
    cut=st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")  # Pillow warns about odd metadata before it fails
def test_damaged_files_decode_or_raise_user_error(kind, edits, cut):
    data = bytearray(encode(Image.open(io.BytesIO(png(20, 20))), kind))
    for place, value in edits:
        data[int(place * (len(data) - 1))] = value
    data = bytes(data[: int(cut * len(data)) or 1])
    fault = ""
    try:
        assert images.decode(data, "x").mode == "RGB"
    except UserError as error:
        fault = str(error)
    assert not fault or (fault.startswith("x: ") and "\n" not in fault)
