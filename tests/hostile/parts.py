"""Makers of files that several groups of cases use. Each is called with the case's folder and the stock."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hostile.harness import Stock
from raydeep import disk

Make = Callable[[Path, Stock], None]


def all_of(*makes: Make) -> Make:
    def make(folder: Path, stock: Stock) -> None:
        for one in makes:
            one(folder, stock)

    return make


def file(name: str, data: bytes | str | Callable[[], bytes]) -> Make:
    def make(folder: Path, stock: Stock) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = data() if callable(data) else data
        path.write_bytes(whole.encode() if isinstance(whole, str) else whole)

    return make


def model(folder: Path, stock: Stock) -> None:
    """A whole model folder: model/."""
    shutil.copytree(stock.model, folder / "model")


def a_run(folder: Path, stock: Stock) -> None:
    """A whole run folder: run/."""
    shutil.copytree(stock.run, folder / "run")


def a_dataset(folder: Path, stock: Stock) -> None:
    """A whole dataset: shards/."""
    shutil.copytree(stock.dataset, folder / "shards")


def changed(name: str, change: Callable[[Any], Any], sums: bool = True) -> Make:
    """A JSON file of a model or run with something else in it; the checksums, if there are, are made to fit."""

    def make(folder: Path, stock: Stock) -> None:
        path = folder / name
        value = json.loads(path.read_text())
        path.write_text(json.dumps(change(value)))
        if sums and (path.parent / "SHA256SUMS").exists():
            disk.write_sums(path.parent)

    return make


def put(name: str, data: bytes, sums: bool = False) -> Make:
    """A file of a model or run with other bytes in it."""

    def make(folder: Path, stock: Stock) -> None:
        (folder / name).write_bytes(data)
        if sums:
            disk.write_sums((folder / name).parent)

    return make


def cut(name: str, share: float = 0.5) -> Make:
    def make(folder: Path, stock: Stock) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return make


def link(name: str, to: str) -> Make:
    def make(folder: Path, stock: Stock) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(to)

    return make


def removed(name: str) -> Make:
    def make(folder: Path, stock: Stock) -> None:
        (folder / name).unlink()

    return make


def sparse(name: str, size: int) -> Make:
    """A file that claims a size and takes none."""

    def make(folder: Path, stock: Stock) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("wb") as out:
            out.truncate(size)

    return make


def fifo(name: str) -> Make:
    def make(folder: Path, stock: Stock) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)

    return make


# pictures


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    sum_ = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum_)


def png(width: int, height: int, body: bytes = b"\0" * 9, extra: bytes = b"", colour: int = 0) -> bytes:
    """A PNG that says what its header says, whatever it holds."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b"")


def encoded(size: tuple[int, int] = (8, 8), kind: str = "PNG", mode: str = "L", seed: int = 0, **options: Any) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **options)
    return out.getvalue()


def classes(*names: str, count: int = 20, root: str = "pics") -> Make:
    """Class folders of whole pictures."""

    def make(folder: Path, stock: Stock) -> None:
        for i, name in enumerate(names or ("cat", "dog")):
            (folder / root / name).mkdir(parents=True)
            for j in range(count):
                (folder / root / name / f"{j:02d}.png").write_bytes(encoded(seed=100 * i + j))

    return make


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
