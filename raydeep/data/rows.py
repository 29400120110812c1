"""What every source shares: rows, the source itself, and labels → class codes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raydeep.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

MAX_CLASSES = 100_000
MAX_LABEL = 1_000  # characters
SPLITS = ("train", "val", "test")
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf", re.IGNORECASE)
ABSENT = {"", "nan", "null", "none", "na", "n/a", "nil", "<na>"}


class Row(NamedTuple):
    """One picture of a source."""

    origin: str  # where it came from, for people
    label: int
    split: str | None  # None: to be split
    key: Any  # what `read` needs to find it; no two rows share one
    nbytes: int  # encoded size, or a fair estimate of it


Picture = bytes | np.ndarray | DataError  # encoded, or uint8 HW/HWC pixels, or why it can't be read


@dataclass(frozen=True)
class Source:
    """An index of pictures and how to read them.

    `read(rows)` takes any rows of this source in any order and yields a Picture for each, in that order, with one
    picture (or one block) in memory at a time. It works in another process: a Source survives pickling, and `read`
    needs nothing of `rows`, so `dataclasses.replace(source, rows=[])` is what to send to readers.

    `block(row)`: rows of one block (a Parquet row group) are cheap to read together and dear apart. None: any order
    is as good.
    """

    classes: list[str]
    rows: list[Row]
    read: Callable[[Iterable[Row]], Iterator[Picture]]
    block: Callable[[Row], Hashable] | None = None


def split_of(name: str) -> str | None:
    """The split that a file's or a folder's name begins with."""
    return next((split for split in SPLITS if name.startswith(split)), None)


def printable(path: str) -> str:
    """A path that can be written as UTF-8: names on disk are bytes and need not be text."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")


class Labels(NamedTuple):
    """The labels of one file, kept as its few values and where each row's is."""

    where: Callable[[int], str]  # names file and row
    values: list[Any]
    places: np.ndarray  # of each row, in `values`
    shown: list[Any]  # the values as the file has them


def labels_of_list(where: Callable[[int], str], labels: Iterable[Any]) -> Labels:
    """Labels from Python values.

    Raises:
        DataError: a label is a list or an object.
    """
    known: dict[Any, int] = {}  # by type too: True == 1 == 1.0
    index = []
    for i, label in enumerate(labels):
        if isinstance(label, (list, dict)):
            raise DataError(f"{where(i)}: label {label!r}; expected integers from 0, or strings")
        index.append(known.setdefault((type(label), label), len(known)))
    values = [value for _, value in known]
    return Labels(where, values, np.array(index, np.int64), values)


