"""Pictures: given to predict, which goes on with the others, and to shard, which puts them in quarantine."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from hostile.harness import Case, MiB, Stock
from hostile.parts import Make, all_of, chunk, classes, encoded, fifo, file, link, model, png, sparse

LABELLED = r"\t\d\t[01]\.\d{4}"
SHARDED = ("out", "out/*")
REFUSED = ("out.quarantine.jsonl",)
BAD = r"^error: 1 of the pictures can't be read; the others are labelled$"


def predict(name: str, data: bytes | Make, says: str = BAD, code: int = 2, peak: int = 150 * MiB) -> Case:
    """One picture, x.png, and a whole one beside it."""
    make = data if callable(data) else file("x.png", data)
    whole = all_of(model, make, file("whole.png", encoded()))
    return Case("pictures", name, "raydeep predict model whole.png x.png", says, whole, code, peak=peak)


def named(name: str, title: str) -> Case:
    """A whole picture with a name that a terminal must not get as it is."""

    def make(folder: Path, stock: Stock) -> None:
        model(folder, stock)
        (folder / "in").mkdir()
        with open(os.path.join(os.fsencode(folder / "in"), os.fsencode(name)), "wb") as out:
            out.write(encoded())

    return Case("pictures", title, "raydeep predict model in", LABELLED, make, 0)


def shard(name: str, data: bytes | Make, says: str, code: int = 2, count: int = 20, sets: str = "") -> Case:
    """Two classes of whole pictures and one bad one."""
    bad = data if callable(data) else file("pics/cat/x.png", data)
    leaves = SHARDED if code == 0 else REFUSED
    command = f"raydeep shard pics out{sets}"
    return Case("pictures", name, command, says, all_of(classes(count=count), bad), code, leaves)


def tiff_tiles() -> bytes:
    """A TIFF of 8×8 pixels in one tile of 65,528×65,528."""
    tags = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (277, 1), (322, 65528), (323, 65528), (324, 8), (325, 64)]
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + body + b"\0" * 68


def gif_frame() -> bytes:
    """A GIF of a 1×1 screen whose frame is 65,535×65,535."""
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, 65535, 65535, 0)
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + b"\0" * 6 + frame + b"\x02\x02\x4c\x01\0;"


def bad_crc() -> bytes:
    data = bytearray(encoded())
    data[data.index(b"IDAT") + 8] ^= 0xFF
    return bytes(data)


def text_bomb() -> bytes:
    """A compressed text chunk of 64 MiB of zeros beside whole pixels."""
    import zlib

    return png(8, 8, b"\0" * 72, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 64 * MiB, 9)))


EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\xff\xff\0\0\xff\xff\xff\xff"  # orientation 65535

CASES = [
    predict("PNG cut in the middle", encoded()[:60]),
    predict("PNG of 60,000×60,000 pixels in 80 bytes", png(60_000, 60_000)),
    predict("PNG whose rows inflate to 64 MiB and say 8×8", png(8, 8, b"\0" * 64 * MiB), LABELLED, 0),
    predict("PNG with a text chunk that inflates to 64 MiB", text_bomb()),
    predict("PNG of the most pixels allowed", png(8192, 8192, b"\0" * 8193 * 8192), LABELLED, 0, 900 * MiB),
    predict("GIF whose frame is 65,535×65,535", gif_frame()),
    predict("TIFF with one tile of 65,528×65,528", tiff_tiles()),
    predict("PNG with a wrong checksum", bad_crc()),
    predict("text called .png", b"this is no picture\n" * 20),
    predict("empty file", b""),
    predict("an SVG that names /etc/passwd", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/>'),
    predict("PostScript that would be run", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) run\n"),
    predict("1×100,000 pixels", png(1, 100_000, b"\0\0" * 100_000), LABELLED, 0),
    predict("CMYK JPEG", encoded((16, 16), "JPEG", "CMYK"), LABELLED, 0),
    predict("JPEG whose EXIF has orientation 65535", encoded((16, 16), "JPEG", exif=EXIF), LABELLED, 0),
    predict("a file that claims 3 GiB", sparse("x.png", 3 * 1024 * MiB)),
    predict("a pipe that nobody writes to", fifo("x.png"), "x.png: no such picture or folder"),
    predict("a link to /dev/zero", link("x.png", "/dev/zero"), "x.png: no such picture or folder"),
    predict("a link to itself", link("x.png", "x.png"), "x.png: no such picture or folder"),
    predict("an empty folder called x.png", lambda folder, stock: (folder / "x.png").mkdir(), LABELLED, 0),
    Case(
        "pictures", "a folder that links to its parent", "raydeep predict model in", LABELLED,
        all_of(model, file("in/a.png", encoded()), link("in/up", "..")), 0,
    ),
    Case("pictures", "a folder without pictures", "raydeep predict model in", "no pictures in in",
         all_of(model, file("in/a.txt", "x"))),
    named("line\nbreak\r.png", "a name with line breaks"),
    named("\x1b[2J\x1b]0;owned\x07.png", "a name that clears the terminal and sets its title"),
    named("caf\udce9.png", "a name that is no UTF-8"),
    named("evil\u202egnp.exe.png", "a name that turns the direction of writing"),
    Case(
        "pictures", "a bad picture whose name clears the terminal", "raydeep predict model in", BAD,
        all_of(model, file("in/\x1b[2J\x1b[31m.png", b"no")),
    ),
    Case("pictures", "a path of 5,000 characters", f"raydeep predict model {'a' * 5000}", "File name too long", model),
    shard("a torn picture among 40", encoded()[:50],
          r"^error: 1 of 41 pictures can't be read \(2\.4%, allowed 1\.0%\)"),
    shard("the same, allowed", encoded()[:50], "1 in quarantine", 0, sets=" --set data.max_bad_fraction=0.1"),
    shard("a pipe among pictures", fifo("pics/cat/x.png"), "0 in quarantine", 0),
    shard("a link to a picture elsewhere", link("pics/cat/x.png", "/etc/hostname"), "a link that leaves pics; copy it"),
    shard("a class folder that holds itself", link("pics/cat/self", "."), "a link to a folder that holds it"),
    shard("an APNG", encoded((8, 8), "PNG", "RGB", save_all=True), r"\d+ in quarantine", 0),
    shard("16 bits of grey", encoded((8, 8), "PNG", "I;16"), "0 in quarantine", 0),
    shard(
        "a bad picture whose name clears the terminal, sharded", file("pics/cat/\x1b[2J\x1b[31m.png", b"no"),
        "1 of 41 pictures can't be read",
    ),
    shard("a bad picture whose name is no UTF-8", lambda folder, stock: _raw_name(folder), "1 of 41 pictures"),
    Case(
        "pictures", "class folders whose names clear the terminal", "raydeep shard pics out", "2 classes",
        classes("\x1b[2Jcat", "dog\nrow"), 0, SHARDED,
    ),
]  # fmt: skip


def _raw_name(folder: Path) -> None:
    with open(os.fsencode(folder / "pics" / "cat") + b"/caf\xe9.png", "wb") as out:
        out.write(b"no")
