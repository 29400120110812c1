"""Where pictures come from. A source is an index first (cheap), bytes later (streamed).

Contract of SOURCES: `(cfg: Data) -> Source`. `rows` lists every picture in a fixed order; `read(rows)` yields
for each of them the encoded bytes, uint8 pixels, or why it can't be read, in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from raydeep.data.custom import custom, custom_facts
from raydeep.data.files import AWAY, AWAY_FOLDER, LOOP, Entry, open_files, read_files
from raydeep.data.rows import MAX_CLASSES, SPLITS, SUFFIXES, Picture, Row, Source, printable
from raydeep.data.tables import images, parquet
from raydeep.data.tars import tar_files, webdataset
from raydeep.data.vision import vision, vision_facts
from raydeep.errors import DataError
from raydeep.fields import TORCHVISION

if TYPE_CHECKING:
    from raydeep.config import Data

__all__ = [
    "MAX_CLASSES",
    "SOURCES",
    "SPLITS",
    "SUFFIXES",
    "Picture",
    "Row",
    "Source",
    "fingerprint",
    "open_source",
]


def digits(cfg: Data) -> Source:
    """scikit-learn's handwritten digits: 1,797 scans of 8×8, values 0..16 (embedded, no download)."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images_NHW = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rows = [Row(f"sklearn/digits#{i}", int(label), None, i, 64) for i, label in enumerate(labels)]
    return Source([str(i) for i in range(10)], rows, partial(_read_pixels, images_NHW))


def _read_pixels(images_NHW: np.ndarray, wanted: Iterable[Row]) -> Iterator[np.ndarray]:
    return (images_NHW[row.key] for row in wanted)


def synthetic(cfg: Data) -> Source:
    """Noisy gratings, one direction a class: quick to make, not trivially separable. 16×16 grey unless sized."""
    size = cfg.image_size or 16
    rows = [Row(f"synthetic#{i}", i % cfg.classes, None, i, size * size) for i in range(cfg.rows)]
    return Source(
        [f"class{i}" for i in range(cfg.classes)], rows, partial(_gratings, size, cfg.classes, cfg.split_seed)
    )


def _gratings(size: int, classes: int, seed: int, wanted: Iterable[Row]) -> Iterator[np.ndarray]:
    angles = np.pi * np.arange(classes) / classes
    y, x = np.mgrid[:size, :size] / size
    for row in wanted:
        rng = np.random.Generator(np.random.Philox(key=[seed, row.key]))
        angle = angles[row.key % classes] + rng.normal(0, 0.1)
        wave = np.sin(2 * np.pi * (3 * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()))
        yield np.clip(127 + 80 * wave + rng.normal(0, 30, (size, size)), 0, 255).astype(np.uint8)


def folder(cfg: Data) -> Source:
    """Class sub-folders, either below `path` or below `path/train`, `path/val`, `path/test`.

    Hidden files are no pictures. Links to files and folders below `path` are followed.

    Raises:
        DataError: there are fewer than 2 classes, or a link leads away from `path` or in a circle.
    """
    files = open_files(cfg)
    bases: dict[str, str | None] = {f"{split}/": split for split in files.folders() if split in SPLITS}
    if "train/" not in bases:
        bases = {"": None}
    classes = sorted({name for base in bases for name in files.folders(base)})
    if len(classes) < 2:
        raise DataError(
            f"data.path: {files.name()} holds {len(classes)} class folders, expected 2 or more (one a class)"
        )
    labels = {name: i for i, name in enumerate(classes)}
    rows = []
    for entry in files.entries():
        top = entry.path.partition("/")[0]
        base = f"{top}/" if bases.get(f"{top}/") else ""
        name, _, rest = entry.path[len(base) :].partition("/")
        if base not in bases or name not in labels:
            continue
        if entry.fault in (AWAY_FOLDER, LOOP) or (entry.fault == AWAY and _is_picture(entry)):
            raise (
                files.leaves(entry.path)
                if entry.fault != LOOP
                else DataError(f"{files.name(entry.path)}: a link to a folder that holds it; remove it")
            )
        if rest and _is_picture(entry):
            rows.append(Row(printable(entry.path), labels[name], bases[base], entry.path, entry.size))
    rows.sort(key=lambda row: (SPLITS.index(row.split or "train"), row.label))  # stable: then by path
    return Source([printable(name) for name in classes], rows, partial(read_files, files))


def _is_picture(entry: Entry) -> bool:
    return PurePosixPath(entry.path).suffix.lower() in SUFFIXES


SOURCES: dict[str, Callable[[Data], Source]] = {
    "digits": digits,
    "folder": folder,
    "images": images,
    "parquet": parquet,
    "synthetic": synthetic,
    "webdataset": webdataset,
}


def open_source(cfg: Data) -> Source:
    """The index of a job's source, `torchvision:NAME` and the user's own included.

    Raises:
        DataError: what is at data.path is not what the source needs; says what and where.
    """
    if cfg.source.startswith(TORCHVISION):
        return vision(cfg)
    return custom(cfg) if cfg.is_own else SOURCES[cfg.source](cfg)


def fingerprint(cfg: Data) -> list[Any]:
    """Facts, ready for JSON, that change when the files of a source do: path, size, time or etag of each.

    Raises:
        DataError: data.path is no folder or can't be reached.
    """
    if cfg.source.startswith(TORCHVISION):
        return vision_facts(cfg)
    if cfg.is_own:
        return custom_facts(cfg)
    if not cfg.needs_path:
        return []
    files = open_files(cfg)
    entries = files.entries(deep=cfg.source != "parquet")
    matter = {
        "folder": _is_picture,
        "images": lambda entry: True,  # the table may name any file
        "parquet": lambda entry: entry.path.endswith((".parquet", "classes.json")),
        "webdataset": lambda entry: tar_files([entry]) != [] or entry.path == "classes.json",
    }[cfg.source]
    facts: list[Any] = [[entry.path, entry.size, entry.stamp] for entry in entries if entry.fault or matter(entry)]
    if cfg.source == "folder":  # an empty class folder is a class
        facts.append(files.folders())
    return facts
