"""Whatever people keep in shards comes out as upright RGB of 8 bits, or as a bad sample."""

import io
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from halfseen.data import decode as decoding
from halfseen.data.decode import decode, jpeg_header
from halfseen.data.reader import BadSample


def picture(height: int = 37, width: int = 53, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (5, 7, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def hwc(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.uint8
    assert tensor.shape[0] == 3
    return tensor.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_equals_pillow_to_the_bit(subsampling, progressive, monkeypatch):
    data = encoded(picture(), "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    expected = np.array(Image.open(io.BytesIO(data)))
    monkeypatch.setattr(decoding, "_decode_pillow", lambda *_: pytest.fail("the fast decoder was not used"))
    assert (hwc(decode(data)) == expected).all()
    assert (hwc(decode(memoryview(data))) == expected).all()


def test_grey_jpeg_gets_three_channels():
    data = encoded(picture().convert("L"), "JPEG")
    assert (hwc(decode(data)) == np.array(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PPM", {})]
)
def test_lossless_formats_come_back_exactly(kind, options):
    image = picture()
    assert (hwc(decode(encoded(image, kind, **options))) == np.array(image)).all()


def test_cmyk_jpeg_goes_through_pillow():
    data = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    assert jpeg_header(data).components == 4
    assert (hwc(decode(data)) == np.array(Image.open(io.BytesIO(data)).convert("RGB"))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(16, 32)
    data = encoded(
        image,
        kind,
        exif=exif,
        **{"WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}}.get(kind, {}),
    )
    if kind == "JPEG":
        assert jpeg_header(data).orientation == orientation
    result = hwc(decode(data))
    assert result.shape == ((16, 32, 3) if orientation < 5 else (32, 16, 3))
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    expected = np.array(image.transpose(turned) if turned is not None else image).astype(int)
    assert np.abs(result - expected).mean() < (2 if kind == "JPEG" else 0.01)


def test_sixteen_bit_grey_keeps_its_upper_byte():
    values = np.arange(0, 65536, 128, dtype=np.uint16).reshape(16, 32)
    result = hwc(decode(encoded(Image.fromarray(values), "PNG")))
    assert (result == (values >> 8)[..., None]).all()


def test_transparency_is_laid_on_white():
    array = np.zeros((2, 2, 4), np.uint8)
    array[0, 0] = (10, 20, 30, 255)
    array[0, 1] = (10, 20, 30, 0)
    array[1, 0] = (0, 0, 0, 128)
    result = hwc(decode(encoded(Image.fromarray(array, "RGBA"), "PNG")))
    assert result[0, 0].tolist() == [10, 20, 30]
    assert result[0, 1].tolist() == [255, 255, 255]
    assert abs(int(result[1, 0, 0]) - 127) <= 1


def test_palettes_with_and_without_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putdata([0, 1])
    assert hwc(decode(encoded(palette, "PNG"))).tolist() == [[[200, 0, 0], [0, 200, 0]]]
    assert hwc(decode(encoded(palette, "GIF"))).tolist() == [[[200, 0, 0], [0, 200, 0]]]
    assert hwc(decode(encoded(palette, "PNG", transparency=1))).tolist() == [[[200, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB"])
def test_other_modes(mode):
    image = picture().convert("L").convert(mode) if mode != "RGB" else picture()
    result = hwc(decode(encoded(image, "PNG")))
    assert (result == np.array(image.convert("RGB"))).all()


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    limits = Image.MAX_IMAGE_PIXELS
    for kind in ("JPEG", "PNG", "WEBP"):
        with pytest.raises(BadSample, match=r"53 x 37 pixels.*data\.max_pixels=1000"):
            decode(encoded(picture(), kind), max_pixels=1000)
    # A header that claims 65,000 x 65,000 costs no memory.
    data = bytearray(encoded(picture(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(BadSample, match="65000 x 65000"):
        decode(bytes(data))
    assert limits == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_cut_files_are_bad_samples(kind):
    data = encoded(picture(200, 300), kind)
    for length in (0, 3, 20, len(data) // 2):
        with pytest.raises(BadSample):
            decode(data[:length])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_noise_never_escapes_as_another_exception():
    rng = random.Random(0)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        whole = encoded(picture(), kind)
        for _ in range(60):
            data = bytearray(whole)
            for _ in range(rng.randrange(1, 12)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            try:
                image = decode(bytes(data), max_pixels=1_000_000)
            except BadSample:
                continue
            assert image.shape[0] == 3


def test_the_pillow_backend_gives_the_same():
    data = encoded(picture(), "JPEG")
    assert torch.equal(decode(data, backend="pillow"), decode(data))


def test_float_images_are_refused():
    image = Image.fromarray(np.zeros((4, 4), np.float32))
    with pytest.raises(BadSample, match="floating-point"):
        decode(encoded(image, "TIFF"))