def labels_of_arrow(where: Callable[[int], str], column: pa.ChunkedArray) -> Labels:
    """Labels from a column of an Arrow table, without an object a row."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):  # not cast: a file of some kilobytes may stand for gigabytes of text
        column = column.unify_dictionaries()
        if not column.num_chunks:
            return Labels(where, [], np.zeros(0, np.int64), [])
        known = labels_of_arrow(where, pa.chunked_array([column.chunk(0).dictionary]))
        index = np.concatenate([part.indices.fill_null(-1).to_numpy() for part in column.chunks])  # -1: the last one
        used, places = np.unique(np.append(known.places, len(known.values))[index], return_inverse=True)
        values = [[*known.values, None][at] for at in used]
        return Labels(where, values, places, values)
    try:
        parts = pc.dictionary_encode(column, null_encoding="encode").unify_dictionaries().chunks
    except pa.ArrowNotImplementedError:  # a type that is no label either
        return labels_of_list(where, column.to_pylist())
    if not parts:
        return Labels(where, [], np.zeros(0, np.int64), [])
    values = parts[0].dictionary.to_pylist()
    return Labels(where, values, np.concatenate([part.indices.to_numpy() for part in parts]), values)


def typed(columns: list[Labels]) -> list[Labels]:
    """Labels that were read as text (CSV, .cls) → integers if all of them are numbers, else strings.

    Words for "no value" among numbers, and an empty text anywhere, are no labels.
    """
    texts = {value.strip() for labels in columns for value in labels.values}
    given = {text for text in texts if text.lower() not in ABSENT}
    numbers = bool(given) and all(NUMBER.fullmatch(text) for text in given)

    def value(text: str) -> Any:
        text = text.strip()
        if text.lower() in (ABSENT if numbers else ("", "nan")):
            return None
        if not numbers:
            return text
        return int(text) if WHOLE.fullmatch(text) else float(text)

    return [labels._replace(values=[value(text) for text in labels.values], shown=labels.values) for labels in columns]


def code(home: str, columns: list[Labels], names: list[str] | None) -> tuple[list[str], list[np.ndarray]]:
    """Class names, and the class of each row of each file.

    Args:
        home: what the labels belong to, for errors.
        columns: labels of every file.
        names: of integer labels, from `classes.json`; None: there are none.

    Raises:
        DataError: a label is neither an integer from 0 nor a string, is missing or beyond the classes, or all
            are the same.
    """
    texts = any(isinstance(value, str) for labels in columns for value in labels.values)
    kinds = "strings, as elsewhere" if texts else "integers from 0, or strings"
    for labels in columns:
        wrong = [at for at, value in enumerate(labels.values) if value is not None and not _fits(value, texts)]
        if wrong:
            row, shown = _first(labels, wrong)
            if isinstance(shown, str) and len(shown) > MAX_LABEL:
                raise DataError(f"{labels.where(row)}: a label of {len(shown):,} characters, at most {MAX_LABEL:,}")
            hint = ""
            if isinstance(shown, float) or (isinstance(shown, str) and not texts and not WHOLE.fullmatch(shown)):
                hint = " (an empty cell makes a column of integers decimal: write whole numbers, leave out such rows)"
            raise DataError(f"{labels.where(row)}: label {shown!r}; expected {kinds}{hint}")
    found = {value for labels in columns for value in labels.values if value is not None}
    if len(found) < 2:
        raise DataError(f"{home}: all labels are the same; expected 2 or more classes")
    if texts:
        classes = sorted(found)
        codes: dict[Any, int] = {name: i for i, name in enumerate(classes)}
    else:
        if max(found) >= MAX_CLASSES:
            raise DataError(f"{home}: label {max(found)}: more than {MAX_CLASSES:,} classes; is it an id column?")
        classes = names or [str(i) for i in range(max(found) + 1)]
        codes = {i: i for i in range(len(classes))}
    for labels in columns:
        unknown = [at for at, value in enumerate(labels.values) if value not in codes]
        if unknown:
            row, shown = _first(labels, unknown)
            raise DataError(
                f"{labels.where(row)}: label {shown!r}; expected one of {len(classes)} classes "
                f"({', '.join(map(str, list(codes)[:4]))}{', …' if len(codes) > 4 else ''})"
            )
    coded = [np.array([codes[value] for value in labels.values], np.int64)[labels.places] for labels in columns]
    return classes, coded


def _fits(value: Any, texts: bool) -> bool:
    if texts:
        return isinstance(value, str) and is_name(value)
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_name(text: str) -> bool:
    """Whether a text can name a class: neither empty nor endless, and no halves of characters."""
    return len(text.strip()) > 0 and len(text) <= MAX_LABEL and text == text.encode("utf-8", "ignore").decode()


def _first(labels: Labels, wanted: list[int]) -> tuple[int, Any]:
    """The first row with one of these values, and the value."""
    row = int(np.isin(labels.places, wanted).argmax())
    return row, labels.shown[labels.places[row]]


def parse_names(where: str, data: bytes) -> list[str]:
    """Class names from the bytes of a `classes.json`.

    Raises:
        DataError: it is no JSON list of different strings.
    """
    try:
        names = json.loads(data)
    except ValueError as err:
        raise DataError(f"{where}: not valid JSON: {err}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: expected a list of class names")
    if any(not name.strip() or len(name) > MAX_LABEL for name in names):
        raise DataError(f"{where}: a class name is empty or longer than {MAX_LABEL:,} characters; shorten it")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: the class name {twice!r} stands there twice; give each class its own")
    return names
