import io
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.data.conftest import png
from vtriune_jax.data import images
from vtriune_jax.errors import UserError
from vtriune_jax.models.vision import normalise


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
    pgm = b"P5 4 4 65535\n" + b"\x80\0" * 16
    for data in (encode(deep), encode(deep, "TIFF"), pgm):
        assert set(np.asarray(images.decode(data, "x")).ravel()) == {0x80}


def tiff(bits, photometric, pixels):
    """A strip of 4×4 grey pixels, which Pillow cannot write."""
    entries = [
        *((256, 4), (257, 4), (258, bits), (259, 1), (262, photometric)),
        *((273, 8 + 2 + 9 * 12 + 4), (277, 1), (278, 4), (279, len(pixels))),
    ]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 9) + tags + b"\0\0\0\0" + pixels


@pytest.mark.parametrize(("bits", "negative"), [(8, 0), (8, 1), (12, 0), (16, 0), (16, 1)])
def test_scans_have_the_range_that_their_file_says(bits, negative):
    black, white = bytes(2 * bits), b"\xff" * (2 * bits)
    if negative:
        black, white = white, black
    assert not np.asarray(images.decode(tiff(bits, 1 - negative, black), "x")).any()
    assert np.asarray(images.decode(tiff(bits, 1 - negative, white), "x")).min() == 255


def test_transparent_grey_of_sixteen_bits_becomes_white():
    deep = Image.fromarray(np.array([[0x1234, 0x1235]], np.uint16))
    found = np.asarray(images.decode(encode(deep, transparency=0x1234), "x"))
    assert found[0, :, 0].tolist() == [255, 0x12]


@pytest.mark.parametrize(("kind", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_grey_without_a_range_is_refused(kind, mode):
    data = encode(Image.fromarray(np.ones((4, 4), kind)), "TIFF")
    with pytest.raises(UserError, match=f"^x: .*grey of mode {mode} .* save it with 8 or 16 bits"):
        images.decode(data, "x")


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
    assert patches.dtype == np.uint8
    plain = processor.image_processor(
        [Image.open(io.BytesIO(d)) for d in data], return_tensors="np"
    )
    np.testing.assert_allclose(normalise(patches), plain["pixel_values"], atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("pillows", [None, 2000, 100])
def test_decompression_bomb(monkeypatch, pillows):
    """Too large for us, for Pillow's warning, for Pillow: it is never decoded."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    monkeypatch.setattr(images, "LARGEST", 3000)
    with pytest.raises(
        UserError, match=r"x: the image is above the limit of 3000 pixels .*(56×56|3136)"
    ):
        images.decode(png(56, 56), "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert images.decode(png(30, 100), "x").size == (30, 100)


def test_the_limit_is_pillows():
    assert images.LARGEST == Image.MAX_IMAGE_PIXELS


def photo(width, height, seed=0):
    """Smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 30 + 2, width // 30 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    noise = rng.integers(-9, 10, (height, width, 1), dtype=np.int16)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def translucent(width, height):
    alpha = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
    picture = photo(width, height)
    picture.putalpha(Image.fromarray(alpha))
    return picture


ZOO = {
    "jpeg": lambda: encode(photo(200, 150), "JPEG"),
    "jpeg 4:4:4 progressive": lambda: encode(
        photo(90, 300), "JPEG", quality=95, subsampling=0, progressive=True
    ),
    "jpeg grey": lambda: encode(photo(200, 150).convert("L"), "JPEG"),
    "jpeg cmyk": lambda: encode(photo(200, 150).convert("CMYK"), "JPEG"),
    "png": lambda: encode(photo(61, 300)),
    "png rgba": lambda: encode(translucent(120, 90)),
    "png grey with alpha": lambda: encode(translucent(120, 90).convert("LA")),
    "png palette": lambda: encode(photo(120, 90).quantize(16)),
    "png palette, one colour transparent": lambda: encode(
        photo(120, 90).quantize(16), transparency=3
    ),
    "png rgb, one colour transparent": lambda: encode(
        Image.new("RGB", (70, 60), (1, 2, 3)), transparency=(1, 2, 3)
    ),
    "png black and white": lambda: encode(photo(200, 150).convert("1")),
    "webp": lambda: encode(photo(200, 150), "WEBP"),
    "webp lossless with alpha": lambda: encode(translucent(120, 90), "WEBP", lossless=True),
    "gif": lambda: encode(photo(200, 150), "GIF"),
    "bmp": lambda: encode(photo(200, 150), "BMP"),
    "tiff": lambda: encode(photo(200, 150), "TIFF"),
    "one pixel": lambda: encode(Image.new("RGB", (1, 1), (9, 99, 199))),
    "one token": lambda: encode(photo(28, 28)),
    "one row": lambda: encode(photo(150, 1)),
    "no resize": lambda: encode(photo(140, 112)),
    "20 megapixels": lambda: encode(photo(5472, 3648), "JPEG", quality=80),
}


@pytest.mark.parametrize("name", ZOO)
def test_patches_equal_the_hf_processors(processor, name):
    data = ZOO[name]()
    patches, grid = images.patches([data], processor.image_processor, "x")
    plain = processor.image_processor([Image.open(io.BytesIO(data))], return_tensors="np")
    np.testing.assert_array_equal(grid, plain["image_grid_thw"])
    np.testing.assert_allclose(normalise(patches), plain["pixel_values"], atol=1e-5, rtol=0)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=3),
    limits=st.tuples(st.integers(784, 200_000), st.integers(784, 200_000)).map(sorted),
    settings_=st.fixed_dictionaries(
        {
            "patch_size": st.sampled_from([14, 16]),
            "temporal_patch_size": st.integers(1, 3),
            "merge_size": st.integers(1, 3),
            "resample": st.sampled_from([2, 3]),
        }
    ),
)
@settings(max_examples=60, deadline=None)
def test_random_sizes_and_settings_equal_the_hf_processors(sizes, limits, settings_):
    size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    theirs = Qwen2VLImageProcessorPil(size=size, **settings_)
    sizes = [(w, h) for w, h in sizes if max(w, h) <= 200 * min(w, h)] or [(7, 5)]
    data = [encode(photo(*size, seed=k)) for k, size in enumerate(sizes)]
    patches, grid = images.patches(data, theirs, "x")
    plain = theirs([Image.open(io.BytesIO(d)) for d in data], return_tensors="np")
    np.testing.assert_array_equal(grid, plain["image_grid_thw"])
    np.testing.assert_allclose(normalise(patches), plain["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(processor, orientation):
    picture, exif = photo(70, 40), Image.Exif()
    exif[0x0112] = orientation
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(picture, exif=exif))))
    decoded = images.decode(encode(picture, exif=exif), "x")
    assert decoded.size == ((40, 70) if orientation > 4 else (70, 40))
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(upright))


