"""A corpus of bad pictures, tables, tars and links, made by code: each is refused, quarantined or read, and says so.

Three tables of cases, each a name, what to make, and what must become of it.
"""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydeep.data import decode, shards, sources
from raydeep.errors import DataError
from raydeep.sections import Data

RNG = np.random.default_rng(2)
GREY = RNG.integers(0, 256, (12, 8), np.uint8)
COLOUR = RNG.integers(0, 256, (12, 8, 3), np.uint8)
SMOOTH = np.asarray(Image.fromarray(COLOUR[:4, :4]).resize((40, 32), Image.Resampling.BICUBIC))
MAX_PIXELS = 10_000


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (pixels.copy() if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    sum_ = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum_)


def png(width: int, height: int, depth: int = 8, colour: int = 0, body: bytes = b"\0" * 9) -> bytes:
    """A PNG that says what its header says, whatever it holds."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def tiled_gif(width: int, height: int) -> bytes:
    """A GIF of an 1×1 screen whose first frame is huge."""
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, width, height, 0)
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0" * 6 + frame + b"\x02\x02\x4c\x01\0;"


def ico(data: bytes) -> bytes:
    """An icon that says 16×16 and holds another picture."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(data), 22) + data


def bad_crc() -> bytes:
    data = bytearray(encode(COLOUR))
    at = data.index(b"IDAT")
    data[at + 12] ^= 0xFF
    return bytes(data)


def ancillary_bad_crc() -> bytes:
    """The pixels may be whole; a text chunk beside them is not."""
    data = encode(COLOUR)
    return data[:33] + chunk(b"tEXt", b"Comment\0hello", crc=1) + data[33:]


def stray_bytes() -> bytes:
    """A JPEG with two bytes more before its end mark: some decoders warn, some refuse."""
    data = encode(SMOOTH, "JPEG")
    return data[:-2] + b"\x12\x34" + data[-2:]


