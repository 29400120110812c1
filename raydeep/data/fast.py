"""Shards → pixels at training time, as fast as the machine decodes. Strict checks were made when sharding.

Shards hold plain pictures only (see decode.py), for which these decoders give the same pixels as Pillow.
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydeep import mirror
from raydeep.errors import DataError

PNG = b"\x89PNG"
GREY_TYPE = 0  # colour type of a PNG


class Block(NamedTuple):
    """Decoded pictures, and the seconds that reading and decoding them took."""

    pixels: np.ndarray  # uint8 NHWC
    read_s: float
    decode_s: float


class Format(NamedTuple):
    """How the pictures of a dataset are stored, and what they become."""

    store: str  # encoded or decoded
    stored: tuple[int, int]  # height and width of decoded pictures
    shape: tuple[int, int, int]  # height, width and channels of what is returned
    side: int | None  # pictures are scaled and cropped to it; None: they have one size


class Parts(NamedTuple):
    """Rows of one row group."""

    file: str  # path or address
    stamp: int  # st_mtime_ns of the file when its labels were read
    group: int
    rows: np.ndarray  # int64, inside the group


@functools.lru_cache(maxsize=64)
def _open(file: str, stamp: int) -> pq.ParquetFile:
    return pq.ParquetFile(file, memory_map=True)


def fetch(parts: list[Parts], form: Format) -> Block:
    """Read and decode some rows of some row groups, in the order given.

    Raises:
        DataError: a shard is missing or was changed.
    """
    pixels = np.empty((sum(len(part.rows) for part in parts), *form.shape), np.uint8)
    at = 0
    start = time.perf_counter()
    read_s = 0.0
    for part in parts:
        before = time.perf_counter()
        try:
            file = mirror.local(part.file)
            if file.stat().st_mtime_ns != part.stamp:
                raise DataError(f"{part.file}: changed since its labels were read; leave datasets alone while in use")
            column = _open(str(file), part.stamp).read_row_group(part.group, columns=["image"])
            pictures = column.column(0).combine_chunks()
        except (OSError, ValueError, IndexError) as err:
            raise DataError(
                f"{part.file} row group {part.group}: can't be read: {err}; shard the source again"
            ) from None
        read_s += time.perf_counter() - before
        _decode(pictures, part, form, pixels[at : at + len(part.rows)])
        at += len(part.rows)
    return Block(pixels, read_s, time.perf_counter() - start - read_s)


def _decode(pictures: pa.Array, part: Parts, form: Format, out: np.ndarray) -> None:
    if form.store == "decoded":
        height, width = form.stored
        raw = np.frombuffer(pictures.buffers()[1], np.uint8)
        raw = raw[pictures.offset * pictures.type.byte_width :][: len(pictures) * pictures.type.byte_width]
        whole = raw.reshape(len(pictures), height, width, -1)
        if whole.shape[1:] == form.shape:
            np.take(whole, part.rows, axis=0, out=out)
            return
        for i, row in enumerate(part.rows):
            out[i] = channelled(resized(whole[row], form.side), form.shape[2])
        return
    for i, row in enumerate(part.rows.tolist()):
        try:
            out[i] = decode_plain(pictures[row].as_buffer(), form)
        except Exception as err:  # decoders raise kinds of their own
            raise DataError(f"{part.file} row group {part.group} row {row}: {err}; shard the source again") from None


def decode_plain(data: pa.Buffer | bytes, form: Format) -> np.ndarray:
    """One plain PNG or JPEG → uint8 HWC of the format's shape.

    PNGs by kornia_rs (4.5 times Pillow's speed), JPEGs by libjpeg-turbo through kornia_rs (1.5 times).
    """
    from kornia_rs import io as codec  # here, not above: its modules do not pickle

    raw = bytes(data)
    if raw[:4] == PNG:
        size = int.from_bytes(raw[20:24], "big"), int.from_bytes(raw[16:20], "big")
        pixels = codec.decode_image_png_u8(raw, size, "mono" if raw[25] == GREY_TYPE else "rgb")
    else:
        pixels = codec.decode_image_jpegturbo(raw, "mono" if _grey_jpeg(raw) else "rgb")
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return channelled(resized(pixels, form.side), form.shape[2])


def _grey_jpeg(raw: bytes) -> bool:
    """Whether the frame header of a JPEG names one component."""
    at = 2
    while at + 9 < len(raw):
        if raw[at] != 0xFF:
            at += 1
        elif 0xC0 <= raw[at + 1] <= 0xCF and raw[at + 1] not in (0xC4, 0xC8, 0xCC):
            return raw[at + 9] == 1
        elif raw[at + 1] == 0xFF or raw[at + 1] == 0x01 or 0xD0 <= raw[at + 1] <= 0xD8:
            at += 1 if raw[at + 1] == 0xFF else 2
        else:
            at += 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
    return False


def channelled(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Uint8 HWC with 1 or 3 channels → as many as wanted; grey as Pillow computes it (ITU-R 601)."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)[:, :, None]


def resized(pixels: np.ndarray, side: int | None) -> np.ndarray:
    """Centre square scaled to `side`: antialiased bilinear, as decode.to_pixels to within two grey levels."""
    height, width = pixels.shape[:2]
    if side is None or (height, width) == (side, side):
        return pixels
    import torch
    import torch.nn.functional as F

    square = min(height, width)
    top, left = (height - square) // 2, (width - square) // 2
    crop = np.ascontiguousarray(pixels[top : top + square, left : left + square])
    # The batch axis comes first: so torch sees that channels are last, and the result needs no transposition.
    whole = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)
    return F.interpolate(whole, (side, side), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
