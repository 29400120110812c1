"""Where pictures come from. A source is an index first (cheap), bytes later (streamed).

Contract of SOURCES: `(cfg: Data) -> Source`. `rows` lists every picture in a fixed order; `read(rows)` yields
for each of them the encoded bytes, uint8 pixels, or why it can't be read, in the order given.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raydeep.errors import DataError

if TYPE_CHECKING:
    from raydeep.config import Data

MAX_CLASSES = 100_000
SPLITS = ("train", "val", "test")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class Row(NamedTuple):
    """One picture of a source."""

    origin: str  # where it came from, for people
    label: int
    split: str | None  # None: to be split
    key: Any  # what `read` needs to find it


@dataclass(frozen=True)
class Source:
    """An index of pictures and how to read them."""

    classes: list[str]
    rows: list[Row]
    read: Callable[[Iterable[Row]], Iterator[bytes | np.ndarray | DataError]]


def _root(cfg: Data) -> Path:
    root = Path(cfg.path or "").expanduser()
    if not root.is_dir():
        raise DataError(f"data.path: {root} is not a folder; give an existing one with --set data.path=FOLDER")
    return root


def digits(cfg: Data) -> Source:
    """scikit-learn's handwritten digits: 1,797 scans of 8×8, values 0..16 (embedded, no download)."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images_NHW = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    rows = [Row(f"sklearn/digits#{i}", int(label), None, i) for i, label in enumerate(labels)]
    return Source([str(i) for i in range(10)], rows, lambda wanted: (images_NHW[row.key] for row in wanted))


def synthetic(cfg: Data) -> Source:
    """Noisy gratings, one direction a class: quick to make, not trivially separable. 16×16 grey unless sized."""
    size = cfg.image_size or 16
    angles = np.pi * np.arange(cfg.classes) / cfg.classes

    def make(i: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[cfg.split_seed, i]))
        angle = angles[i % cfg.classes] + rng.normal(0, 0.1)
        y, x = np.mgrid[:size, :size] / size
        wave = np.sin(2 * np.pi * (3 * (x * np.cos(angle) + y * np.sin(angle)) + rng.random()))
        return np.clip(127 + 80 * wave + rng.normal(0, 30, (size, size)), 0, 255).astype(np.uint8)

    rows = [Row(f"synthetic#{i}", i % cfg.classes, None, i) for i in range(cfg.rows)]
    return Source([f"class{i}" for i in range(cfg.classes)], rows, lambda wanted: (make(row.key) for row in wanted))


def folder(cfg: Data) -> Source:
    """Class sub-folders, either below `path` or below `path/train`, `path/val`, `path/test`."""
    root = _root(cfg)
    splits: dict[str | None, Path] = {s: root / s for s in SPLITS if (root / s).is_dir()}
    if "train" not in splits:
        splits = {None: root}
    names = {d.name for base in splits.values() for d in base.iterdir() if d.is_dir() and d.name[0] != "."}
    if len(names) < 2:
        raise DataError(f"data.path: {root} holds {len(names)} class folders, expected 2 or more (one a class)")
    classes = sorted(names)
    rows = []
    home = root.resolve()
    for split, base in splits.items():
        for label, name in enumerate(classes):
            for path in _files(base / name):
                if path.suffix.lower() in SUFFIXES and path.is_file():
                    if not path.resolve().is_relative_to(home):
                        raise DataError(f"{path}: a link that leaves {root}; copy the picture there")
                    rows.append(Row(str(path.relative_to(root)), label, split, path))
    return Source(classes, rows, lambda wanted: (_bytes(row.key) for row in wanted))


def _files(folder: Path) -> list[Path]:
    """All files below a folder, sorted; none if there is no such folder."""

    def refuse(err: OSError) -> None:
        raise DataError(f"{err.filename}: can't be listed: {err.strerror}; mend its permissions")

    found = os.walk(folder, onerror=refuse) if folder.is_dir() else []
    return sorted(Path(home) / name for home, _, names in found for name in names)


def _bytes(path: Path) -> bytes | DataError:
    try:
        return path.read_bytes()
    except OSError as err:
        return DataError(f"can't be read: {err.strerror}")


