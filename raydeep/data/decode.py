"""One encoded picture → uint8 HWC pixels. Strict: what is torn or no picture is an error, never grey bars."""

from __future__ import annotations

import io
import os
import warnings
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from raydeep.errors import DataError

if TYPE_CHECKING:
    from typing import BinaryIO

    from PIL.ImageFile import ImageFile

MAX_PIXELS = 64 * 2**20
MAX_BYTES = 8 * MAX_PIXELS  # of a file: the largest picture, 16 bits a channel, not compressed
# Only what decodes in this process from its own bytes: EPS, say, would start Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
FIRST_BYTES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF"}
ORIENTATION, TILE_WIDTH, TILE_HEIGHT = 0x0112, 0x0142, 0x0143
GREY_MODES = ("1", "L", "LA", "La", "F")
ALPHA_MODES = ("LA", "La", "RGBA", "RGBa", "PA")
CHANNELS = {"grey": 1, "rgb": 3}


def read_file(file: BinaryIO) -> bytes:
    """A whole file that is to be a picture.

    Raises:
        DataError: it is larger than any picture.
    """
    size = file.seek(0, os.SEEK_END)
    if size > MAX_BYTES:
        raise DataError(f"{size:,} bytes, a picture has at most {MAX_BYTES:,}")
    file.seek(0)
    return file.read()


def open_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a picture whole, its EXIF orientation applied, in mode L or RGB. Of an animation, the first frame.

    Raises:
        DataError: the bytes are no picture, torn, empty or of more than max_pixels pixels.
    """
    return _decode(data, max_pixels)[1]


def read_picture(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, bytes]:
    """Decode a picture as open_picture does, and give its plain file too.

    Plain is a file that any decoder turns into the same pixels: an upright JPEG of one or three components, or an
    8-bit PNG of colour type 0 or 2 without transparency or animation. Such files are kept as they are; all others
    become such a PNG of the picture, without loss.

    Raises:
        DataError: as open_picture.
    """
    source, image = _decode(data, max_pixels)
    if _is_plain(data, source) and _decoders_agree(data, image):
        return image, data
    return image, encode_png(np.asarray(image))


def _decode(data: bytes, max_pixels: int) -> tuple[ImageFile, Image.Image]:
    """The picture as its file has it, and the same upright, in mode L or RGB."""
    if not data:
        raise DataError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the cap below is the rule
            _check_size(*_webp_size(data), max_pixels)
            source = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(source.width, source.height, max_pixels)
            _check_tiles(source, max_pixels)
            source.load()
            turned = source.getexif().get(ORIENTATION, 1) in range(2, 9)
            return source, flat(ImageOps.exif_transpose(source) if turned else source)
    except UnidentifiedImageError:
        kind = next((kind for first, kind in FIRST_BYTES.items() if data.startswith(first)), None)
        broken = f"can't be decoded: a {kind} by its first bytes, and broken"
        raise DataError(broken if kind else "not a picture in a known format") from None
    except DataError:
        raise
    except Image.DecompressionBombError:
        raise DataError(f"more than {max_pixels:,} pixels (data.max_pixels)") from None
    except Exception as err:  # Pillow's plugins raise many kinds on broken files; none may stop a run
        raise DataError(f"can't be decoded: {str(err) or type(err).__name__}") from None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DataError(f"{width}×{height} pixels, more than {max_pixels:,} (data.max_pixels)")


def _webp_size(data: bytes) -> tuple[int, int]:
    """What the header of a WebP says, for Pillow allocates the canvas when it opens the file; 0, 0 for all else."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0, 0
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        both = int.from_bytes(data[21:25], "little")
        return (both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _check_tiles(source: ImageFile, max_pixels: int) -> None:
    """A TIFF of few pixels may be cut into tiles of many, and one tile is decoded whole."""
    if source.format == "TIFF":
        tags = getattr(source, "tag_v2", {})
        _check_size(int(tags.get(TILE_WIDTH, 0)), int(tags.get(TILE_HEIGHT, 0)), max_pixels)


def flat(image: Image.Image) -> Image.Image:
    """A decoded picture in mode L or RGB: 16 bits lose their lower half, what is transparent becomes black."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image, np.uint32).clip(0, 65535) >> 8).astype(np.uint8))
    kept = "L" if image.mode in GREY_MODES else "RGB"
    if "transparency" in image.info or image.mode in ALPHA_MODES:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert(kept)
    return image.convert(kept)


def _is_plain(data: bytes, source: ImageFile) -> bool:
    """Whether the file is of a plain kind."""
    if source.getexif().get(ORIENTATION, 1) in range(2, 9):
        return False
    if source.format in ("JPEG", "MPO"):
        return source.mode in ("L", "RGB")
    if source.format == "PNG":
        still = not getattr(source, "is_animated", False) and "transparency" not in source.info
        return still and data[24] == 8 and data[25] in (0, 2)  # bit depth and colour type, in IHDR
    return False


def _decoders_agree(data: bytes, image: Image.Image) -> bool:
    """Whether the decoder of training gives the same pixels.

    Small damage (stray bytes between markers, a wrong checksum) is passed over by one decoder and refused by
    the other, so it is tried rather than foreseen.
    """
    from kornia_rs import io as fast  # not at the top: the module does not pickle

    mode = "mono" if image.mode == "L" else "rgb"
    try:
        if data[:2] == b"\xff\xd8":
            pixels = fast.decode_image_jpegturbo(data, mode)
        else:
            pixels = fast.decode_image_png_u8(data, (image.height, image.width), mode)
    except Exception:  # Rust's errors reach Python as plain Exceptions
        return False
    return np.array_equal(pixels.reshape(-1), np.asarray(image).reshape(-1))


def to_pixels(image: Image.Image, mode: str, size: int | None) -> np.ndarray:
    """Crop the square in the centre, scale it to `size`, convert.

    The square has the shorter side s and starts at ((height - s) // 2, (width - s) // 2), whole pixels, so that
    torch's antialiased bilinear interpolation of the same crop differs by one grey level at most (of uint8, whose
    weights torch rounds, by two in rare pixels of enlarged noise).

    Args:
        image: mode L or RGB.
        mode: grey or rgb.
        size: side in pixels, or None to leave the picture as it is.

    Returns:
        uint8 HWC.
    """
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    wanted = "L" if mode == "grey" else "RGB"
    pixels = np.asarray(image if image.mode == wanted else image.convert(wanted))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def encode_png(pixels: np.ndarray) -> bytes:
    """Uint8 HW or HWC pixels → PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels).save(out, "PNG")
    return out.getvalue()