@pytest.mark.filterwarnings("ignore")  # Pillow warns about odd EXIF
def test_odd_exif_spoils_no_picture():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "Canon", 72.0
    data = encode(photo(7, 4), "JPEG", exif=exif)
    plain = Image.open(io.BytesIO(data))
    views = [view.tobytes() for view in (plain, *map(plain.transpose, Image.Transpose))]
    start, length = data.index(exif.tobytes()), len(exif.tobytes())
    for place in range(start, start + length):
        for value in (0, 1, 2, 5, 7, 255):
            odd = data[:place] + bytes([value]) + data[place + 1 :]
            assert images.decode(odd, "x").tobytes() in views


def test_an_animation_gives_its_first_frame():
    frames = [photo(60, 40, seed=k) for k in range(3)]
    for kind in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        one = encode(frames[0], kind, **options)
        many = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert len(many) > 2 * len(one)
        got, want = (np.asarray(images.decode(data, "x"), int) for data in (many, one))
        assert np.abs(got - want).max() <= (40 if kind == "GIF" else 0)  # a palette per animation


def test_a_jpeg_that_is_cut_off(processor):
    data = encode(photo(200, 150), "JPEG")
    for keep in (len(data) // 2, len(data) - 40):
        with pytest.raises(UserError, match=r"row 5: the image cannot be decoded .*truncated"):
            images.patches([data[:keep]], processor.image_processor, "row 5")


def test_limits_in_the_wrong_order(processor):
    for limits in ({"min_pixels": 9000, "max_pixels": 8000}, {"min_pixels": 10**9}):
        with pytest.raises(UserError, match=r"data.min_pixels=\d+ exceeds data.max_pixels=\d+"):
            images.patches([png()], processor.image_processor, "x", **limits)


def test_threads_change_nothing(processor):
    data = [encode(photo(40 + 9 * k, 200 - 7 * k, seed=k), "JPEG") for k in range(24)]

    def patches(one):
        return images.patches([one], processor.image_processor, "x")[0]

    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(patches, data), map(patches, data), strict=True):
            np.testing.assert_array_equal(got, want)


Image.init()
KINDS = [
    kind for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "AVIF") if kind in Image.SAVE
]


@given(
    kind=st.sampled_from(KINDS),
    edits=st.lists(st.tuples(st.integers(0, 1999), st.integers(0, 255)), min_size=1, max_size=20),
    cut=st.just(1.0) | st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")  # Pillow warns about odd metadata before it fails
def test_damaged_files_decode_or_raise_user_error(kind, edits, cut):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encode(Image.open(io.BytesIO(png(20, 20))), kind, exif=exif))
    for place, value in edits:
        data[place % len(data)] = value
    data = bytes(data[: int(cut * len(data)) or 1])
    fault = ""
    try:
        assert images.decode(data, "x").mode == "RGB"
    except UserError as error:
        fault = str(error)
    assert not fault or (fault.startswith("x: ") and "\n" not in fault)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(56, 84), (101, 75)])
def test_a_picture_as_it_is_seen_is_seen_the_same_again(processor, mode, size):
    """What goes to a rollout server: no processor resizes it, and its patches are the trainer's."""
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(buffer := io.BytesIO(), "PNG")
    data, how = buffer.getvalue(), processor.image_processor
    patches, grid = images.patches([data], how, "test")
    seen = int(grid[0, 2]) * 14, int(grid[0, 1]) * 14
    sent = images.as_png(data, seen, how, "test")
    assert Image.open(io.BytesIO(sent)).size == seen
    again, same = images.patches([sent], how, "test")
    np.testing.assert_array_equal(again, patches)
    np.testing.assert_array_equal(same, grid)
    assert (sent == data) == (mode == "RGB" and size == (56, 84))


XMP = '<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"/>'


@pytest.mark.parametrize("place", ["eXIf", "XMP", "Raw profile"])
def test_a_picture_that_is_turned_is_sent_turned(processor, place):
    """Wherever its PNG says so: servers do not look there."""
    exif, texts = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112] = 3
    profile = exif.tobytes()
    if place == "XMP":
        texts.add_itxt("XML:com.adobe.xmp", XMP)
    elif place == "Raw profile":
        text = f"\nexif\n{len(profile):8}\n{profile.hex()}\n"
        texts.add_text("Raw profile type exif", text, zip=True)
    picture = photo(56, 84)
    options = {"exif": exif} if place == "eXIf" else {"pnginfo": texts}
    data = encode(picture, "PNG", **options)
    sent = images.as_png(data, (56, 84), processor.image_processor, "x")
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(sent))), np.asarray(turned))