def webp_canvas(side: int) -> bytes:
    size = (side - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size + size
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp_lossless(side: int) -> bytes:
    """A WebP without a canvas chunk: the size stands in the stream itself."""
    body = b"\x2f" + ((side - 1) | (side - 1) << 14).to_bytes(4, "little") + bytes(9)
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBPVP8L" + struct.pack("<I", len(body)) + body


def tiled_tiff(side: int) -> bytes:
    """A TIFF of 16×16 pixels in one tile of side × side, LZW."""
    tags = [
        (256, 3, 16), (257, 3, 16), (258, 3, 8), (259, 3, 5), (262, 3, 1), (277, 3, 1),
        (322, 4, side), (323, 4, side), (324, 4, 200), (325, 4, 20),
    ]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return data.ljust(200, b"\0") + b"\x80\x00\x40" + bytes(17)


def black(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, np.uint8)


def whole(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


HALVES = np.repeat(np.array([0, 255], np.uint8), 4)[None].repeat(12, 0)  # left half 0, right half 255
SMOOTH_JPEG = encode(SMOOTH, "JPEG")
ADOBE = encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95)
NOT_KNOWN = "not a picture in a known format"
TORN = "can't be decoded"


def second() -> Image.Image:
    """The second frame. A new one each time: Pillow leaves notes on what it has saved."""
    return Image.fromarray(COLOUR[::-1].copy())


class Picture(NamedTuple):
    name: str
    data: bytes
    wanted: str | np.ndarray  # why it is quarantined, or its pixels


TURNS: list[Callable[[np.ndarray], np.ndarray]] = [
    lambda p: p, np.fliplr, lambda p: np.rot90(p, 2), np.flipud,
    lambda p: p.swapaxes(0, 1), lambda p: np.rot90(p, -1), lambda p: np.rot90(p, 2).swapaxes(0, 1), np.rot90,
]  # fmt: skip

PICTURES = [
    # no pictures
    Picture("empty.png", b"", "empty file"),
    Picture("text.jpg", b"no picture", NOT_KNOWN),
    Picture("page.png", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", NOT_KNOWN),
    Picture("drawing.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', NOT_KNOWN),
    Picture("json.png", b'{"error": "rate limit"}', NOT_KNOWN),
    Picture("zeros.jpg", bytes(1000), NOT_KNOWN),
    Picture("junk.jpg", RNG.bytes(1000), NOT_KNOWN),
    Picture("pointer.jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", NOT_KNOWN),
    Picture("pdf.png", b"%PDF-1.4\n", NOT_KNOWN),
    Picture("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", NOT_KNOWN),
    Picture("icon.png", ico(png(60_000, 60_000)), NOT_KNOWN),
    Picture("only-head.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF\0", TORN),
    Picture("marks.jpg", b"\xff\xd8" + b"\xff\xe0\0\x02" * 50 + b"\xff\xd9", f"{TORN}: a JPEG by its first bytes"),
    Picture("signature.png", b"\x89PNG\r\n\x1a\n", f"{TORN}: a PNG by its first bytes"),
    # torn
    Picture("torn.jpg", SMOOTH_JPEG[:-200], f"{TORN}: image file is truncated"),
    Picture("torn-progressive.jpg", half(encode(SMOOTH, "JPEG", progressive=True)), f"{TORN}: image file is truncated"),
    Picture("torn.png", half(encode(COLOUR)), TORN),
    Picture("torn.gif", half(encode(COLOUR, "GIF")), TORN),
    Picture("torn.webp", half(encode(COLOUR, "WEBP", lossless=True)), TORN),
    Picture("torn.bmp", half(encode(COLOUR, "BMP")), TORN),
    Picture("torn.tiff", half(encode(COLOUR, "TIFF")), f"{TORN}: image file is truncated"),
    Picture("torn.ppm", half(encode(COLOUR, "PPM")), TORN),
    Picture("bad-crc.png", bad_crc(), TORN),
    Picture("short-idat.png", png(8, 12, body=b"\0" * 20), TORN),
    Picture("no-zlib.png", encode(GREY).replace(b"IDAT", b"IDAX"), TORN),
    Picture("broken-exif.png", encode(COLOUR, exif=b"Exif\0\0MM\x8c*\0\0\0\x08"), TORN),
    Picture("zero-size.png", png(0, 0), f"{TORN}: a PNG by its first bytes"),
    Picture("zero-width.png", png(0, 12), f"{TORN}: a PNG by its first bytes"),
    # bombs
    Picture("bomb.png", png(60_000, 60_000), "pixels"),
    Picture("wide.png", png(2_000_000_000, 1), "pixels"),
    Picture("just-too-large.png", encode(black((101, 100))), "100×101 pixels, more than 10,000 (data.max_pixels)"),
    Picture("bomb.gif", tiled_gif(60_000, 60_000), "pixels"),
    Picture("bomb-lossless.webp", webp_lossless(16_000), "16000×16000 pixels"),
    Picture(
        "bomb-lossy.webp", encode(SMOOTH, "WEBP").replace(struct.pack("<HH", 40, 32), b"\xff\x3f" * 2), "16383×16383"
    ),
    Picture("bomb-tile.tiff", tiled_tiff(40_000), "40000×40000 pixels"),
    Picture("bomb.webp", webp_canvas(16_000), "16000×16000 pixels"),
    Picture(
        "bomb.bmp",
        b"BM"
        + struct.pack("<IHHI", 99, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        "pixels",
    ),
    Picture("bomb.ppm", b"P6 60000 60000 255\n", "pixels"),
    Picture("bomb.jpg", SMOOTH_JPEG.replace(struct.pack(">HH", 32, 40), struct.pack(">HH", 65_000, 65_000)), "pixels"),
    # unusual, and read
    Picture("just-fits.png", encode(black((100, 100))), black((100, 100))),
    Picture("tiny.png", encode(GREY[:1, :1]), GREY[:1, :1]),
    Picture("line.png", encode(COLOUR[:1]), COLOUR[:1]),
    Picture("tail.jpg", SMOOTH_JPEG + b"garbage" * 100, whole(SMOOTH_JPEG)),
    Picture("tail.png", encode(COLOUR) + b"garbage", COLOUR),
    Picture("stray.jpg", stray_bytes(), whole(SMOOTH_JPEG)),
    Picture("text-crc.png", ancillary_bad_crc(), f"{TORN}: a PNG by its first bytes"),
    Picture("really-a-png.jpg", encode(COLOUR), COLOUR),
    Picture(
        "progressive.jpg", encode(SMOOTH, "JPEG", progressive=True), whole(encode(SMOOTH, "JPEG", progressive=True))
    ),
    Picture("cmyk.jpg", ADOBE, whole(ADOBE)),
    Picture("rgb.jpg", encode(SMOOTH, "JPEG", keep_rgb=True), whole(encode(SMOOTH, "JPEG", keep_rgb=True))),
    Picture("profile.png", encode(COLOUR, icc_profile=b"no profile"), COLOUR),
    Picture("16-bit.png", encode(GREY.astype(np.uint16) * 257), GREY),
    Picture("16-bit.tiff", encode(GREY.astype(np.uint16) * 257, "TIFF"), GREY),
    Picture("float.tiff", encode(GREY.astype(np.float32), "TIFF"), GREY),
    Picture("cmyk.tiff", encode(Image.new("CMYK", (3, 2)), "TIFF"), np.full((2, 3, 3), 255, np.uint8)),
    Picture("1-bit.png", encode(GREY > 127), np.where(GREY > 127, 255, 0).astype(np.uint8)),
    Picture(
        "palette.png",
        encode(Image.fromarray(COLOUR).quantize(8)),
        np.asarray(Image.fromarray(COLOUR).quantize(8).convert("RGB")),
    ),
    Picture(
        "palette-clear.png",
        encode(Image.fromarray(HALVES).convert("RGB").quantize(2), transparency=bytes(2)),
        black((12, 8, 3)),
    ),
    Picture("clear.png", encode(np.dstack([COLOUR, black((12, 8))])), black((12, 8, 3))),
    Picture("half-clear.png", encode(np.dstack([COLOUR, HALVES])), COLOUR * (HALVES[:, :, None] > 0)),
    Picture(
        "clear-grey.png", encode(Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (8, 12))])), black((12, 8))
    ),
    Picture("clear-colour.png", encode(Image.fromarray(HALVES), transparency=255), black((12, 8))),
    Picture(
        "animated.gif",
        encode(COLOUR, "GIF", save_all=True, append_images=[second()]),
        np.asarray(Image.open(io.BytesIO(encode(COLOUR, "GIF"))).convert("RGB")),
    ),
    Picture("animated.png", encode(COLOUR, save_all=True, append_images=[second()]), COLOUR),
    Picture("animated.webp", encode(COLOUR, "WEBP", save_all=True, append_images=[second()], lossless=True), COLOUR),
    Picture("two.mpo", encode(COLOUR, "MPO", save_all=True, append_images=[second()]), whole(encode(COLOUR, "JPEG"))),
    Picture("pages.tiff", encode(COLOUR, "TIFF", save_all=True, append_images=[second()]), COLOUR),
    *(Picture(f"turned-{i}.png", encode(COLOUR, exif=exif(i)), turn(COLOUR)) for i, turn in enumerate(TURNS, 1)),
    *(
        Picture(f"turned-{i}.jpg", encode(SMOOTH, "JPEG", exif=exif(i)), turn(whole(SMOOTH_JPEG)))
        for i, turn in enumerate(TURNS, 1)
    ),
    Picture("turned-9.png", encode(COLOUR, exif=exif(9)), COLOUR),
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """All of PICTURES as one class folder, and a good picture of another class."""
    for case in PICTURES:
        name = case.name.replace(".mpo", ".jpg")
        (tmp_path / "set" / "odd").mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / "odd" / name).write_bytes(case.data)
    (tmp_path / "set" / "good").mkdir()
    (tmp_path / "set" / "good" / "1.png").write_bytes(encode(COLOUR))
    return tmp_path / "set"


def test_the_corpus_is_large_and_its_names_differ():
    assert len(PICTURES) >= 40
    assert len({case.name for case in PICTURES}) == len(PICTURES)


@pytest.mark.parametrize("case", PICTURES, ids=lambda case: case.name)
def test_a_bad_picture_says_why_and_an_unusual_one_is_read(case):
    if isinstance(case.wanted, str):
        with pytest.raises(DataError) as caught:
            decode.read_picture(case.data, MAX_PIXELS)
        assert case.wanted in str(caught.value)
        return
    image, plain = decode.read_picture(case.data, MAX_PIXELS)
    assert np.array_equal(np.asarray(image), case.wanted)
    again, same = decode.read_picture(plain, MAX_PIXELS)
    assert same == plain
    assert np.array_equal(np.asarray(again), case.wanted)
    assert plain[:2] in (b"\xff\xd8", b"\x89P")


def test_shards_of_the_corpus_hold_the_read_ones_and_list_the_others(pictures, tmp_path):
    for i in range(40):
        (pictures / "good" / f"{i}.png").write_bytes(encode(COLOUR))
    cfg = Data(source="folder", path=str(pictures), max_pixels=MAX_PIXELS, max_bad_fraction=0.9, image_size=8)
    manifest = shards.write_dataset(cfg, tmp_path / "out")
    listed = [json.loads(line) for line in (manifest.path / "quarantine.jsonl").read_text().splitlines()]
    found = {Path(line["origin"]).name: line["reason"] for line in listed}
    wanted = {case.name: case.wanted for case in PICTURES if isinstance(case.wanted, str)}
    assert found.keys() == wanted.keys()
    assert {name: reason for name, reason in found.items() if str(wanted[name]) not in reason} == {}
    kept = {}
    for split in sources.SPLITS:
        for file in manifest.files(split):
            table = pq.read_table(file)
            kept.update(zip(table["origin"].to_pylist(), table["image"].to_pylist(), strict=True))
    for case in PICTURES:
        if not isinstance(case.wanted, str):
            held = decode.open_picture(kept[f"odd/{case.name.replace('.mpo', '.jpg')}"])
            assert np.array_equal(np.asarray(held), case.wanted), case.name


GOOD = {
    "jpeg": SMOOTH_JPEG,
    "png": encode(COLOUR),
    "gif": encode(COLOUR, "GIF"),
    "webp": encode(COLOUR, "WEBP"),
    "tiff": encode(COLOUR, "TIFF", compression="tiff_lzw"),
    "bmp": encode(COLOUR, "BMP"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_damaged_bytes_are_read_or_refused_never_a_crash(kind):
    """Whatever is read is the same to the decoder of training."""
    rng = np.random.default_rng(3)
    for _ in range(80):
        data = bytearray(GOOD[kind])
        for at in rng.integers(0, len(data), rng.integers(1, 6)):
            data[at] = rng.integers(256)
        try:
            image, plain = decode.read_picture(bytes(data), MAX_PIXELS)
        except DataError:
            continue
        assert np.array_equal(np.asarray(decode.open_picture(plain)), np.asarray(image))
        assert decode.read_picture(plain)[1] == plain


# tables


def parquet_bytes(**columns: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


class Table(NamedTuple):
    name: str
    file: str  # its name in the folder
    data: bytes
    wanted: str | list[int]  # part of the refusal, or the labels
    keys: dict[str, Any] = {}  # noqa: RUF012  of the job


def lines(*rows: str, head: str = "image,label", end: str = "\n") -> bytes:
    return end.join([head, *rows, ""]).encode()


INTEGERS, PATH = "expected integers from 0, or strings", "expected one of a file below "
TABLES = [
    Table("plain", "t.csv", lines("a.png,cat", "b.png,dog"), [0, 1]),
    Table("integers", "t.csv", lines("a.png,1", "b.png,0"), [1, 0]),
    Table("bom", "t.csv", b"\xef\xbb\xbf" + lines("a.png,cat", "b.png,dog"), [0, 1]),
    Table("crlf", "t.csv", lines("a.png,cat", "b.png,dog", end="\r\n"), [0, 1]),
    Table("old-mac", "t.csv", lines("a.png,cat", "b.png,dog", end="\r"), [0, 1]),
    Table("no-last-newline", "t.csv", b"image,label\na.png,cat\nb.png,dog", [0, 1]),
    Table("blank-lines", "t.csv", lines("", "a.png,cat", "", "b.png,dog", ""), [0, 1]),
    Table("spaces", "t.csv", lines("a.png, cat", "b.png,cat ", "sub/c.png,dog", head="image , label"), [0, 0, 1]),
    Table("quoted-comma", "t.csv", lines('"a,b.png",cat', 'b.png,"dog, brown"'), [0, 1]),
    Table("unicode", "t.csv", lines("été/ü.png,café", "b.png,日本"), [0, 1]),
    Table("more-columns", "t.csv", lines("1,a.png,cat", "2,b.png,dog", head="id,image,label"), [0, 1]),
    Table("tabs", "t.tsv", lines("a.png\tcat", "b.png\tdog", head="image\tlabel"), [0, 1]),
    Table("dots", "t.csv", lines("./a.png,cat", "sub/../b.png,dog"), [0, 1]),
    Table("leading-zeros", "t.csv", lines("a.png,007", "b.png,7"), "label '007'; expected integers"),
    Table("class-named-none", "t.csv", lines("a.png,none", "b.png,scratch"), [0, 1]),
    Table(
        "header",
        "t.csv",
        lines("a.png,cat", head="file,label"),
        "no column 'image', found file, label; set data.image_column",
    ),
    Table(
        "header-label",
        "t.csv",
        lines("a.png,cat", head="image,class"),
        "no column 'label', found image, class; set data.label_column",
    ),
    Table("no-header", "t.csv", lines("b.png,dog", head="a.png,cat"), "no column 'image', found a.png, cat"),
    Table(
        "header-twice", "t.csv", lines("a.png,x,y", head="image,label,label"), "the column 'label' stands there twice"
    ),
    Table("empty-file", "t.csv", b"", "no column 'image', found nothing"),
    Table("no-rows", "t.csv", lines(), "holds no rows"),
    Table("semicolons", "t.csv", lines("a.png;cat", head="image;label"), "no column 'image', found image;label"),
    Table("few-cells", "t.csv", lines("a.png,cat", "b.png"), "t.csv line 3: 1 cells, expected 2"),
    Table(
        "bare-comma",
        "t.csv",
        lines("a,b.png,cat"),
        "t.csv line 2: 3 cells, expected 2; put cells that hold a comma in quotes",
    ),
    Table("torn-quote", "t.csv", lines('a.png,"cat'), "not valid CSV"),
    Table("latin-1", "t.csv", "image,label\na.png,caf\u00e9\n".encode("latin-1"), "not UTF-8 text (byte 21)"),
    Table("utf-16", "t.csv", "image,label\na.png,cat\n".encode("utf-16"), "not UTF-8 text"),
    Table(
        "label-empty",
        "t.csv",
        lines("a.png,cat", "b.png,", "c.png,dog"),
        "t.csv line 3: label ''; expected one of 2 classes",
    ),
    Table(
        "label-nan",
        "t.csv",
        lines("a.png,0", "b.png,NaN", "c.png,1"),
        "t.csv line 3: label 'NaN'; expected one of 2 classes",
    ),
    Table(
        "label-null",
        "t.csv",
        lines("a.png,0", "b.png,null", "c.png,1"),
        "t.csv line 3: label 'null'; expected one of 2",
    ),
    Table("label-minus", "t.csv", lines("a.png,0", "b.png,-1"), f"t.csv line 3: label '-1'; {INTEGERS}"),
    Table("label-float", "t.csv", lines("a.png,0.5", "b.png,1"), f"t.csv line 2: label '0.5'; {INTEGERS}"),
    Table(
        "label-whole-float",
        "t.csv",
        lines("a.png,1.0", "b.png,", "c.png,0.0"),
        "an empty cell makes a column of integers decimal",
    ),
    Table("label-huge", "t.csv", lines("a.png,0", "b.png,99999999999999999999999"), INTEGERS),
    Table(
        "label-ids",
        "t.csv",
        lines("a.png,0", "b.png,400000"),
        "label 400000: more than 100,000 classes; is it an id column?",
    ),
    Table("one-class", "t.csv", lines("a.png,cat", "b.png,cat"), "all labels are the same"),
    Table(
        "twice",
        "t.csv",
        lines("a.png,cat", "b.png,dog", "./a.png,dog"),
        "t.csv line 4: path 'a.png' stands in line 2 too; keep one",
    ),
    Table("path-empty", "t.csv", lines("a.png,cat", ",dog"), f"t.csv line 3: path ''; {PATH}"),
    Table("path-up", "t.csv", lines("a.png,cat", "../b.png,dog"), f"t.csv line 3: path '../b.png'; {PATH}"),
    Table("path-up-later", "t.csv", lines("a.png,cat", "sub/../../b.png,dog"), f"path 'sub/../../b.png'; {PATH}"),
    Table("path-absolute", "t.csv", lines("/etc/passwd,cat", "b.png,dog"), f"t.csv line 2: path '/etc/passwd'; {PATH}"),
    Table("path-neighbour", "t.csv", lines("../set-2/a.png,cat", "b.png,dog"), PATH),
    Table("path-address", "t.csv", lines("https://host/a.png,cat", "b.png,dog"), PATH),
    Table("path-nul", "t.jsonl", b'{"image": "a\\u0000.png", "label": 1}\n{"image": "b.png", "label": 0}\n', PATH),
    Table("path-root", "t.csv", lines(".,cat", "b.png,dog"), PATH),
    Table(
        "path-number",
        "t.jsonl",
        b'{"image": 1, "label": 1}\n{"image": "b.png", "label": 0}\n',
        f"line 1: path 1; {PATH}",
    ),
    Table(
        "split-word",
        "t.csv",
        lines("a.png,cat,train", "b.png,dog,dev", head="image,label,split"),
        "t.csv line 3: split 'dev'; expected train, val or test",
    ),
    Table(
        "split-empty",
        "t.csv",
        lines("a.png,cat,train", "b.png,dog,", head="image,label,split"),
        "line 3: split ''; expected",
    ),
    Table("json-torn", "t.jsonl", b'{"image": "a.png", "label": 0}\n{"image": "b.p', "t.jsonl line 2: not valid JSON"),
    Table("json-list", "t.jsonl", b'["a.png", 0]\n', "t.jsonl line 1: '[\"a.png\", 0]'; expected an object a line"),
    Table("json-deep", "t.jsonl", b"[" * 100_000, "t.jsonl line 1: not valid JSON"),
    Table(
        "json-no-key",
        "t.jsonl",
        b'{"image": "a.png", "label": 0}\n{"image": "b.png"}\n',
        "t.jsonl line 2: no column 'label'",
    ),
    Table(
        "json-mixed",
        "t.jsonl",
        b'{"image": "a.png", "label": 0}\n{"image": "b.png", "label": "x"}\n',
        "t.jsonl line 1: label 0; expected strings, as elsewhere",
    ),
    Table(
        "json-nan",
        "t.jsonl",
        b'{"image": "a.png", "label": 0}\n{"image": "b.png", "label": NaN}\n',
        f"line 2: label nan; {INTEGERS}",
    ),
    Table(
        "json-bool",
        "t.jsonl",
        b'{"image": "a.png", "label": 0}\n{"image": "b.png", "label": true}\n',
        f"line 2: label True; {INTEGERS}",
    ),
    Table(
        "json-one-and-true",
        "t.jsonl",
        b'{"image": "a.png", "label": 1}\n{"image": "b.png", "label": true}\n',
        "line 2: label True",
    ),
    Table("json-list-label", "t.jsonl", b'{"image": "a.png", "label": [0]}\n', f"line 1: label [0]; {INTEGERS}"),
    Table(
        "json-null",
        "t.jsonl",
        b'{"image": "a.png", "label": 0}\n{"image": "b.png", "label": 1}\n{"image": "c.png", "label": null}\n',
        "line 3: label None; expected one of 2 classes (0, 1)",
    ),
    Table("json-crlf", "t.jsonl", b'{"image": "a.png", "label": 0}\r\n\r\n{"image": "b.png", "label": 1}\r\n', [0, 1]),
    Table(
        "json-line-separator",
        "t.jsonl",
        '{"image": "a.png", "label": "a\u2028b"}\n{"image": "b.png", "label": "c"}\n'.encode(),
        [0, 1],
    ),
    Table(
        "parquet-null",
        "t.parquet",
        parquet_bytes(image=["a.png", "b.png", "c.png"], label=[0, None, 1]),
        "row 1: label None; expected one",
    ),
    Table(
        "parquet-float",
        "t.parquet",
        parquet_bytes(image=["a.png", "b.png"], label=[1.0, float("nan")]),
        f"row 0: label 1.0; {INTEGERS}",
    ),
    Table(
        "parquet-no-path", "t.parquet", parquet_bytes(image=["a.png", None], label=[0, 1]), f"row 1: path None; {PATH}"
    ),
    Table("parquet-torn", "t.parquet", parquet_bytes(image=["a.png"], label=[0])[:-7], "not readable as Parquet"),
    Table(
        "half-a-character", "t.jsonl", b'{"image": "\\ud800.png", "label": 0}\n{"image": "b.png", "label": 1}\n', PATH
    ),
    Table("half-a-label", "t.jsonl", b'{"image": "a.png", "label": "\\ud800"}\n', "label '\\ud800'; expected strings"),
    Table("not-named", "t.csv", lines("a.png,cat"), "name an existing table", {"labels": "other.csv"}),
    Table("away", "t.csv", lines("a.png,cat"), "data.labels: ../t.csv is not below", {"labels": "../t.csv"}),
    Table(
        "unknown-kind",
        "t.xlsx",
        b"PK",
        "holds no table of labels; name one (.csv, .tsv, .jsonl, .parquet) with data.labels",
    ),
    Table("named-unknown", "t.xlsx", b"PK", "expected a name that ends with .csv", {"labels": "t.xlsx"}),
]


@pytest.mark.parametrize("case", TABLES, ids=lambda case: case.name)
def test_a_bad_table_names_file_and_row_and_an_unusual_one_is_read(case, tmp_path):
    root = tmp_path / "set"
    for name in ("a.png", "b.png", "c.png", "a,b.png", "sub/c.png", "été/ü.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(GREY))
    (root / case.file).write_bytes(case.data)
    cfg = Data(source="images", path=str(root), **case.keys)
    if isinstance(case.wanted, str):
        with pytest.raises(DataError) as caught:
            sources.open_source(cfg)
        assert case.wanted in str(caught.value)
        assert str(root) in str(caught.value) or str(caught.value).startswith("data.labels: ")
        return
    source = sources.open_source(cfg)
    assert [row.label for row in source.rows] == case.wanted
    assert list(source.read(source.rows)) == [encode(GREY)] * len(source.rows)


def test_a_file_that_the_table_names_but_is_not_there_is_quarantined(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(encode(COLOUR))
    rows = [f"{i}.png,{'ab'[i % 2]}" for i in range(20)]
    (tmp_path / "t.csv").write_bytes(lines(*rows, "gone.png,a"))
    cfg = Data(source="images", path=str(tmp_path), max_bad_fraction=0.1)
    manifest = shards.write_dataset(cfg, tmp_path / "out")
    [line] = (manifest.path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"origin": "gone.png", "reason": "no such file"}


# Parquet with the pictures inside


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": ["a.png", "b.png"], "label": [0, 1]}, "column 'image' is string; expected binary"),
        ({"image": [{"path": "a"}] * 2, "label": [0, 1]}, "column 'image' is struct<path: string>; expected binary"),
        ({"image": [[1], [2]], "label": [0, 1]}, "column 'image' is list<element: int64>; expected binary"),
        ({"image": [b"", b""], "label": [[0], [1]]}, f"a.parquet row 0: label [0]; {INTEGERS}"),
        ({"image": [b"", b""], "label": [0.0, float("nan")]}, "an empty cell makes a column of integers decimal"),
        ({"image": [b"", b""], "label": [{"a": 1}] * 2}, f"a.parquet row 0: label {{'a': 1}}; {INTEGERS}"),
        ({"image": [b"", b""], "label": pa.nulls(2)}, "all labels are the same"),
        ({"image": [b"", b""], "label": [2**40, 0]}, "is it an id column?"),
    ],
)
def test_columns_of_another_kind_are_refused(tmp_path, columns, message):
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(**columns))
    with pytest.raises(DataError) as caught:
        sources.open_source(Data(source="parquet", path=str(tmp_path)))
    assert message in str(caught.value)


def test_nulls_among_pictures_are_rows_that_say_so(tmp_path):
    pictures = [{"bytes": encode(GREY), "path": None}, {"bytes": None, "path": "x.png"}, None]
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(image=pictures, label=[0, 1, 1]))
    source = sources.open_source(Data(source="parquet", path=str(tmp_path)))
    assert [str(p) for p in list(source.read(source.rows))[1:]] == ["null: no picture"] * 2


def test_a_row_group_torn_in_the_middle_is_one_error(tmp_path):
    data = bytearray(parquet_bytes(image=[RNG.bytes(500) for _ in range(9)], label=[0, 1, 2] * 3))
    data[4:40] = bytes(36)
    (tmp_path / "a.parquet").write_bytes(data)
    source = sources.open_source(Data(source="parquet", path=str(tmp_path)))
    with pytest.raises(DataError, match=r"a\.parquet row group 0: not readable as Parquet"):
        list(source.read(source.rows))


# tars


def member(name: str, data: bytes = b"", **facts: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as made:  # type: ignore[call-overload]
        for info, data in members:
            made.addfile(info, io.BytesIO(data))
    return out.getvalue()


PNG = encode(GREY)
TWO = [member("a.png", PNG), member("a.cls", b"0"), member("b.png", PNG), member("b.cls", b"1")]
WHOLE_TAR = tar(*TWO)


def forged_size(field: bytes) -> bytes:
    """A tar whose second header gives another size, with a right checksum."""
    data = bytearray(WHOLE_TAR)
    at = data.index(b"a.cls\0")
    data[at + 124 : at + 136] = field
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


class Tar(NamedTuple):
    name: str
    data: bytes
    wanted: str | dict[str, str | int]  # part of the refusal, or key → why it is quarantined, or its label
    file: str = "x.tar"


TARS = [
    Tar("plain", WHOLE_TAR, {"a": 0, "b": 1}),
    Tar("apart", tar(TWO[0], TWO[2], TWO[3], TWO[1]), {"a": 0, "b": 1}),
    Tar(
        "folders",
        tar(member("d", type=tarfile.DIRTYPE), member("d/a.PNG", PNG), member("d/a.cls", b"x"), *TWO[2:]),
        {"d/a": 1, "b": 0},
    ),
    Tar("dot-slash", tar(member("./a.png", PNG), member("./a.cls", b"0"), *TWO[2:]), {"./a": 0, "b": 1}),
    Tar("mac", tar(member("._a.png", b"Mac OS X"), member("._a.cls", b"Mac OS X"), *TWO), {"a": 0, "b": 1}),
    Tar("readme", tar(member("README.md", b"hello"), *TWO), {"a": 0, "b": 1}),
    Tar("empty-picture", tar(member("c.png"), member("c.cls", b"1"), *TWO), {"a": 0, "b": 1, "c": "empty file"}),
    Tar(
        "up",
        tar(member("../c.png", PNG), member("../c.cls", b"1"), *TWO),
        {"a": 0, "b": 1, "../c": "leads out of its folder"},
    ),
    Tar(
        "absolute",
        tar(member("/etc/c.png", PNG), member("/etc/c.cls", b"1"), *TWO),
        {"a": 0, "b": 1, "/etc/c": "leads out of its folder"},
    ),
    Tar(
        "symlink",
        tar(member("c.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), member("c.cls", b"1"), *TWO),
        {"a": 0, "b": 1, "c": "a link in the tar (to /etc/passwd)"},
    ),
    Tar(
        "hardlink",
        tar(*TWO, member("c.png", type=tarfile.LNKTYPE, linkname="a.png"), member("c.cls", b"1")),
        {"a": 0, "b": 1, "c": "a link in the tar (to a.png)"},
    ),
    Tar(
        "link-without-label",
        tar(*TWO, member("c.png", type=tarfile.LNKTYPE, linkname="a.png")),
        {"a": 0, "b": 1, "c": "a link in"},
    ),
    Tar(
        "device",
        tar(member("c.png", type=tarfile.CHRTYPE), member("c.cls", b"1"), *TWO),
        {"a": 0, "b": 1, "c": "no regular file in the tar"},
    ),
    Tar(
        "pipe",
        tar(member("c.png", type=tarfile.FIFOTYPE), member("c.cls", b"1"), *TWO),
        {"a": 0, "b": 1, "c": "no regular file in the tar"},
    ),
    Tar(
        "link-label",
        tar(member("c.png", PNG), member("c.cls", type=tarfile.SYMTYPE, linkname="a.cls"), *TWO),
        "key 'c': its label c.cls: a link",
    ),
    Tar(
        "no-label",
        tar(*TWO, member("c.png", PNG)),
        "x.tar key 'c': the picture c.png has no label; expected a member c.cls, .json or .txt",
    ),
    Tar("no-picture", tar(*TWO, member("c.cls", b"1")), "x.tar key 'c': found cls and no picture; expected c.jpg"),
    Tar("only-a-view", tar(*TWO, member("c.left.png", PNG)), "key 'c': found left.png and no picture"),
    Tar("two-pictures", tar(*TWO, member("a.jpg", PNG)), "key 'a': a.png and a.jpg; expected one picture a key"),
    Tar("key-twice", tar(*TWO, *TWO[:2]), "key 'a': a.png and a.png; expected one picture a key"),
    Tar("two-labels", tar(*TWO, member("a.cls", b"1")), "key 'a': two .cls members; expected one label a key"),
    Tar(
        "label-empty",
        tar(*TWO, member("c.png", PNG), member("c.cls")),
        "x.tar key 'c': label ''; expected one of 2 classes (0, 1)",
    ),
    Tar(
        "label-minus", tar(member("c.png", PNG), member("c.cls", b"-1"), *TWO), f"x.tar key 'c': label '-1'; {INTEGERS}"
    ),
    Tar(
        "label-float",
        tar(member("c.png", PNG), member("c.cls", b"1.5"), *TWO),
        f"x.tar key 'c': label '1.5'; {INTEGERS}",
    ),
    Tar(
        "label-binary",
        tar(member("c.png", PNG), member("c.cls", b"\xff\xfe"), *TWO),
        "x.tar key 'c': its label is not readable",
    ),
    Tar(
        "label-large",
        tar(member("c.png", PNG), member("c.cls", bytes(2**21)), *TWO),
        "key 'c': a .cls of 2,097,152 bytes",
    ),
    Tar(
        "json-key",
        tar(member("c.png", PNG), member("c.json", b'{"klass": 1}'), *TWO),
        "key 'c': its .json has no key 'label', found klass; set data.label_column",
    ),
    Tar(
        "json-torn", tar(member("c.png", PNG), member("c.json", b'{"label'), *TWO), "key 'c': its label is not readable"
    ),
    Tar(
        "json-bool",
        tar(*(m for k in "ab" for m in (member(f"{k}.png", PNG), member(f"{k}.json", b'{"label": true}')))),
        f"label True; {INTEGERS}",
    ),
    Tar("no-samples", tar(member("README.md", b"hello")), "no pictures found"),
    Tar("empty-tar", tar(), "no pictures found"),
    Tar("empty-file", b"", "not readable as a tar"),
    Tar("text", b"no tar" * 200, "not readable as a tar"),
    Tar("no-end", WHOLE_TAR[: 8 * 512], "x.tar: not readable as a tar: no end mark at byte 4,096; is it whole?"),
    Tar(
        "joined",
        WHOLE_TAR + tar(member("c.png", PNG), member("c.cls", b"1")),
        "more data follows its end mark (joined tars?)",
    ),
    Tar("broken-header", WHOLE_TAR.replace(b"b.png\0", b"bXpng\0"), "no end mark at byte 2,048"),
    Tar("size-minus", forged_size(b"\xff" * 12), "not readable as a tar"),
    Tar("size-huge", forged_size(b"77777777777\0"), "key 'a': a .cls of 8,589,934,591 bytes; expected a label"),
    Tar("gzip", tar(*TWO, mode="w:gz"), "x.tar.gz: compressed; pictures are read by their place", "x.tar.gz"),
    Tar("gzip-inside", tar(*TWO, mode="w:gz"), "x.tar: compressed; pictures are read by their place"),
    Tar("xz-inside", tar(*TWO, mode="w:xz"), "x.tar: compressed"),
    Tar("tgz", b"", "x.tgz: compressed; ", "x.tgz"),
    Tar("none", b"", "holds no *.tar files", "x.zip"),
]


@pytest.mark.parametrize("case", TARS, ids=lambda case: case.name)
def test_a_bad_tar_names_itself_and_key_and_an_unusual_one_is_read(case, tmp_path):
    (tmp_path / case.file).write_bytes(case.data)
    cfg = Data(source="webdataset", path=str(tmp_path))
    if isinstance(case.wanted, str):
        with pytest.raises(DataError) as caught:
            sources.open_source(cfg)
        assert case.wanted in str(caught.value)
        return
    source = sources.open_source(cfg)
    assert {row.origin for row in source.rows} == {f"x.tar#{key}" for key in case.wanted}
    assert len({row.key for row in source.rows}) == len(source.rows)
    for row, data in zip(source.rows, source.read(source.rows), strict=True):
        wanted = case.wanted[row.origin.removeprefix("x.tar#")]
        if isinstance(wanted, str):
            assert isinstance(data, DataError)
            assert wanted in str(data)
        else:
            assert (row.label, data) == (wanted, PNG)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    for cut in range(0, 8 * 512 + 1, 128):
        (tmp_path / "x.tar").write_bytes(WHOLE_TAR[:cut])
        with pytest.raises(DataError, match=r"x\.tar: not readable as a tar"):
            sources.open_source(Data(source="webdataset", path=str(tmp_path)))


@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_damaged_tar_is_read_or_refused_never_a_crash(tmp_path, style):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=style) as made:
        for info, data in [*TWO, member("é" * 80 + ".png", PNG), member("é" * 80 + ".cls", b"1")]:
            made.addfile(info, io.BytesIO(data))
    rng = np.random.default_rng(4)
    refused = 0
    for _ in range(150):
        data = bytearray(out.getvalue())
        for at in rng.integers(0, len(data), rng.integers(1, 40)):
            data[at] = rng.integers(256)
        (tmp_path / "x.tar").write_bytes(data)
        try:
            source = sources.open_source(Data(source="webdataset", path=str(tmp_path)))
        except DataError:
            refused += 1
            continue
        pictures = list(source.read(source.rows))
        assert len(pictures) == len(source.rows)
        assert all(isinstance(picture, (bytes, DataError)) for picture in pictures)
    assert 0 < refused < 150  # both ends were met


# links


@pytest.mark.parametrize("kind", ["folder", "images", "parquet", "webdataset"])
def test_no_source_follows_a_link_out_of_its_root(tmp_path, kind):
    name = {"parquet": "x.parquet", "webdataset": "x.tar"}.get(kind, "x.png")
    root, away = tmp_path / "set", tmp_path / "away"
    away.mkdir()
    (away / name).write_bytes(
        {"parquet": parquet_bytes(image=[PNG] * 2, label=[0, 1]), "webdataset": WHOLE_TAR}.get(kind, PNG)
    )
    for place in ("a", "b"):
        (root / place).mkdir(parents=True)
    inner = root if kind in ("parquet", "webdataset") else root / "a"
    (inner / name).symlink_to(away / name)
    (root / "t.csv").write_bytes(lines("a/x.png,cat", "b/y.png,dog"))
    with pytest.raises(DataError, match=rf"{name}: a link that leaves {root}; copy it there"):
        sources.open_source(Data(source=kind, path=str(root)))


def test_a_table_does_not_reach_out_through_a_linked_or_hidden_folder(tmp_path):
    root, away = tmp_path / "set", tmp_path / "away"
    away.mkdir()
    (away / "x.png").write_bytes(PNG)
    (root / ".hidden").mkdir(parents=True)
    (root / ".hidden" / "in.png").write_bytes(PNG)
    (root / ".hidden" / "out.png").symlink_to(away / "x.png")
    (root / "linked").symlink_to(away)
    cfg = Data(source="images", path=str(root))
    for path in ("linked/x.png", ".hidden/out.png"):
        (root / "t.csv").write_bytes(lines(f"{path},cat", "b.png,dog"))
        with pytest.raises(DataError, match=f"{path}: a link that leaves"):
            sources.open_source(cfg)
    (root / "t.csv").write_bytes(lines(".hidden/in.png,cat", f"{root}/.hidden/../.hidden/b.png,dog"))
    source = sources.open_source(cfg)
    assert [row.nbytes for row in source.rows] == [len(PNG), 0]
    assert [str(p) for p in list(source.read(source.rows))[1:]] == ["no such file"]


def test_a_folder_that_may_not_be_listed_is_named(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may list everything")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a").chmod(0)
    try:
        with pytest.raises(DataError, match="a: can't be listed: Permission denied; mend its permissions"):
            sources.open_source(Data(source="folder", path=str(tmp_path)))
    finally:
        (tmp_path / "a").chmod(0o755)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ('["cat", "cat"]', "the class name 'cat' stands there twice"),
        ("[0, 1]", "expected a list of class names"),
        ('["cat"]', "label '1'; expected one of 1 classes (0)"),
    ],
)
def test_a_bad_list_of_class_names_is_refused(tmp_path, names, message):
    (tmp_path / "x.tar").write_bytes(WHOLE_TAR)
    (tmp_path / "classes.json").write_text(names)
    with pytest.raises(DataError) as caught:
        sources.open_source(Data(source="webdataset", path=str(tmp_path)))
    assert message in str(caught.value)
