"""Image bytes to uint8 tensors: simplejpeg for ordinary JPEG, Pillow for everything else."""

import io
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from halfseen.data.reader import BadSample

ORIENTATION = 0x0112  # Exif tag
_START_OF_FRAME = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))


@dataclass(frozen=True)
class JpegHeader:
    """What decides how a JPEG is decoded."""

    height: int
    width: int
    components: int  # 1 grey, 3 colour, 4 CMYK or YCCK
    orientation: int  # Exif, 1: upright


def jpeg_header(data: bytes | memoryview) -> JpegHeader | None:
    """Size, components and Exif orientation of a JPEG, without decoding; None without a frame header."""
    position, orientation, end = 2, 1, len(data)
    while position + 4 <= end:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if 0xD0 <= marker <= 0xD8 or marker == 0x01:  # markers without a length
            position += 2
            continue
        length = data[position + 2] << 8 | data[position + 3]
        if marker in _START_OF_FRAME:
            if position + 10 > end:
                return None
            height, width, components = struct.unpack(">HHB", data[position + 5 : position + 10])
            return JpegHeader(height, width, components, orientation)
        if marker == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            orientation = _exif_orientation(bytes(data[position + 10 : position + 2 + length]))
        if marker in (0xD9, 0xDA):  # end of image, start of scan: no frame came before it
            return None
        position += 2 + length
    return None


def _exif_orientation(tiff: bytes) -> int:
    """The orientation in a TIFF header's first directory; 1 when it is not there."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass  # damaged metadata says nothing about the picture; Pillow ignores it too
    return 1


def decode(data: bytes | memoryview, max_pixels: int = 100_000_000, backend: str = "auto") -> Tensor:
    """An image as uint8 [3, H, W], upright, RGB, transparent parts on white; channels-last in memory.

    max_pixels: an image claiming more raises before anything is allocated. backend: auto or pillow.
    Raises BadSample for what is no image, too large or damaged.
    """
    if backend == "auto" and data[:2] == b"\xff\xd8":
        header = jpeg_header(data)
        if header is not None:
            _bound(header.width, header.height, max_pixels)
            if header.components in (1, 3) and header.orientation == 1:
                try:
                    return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
                except ValueError:
                    pass  # it is strict about small damage that Pillow reads past; let Pillow decide
    return _decode_pillow(data, max_pixels)


def _bound(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadSample(f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")


def _decode_pillow(data: bytes | memoryview, max_pixels: int) -> Tensor:
    try:
        with Image.open(io.BytesIO(data)) as image:
            _bound(image.width, image.height, max_pixels)
            image.load()
            upright = ImageOps.exif_transpose(image)
            array = np.array(to_rgb(upright))
    except Image.DecompressionBombError as error:
        raise BadSample(f"Pillow refuses it: {error}") from error
    except UnidentifiedImageError:
        raise BadSample(f"not an image Pillow knows (starts with {bytes(data[:8])!r})") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        # Pillow's decoders raise any of these for damaged files.
        raise BadSample(f"damaged: {error}") from error
    return torch.from_numpy(array).permute(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB; transparency is laid on white, 16-bit grey keeps its upper byte."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow gives 16-bit grey as I;16 or, in some versions and formats, as I.
        sixteen = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray((sixteen >> 8).astype(np.uint8), "L").convert("RGB")
    if image.mode == "F":
        raise BadSample("floating-point pixels have no agreed range")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        colour = image.convert("RGBA")
        white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colour).convert("RGB")
    return image.convert("RGB")
