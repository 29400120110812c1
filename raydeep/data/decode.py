"""One encoded picture → uint8 HWC pixels. Strict: what is torn or no picture is an error, never grey bars."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from raydeep.errors import DataError

MAX_PIXELS = 64 * 2**20
GREY_MODES = ("1", "L", "LA", "La", "F")
CHANNELS = {"grey": 1, "rgb": 3}


def open_picture(data: bytes) -> Image.Image:
    """Decode a picture whole, its EXIF orientation applied, in mode L or RGB.

    Raises:
        DataError: the bytes are no picture, torn, empty or larger than MAX_PIXELS pixels.
    """
    if not data:
        raise DataError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own bomb warning: the cap below is the rule
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width}×{image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()
            image = ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise DataError("not a picture in a known format") from None
    except DataError:
        raise
    except Exception as err:  # Pillow's plugins raise many kinds on broken files; none may stop a run
        raise DataError(f"can't be decoded: {str(err) or type(err).__name__}") from None
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image, np.uint32).clip(0, 65535) >> 8).astype(np.uint8))
    kept = "L" if image.mode in GREY_MODES else "RGB"
    if "transparency" in image.info or image.mode in ("LA", "La", "RGBA", "RGBa", "PA"):
        rgba = image.convert("RGBA")  # what is transparent becomes black
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert(kept)
    return image.convert(kept)


def to_pixels(image: Image.Image, mode: str, size: int | None) -> np.ndarray:
    """Scale the shorter side to `size`, crop the centre, convert.

    Args:
        image: mode L or RGB.
        mode: grey or rgb.
        size: side in pixels, or None to leave the picture as it is.

    Returns:
        uint8 HWC.
    """
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image.convert("L" if mode == "grey" else "RGB"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def decode_batch(pictures: Iterable[bytes], mode: str, size: int | None) -> np.ndarray:
    """Encoded pictures of one size → uint8 NHWC."""
    return np.stack([to_pixels(open_picture(data), mode, size) for data in pictures])


class DecodeRows:
    """Ray Data's map over batches: column `image` (bytes) → `pixels` (uint8 NHWC); `label` stays."""

    def __init__(self, mode: str, size: int | None) -> None:
        self.mode, self.size = mode, size

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One batch of columns."""
        return {"pixels": decode_batch(batch["image"], self.mode, self.size), "label": batch["label"]}


def encode_png(pixels: np.ndarray) -> bytes:
    """Uint8 HW or HWC pixels → PNG bytes."""
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels).save(out, "PNG")
    return out.getvalue()