def parquet(cfg: Data) -> Source:
    """Parquet files with a column of encoded pictures and a label column of integers or strings.

    `train*.parquet`, `val*.parquet` and `test*.parquet` name splits; with no `train*`, all files are split.
    A `classes.json` (list of names) beside them names integer labels.
    """
    import pyarrow.parquet as pq

    root = _root(cfg)
    files = sorted(root.glob("*.parquet"))
    if not files:
        raise DataError(f"data.path: {root} holds no *.parquet files")
    found: list[tuple[Path, str | None, list[Any]]] = []
    has_train = any(f.name.startswith("train") for f in files)
    for file in files:
        try:
            names = pq.read_schema(file).names
            for key, column in (("image_column", cfg.image_column), ("label_column", cfg.label_column)):
                if column not in names:
                    raise DataError(f"{file}: no column {column!r}, found {', '.join(names)}; set data.{key}")
            labels = pq.read_table(file, columns=[cfg.label_column]).column(0).to_pylist()
        except (OSError, ValueError) as err:
            raise DataError(f"{file}: not readable as Parquet: {err}") from None
        split = next((s for s in SPLITS if file.name.startswith(s)), None) if has_train else None
        if not has_train or split is not None:
            found.append((file, split, labels))
    classes, codes = _classes(root / "classes.json", found)
    rows = []
    for file, split, labels in found:
        for i, label in enumerate(labels):
            if label not in codes:
                raise DataError(
                    f"{file} row {i}: label {label!r}; expected one of {len(classes)} classes "
                    f"({', '.join(map(str, list(codes)[:4]))}{', …' if len(codes) > 4 else ''})"
                )
            rows.append(Row(f"{file.name}#{i}", codes[label], split, (file, i)))

    def read(wanted: Iterable[Row]) -> Iterator[bytes]:
        current: tuple[Path, int] | None = None
        pictures: Any = None
        parts: Any = None
        starts: list[int] = []
        for row in wanted:
            file, i = row.key
            if current is None or current[0] != file:
                parts = pq.ParquetFile(file)
                sizes = [parts.metadata.row_group(g).num_rows for g in range(parts.num_row_groups)]
                starts = [0, *np.cumsum(sizes).tolist()]
                current = None
            group = int(np.searchsorted(starts, i, side="right")) - 1
            if current != (file, group):
                pictures = parts.read_row_group(group, columns=[cfg.image_column]).column(0)
                current = (file, group)
            value = pictures[i - starts[group]].as_py()
            if isinstance(value, dict):  # the struct of Hugging Face image columns: {"bytes": …, "path": …}
                value = value.get("bytes")
            yield value if isinstance(value, bytes) else b""

    return Source(classes, rows, read)


def _classes(file: Path, found: list[tuple[Path, str | None, list[Any]]]) -> tuple[list[str], dict[Any, int]]:
    """Class names, and the code of each label value."""
    texts = any(isinstance(label, str) for _, _, labels in found for label in labels)
    values: set[Any] = set()
    for origin, _, labels in found:
        for i, label in enumerate(labels):
            if label is None:
                continue  # refused below, where the classes are known
            whole = isinstance(label, int) and not isinstance(label, bool) and label >= 0
            if not (isinstance(label, str) if texts else whole):
                kinds = "strings, as elsewhere" if texts else "integers from 0, or strings"
                raise DataError(f"{origin} row {i}: label {label!r}; expected {kinds}")
            values.add(label)
    if len(values) < 2:
        raise DataError(f"{file.parent}: all labels are the same; expected 2 or more classes")
    if texts:
        names = sorted(values)
        return names, {name: i for i, name in enumerate(names)}
    count = max(values) + 1
    if count > MAX_CLASSES:
        raise DataError(f"{file.parent}: label {max(values)}: more than {MAX_CLASSES:,} classes; is it an id column?")
    names = [str(i) for i in range(count)]
    if file.exists():
        try:
            names = json.loads(file.read_text())
        except ValueError as err:
            raise DataError(f"{file}: not valid JSON: {err}") from None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{file}: expected a list of class names")
    return names, {i: i for i in range(len(names))}


SOURCES: dict[str, Callable[[Data], Source]] = {
    "digits": digits,
    "folder": folder,
    "parquet": parquet,
    "synthetic": synthetic,
}
