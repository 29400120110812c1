"""Pictures to be labelled: any source of pictures, with its labels where it has some.

What is trained on must have labels, of two classes or more; what is predicted need not. A row without one has the label
UNKNOWN. Classes are those of the model, then names that only the source has.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raydeep import mirror, own
from raydeep.data import decode, shards, tables, tars
from raydeep.data import rows as rows_
from raydeep.data.files import AWAY, DANGLING, Files, open_files
from raydeep.data.rows import SPLITS, SUFFIXES, Labels, Picture, Row, Source, printable, split_of
from raydeep.data.sources import open_source
from raydeep.errors import DataError
from raydeep.fields import TORCHVISION
from raydeep.remote import SCHEME

if TYPE_CHECKING:
    from raydeep.sections import Data

UNKNOWN = -1
TABLES = (".csv", ".tsv", ".jsonl")
TARS = (".tar", *tars.COMPRESSED)

Read = Callable[[Iterable[Row]], Iterator[Picture]]


class Names:
    """Labels of any kind → numbers: the model's classes first, then names that it does not have, as they come."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.model = list(classes)
        self.numbers = {name: i for i, name in enumerate(classes)}

    def number(self, label: Any, own_names: Sequence[str] | None = None) -> int:
        """Of a name, or of an integer that indexes the source's own names, else the model's; else UNKNOWN."""
        if isinstance(label, int) and not isinstance(label, bool):
            names = own_names or self.model
            label = names[label] if 0 <= label < len(names) else str(label)
        if not isinstance(label, str) or not rows_.is_name(label):
            return UNKNOWN
        return self.numbers.setdefault(label, len(self.numbers))

    def of(self, labels: Labels, own_names: Sequence[str] | None = None) -> list[int]:
        """Numbers of all rows of a column."""
        known = np.array([self.number(value, own_names) for value in labels.values], np.int64)
        return known[labels.places].tolist() if len(labels.places) else []


def open_pictures(texts: Sequence[str], classes: Sequence[str], cfg: Data, split: str | None = None) -> Source:
    """The index of what a user names to be labelled, in a fixed order.

    Args:
        texts: picture files, folders of pictures, globs, Parquet or tar files or folders of them, tables (CSV, TSV,
            JSON Lines), folders of shards, each a path or an address; digits, synthetic, torchvision:NAME,
            package.module:factory.
        classes: of the model.
        cfg: for columns, torchvision's root and the like; its source and path are not looked at.
        split: only pictures of this split.

    Raises:
        DataError: one of them is not there, holds no picture, or can't be read.
    """
    names = Names(classes)
    rows: list[Row] = []
    reads: list[Read] = []
    blocks = True
    for text in texts:
        for part in _open(text, names, cfg, split):
            rows += [
                row._replace(key=(len(reads), row.key)) for row in part.rows if split is None or row.split == split
            ]
            reads.append(part.read)
            blocks &= part.block is not None
    if not rows:
        what = f"no pictures in {', '.join(texts)}"
        raise DataError(what if split is None else f"{what} that are of the split {split}; leave --split out for all")
    return Source(list(names.numbers), rows, partial(_read_parts, reads), _block if blocks else None)


def _read_parts(reads: Sequence[Read], wanted: Iterable[Row]) -> Iterator[Picture]:
    for number, group in groupby(wanted, key=lambda row: row.key[0]):
        yield from reads[number](row._replace(key=row.key[1]) for row in group)


def _block(row: Row) -> Hashable:
    return row.key[0], row.key[1][:2]


def _open(text: str, names: Names, cfg: Data, split: str | None) -> Iterator[Source]:
    """The sources that one text stands for."""
    path = Path(text).expanduser()
    if SCHEME.match(text) is None and _there(path):
        yield from _local(path, names, cfg, split)
    elif text in ("digits", "synthetic") or text.startswith(TORCHVISION) or own.NAME.fullmatch(text):
        whole = open_source(cfg.model_copy(update={"source": text}))
        numbers = [names.number(name) for name in whole.classes]
        yield Source([], [row._replace(label=numbers[row.label]) for row in whole.rows], whole.read)
    elif SCHEME.match(text) is not None:
        yield from _remote(text, names, cfg, split)
    elif glob.has_magic(text):
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise DataError(f"{text}: no file matches")
        for one in found:
            yield from _local(Path(one), names, cfg, split)
    else:
        raise DataError(f"{text}: no such picture or folder")


def _there(path: Path) -> bool:
    """Whether there is anything of this name; one that can't be looked at, or be a name at all, raises OSError."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:  # a NUL
        return False
    return True


def _local(path: Path, names: Names, cfg: Data, split: str | None) -> Iterator[Source]:
    if path.is_dir():
        if (path / "dataset.json").is_file():
            yield _shards(path, names, split)
            return
        inside = sorted(entry for entry in path.iterdir() if entry.name[0] != ".")
        kinds = {entry.suffix.lower() for entry in inside if entry.is_file()}
        if not kinds & SUFFIXES and kinds & {".parquet", *TARS}:
            for entry in inside:
                if entry.suffix.lower() in (".parquet", *TARS):
                    yield _packed(Files(str(path)), entry.name, names, cfg)
            return
        rows = []
        for file in Files(str(path)).entries():
            there = file.fault in ("", DANGLING) or (path / file.path).is_file()  # no device, nor a folder
            if there and Path(file.path).suffix.lower() in SUFFIXES:
                part, label = _folders(file.path.split("/")[:-1], names)
                whole = str(path / file.path)
                rows.append(Row(printable(whole), label, part, whole, file.size))
        yield Source([], rows, _read_local)
    elif path.is_file() and path.name.lower().endswith((".parquet", *TARS, *TABLES)):
        yield _packed(Files(str(path.parent)), path.name, names, cfg)
    elif path.is_file():
        yield Source([], [Row(printable(str(path)), UNKNOWN, None, str(path), path.stat().st_size)], _read_local)
    else:
        raise DataError(f"{path}: no such picture or folder")


def _remote(text: str, names: Names, cfg: Data, split: str | None) -> Iterator[Source]:
    parent, _, name = text.split("?")[0].rstrip("/").rpartition("/")
    options = f"?{text.partition('?')[2]}" if "?" in text else ""
    if name.lower().endswith((".parquet", *TARS, *TABLES)):
        yield _packed(open_files(cfg.model_copy(update={"path": parent + options})), name, names, cfg)
        return
    if Path(name).suffix.lower() in SUFFIXES:
        files = open_files(cfg.model_copy(update={"path": parent + options}))
        yield Source([], [Row(files.name(name), UNKNOWN, None, name, 0)], partial(_read_remote, files))
        return
    files = open_files(cfg.model_copy(update={"path": text}))
    entries = files.entries()
    top = {entry.path for entry in entries if "/" not in entry.path}
    if "dataset.json" in top:
        place = mirror.place(text, "SOURCE")
        mirror.pull(place)
        yield _shards(place, names, split)
        return
    pictures = [entry for entry in entries if Path(entry.path).suffix.lower() in SUFFIXES]
    packed = sorted(name for name in top if name.lower().endswith((".parquet", *TARS)))
    if packed and not top & {entry.path for entry in pictures}:
        for name in packed:
            yield _packed(files, name, names, cfg)
        return
    rows = []
    for entry in pictures:
        part, label = _folders(entry.path.split("/")[:-1], names)
        rows.append(Row(files.name(entry.path), label, part, entry.path, entry.size))
    yield Source([], rows, partial(_read_remote, files))


# picture files


def _folders(above: Sequence[str], names: Names) -> tuple[str | None, int]:
    """Split and label as the folders above a picture say: (SPLIT/)CLASS/…; other folders say nothing."""
    split = above[0] if above and above[0] in SPLITS else None
    rest = above[1:] if split else above
    number = names.numbers.get(rest[0], UNKNOWN) if rest else UNKNOWN
    return split, number if number < len(names.model) else UNKNOWN


def _read_local(wanted: Iterable[Row]) -> Iterator[Picture]:
    for row in wanted:
        try:
            with open(row.key, "rb") as file:
                yield decode.read_file(file)
        except DataError as err:
            yield err
        except OSError as err:
            yield DataError(f"can't be read: {err.strerror or err}")


def _read_remote(files: Files, wanted: Iterable[Row]) -> Iterator[Picture]:
    return (files.picture(row.key) for row in wanted)


# files that hold pictures


def _packed(files: Files, name: str, names: Names, cfg: Data) -> Source:
    kind = name.lower()
    if kind.endswith(".parquet"):
        return _parquet(files, name, names, cfg)
    return _tar(files, name, names, cfg) if kind.endswith(TARS) else _table(files, name, names, cfg)


def _own_names(files: Files) -> list[str] | None:
    """What a `classes.json` beside them calls integer labels."""
    name = "classes.json"
    there = any(entry.path == name for entry in files.entries(deep=False))
    return rows_.parse_names(files.name(name), files.read(name)) if there else None


def _parquet(files: Files, name: str, names: Names, cfg: Data) -> Source:
    index = tables.index_parquet(files, name, cfg, labelled=False)
    numbers = names.of(index.labels, _own_names(files))
    places = ((group, at) for group, size in enumerate(index.sizes) for at in range(size))
    rows = [
        Row(f"{files.name(name)}#{i}", number, split_of(name), (name, group, at), index.nbytes[group])
        for i, (number, (group, at)) in enumerate(zip(numbers, places, strict=True))
    ]
    return Source([], rows, partial(tables.read_parquet, files, cfg.image_column), _block)


def _tar(files: Files, name: str, names: Names, cfg: Data) -> Source:
    samples = tars.scan(files, name, cfg.label_column, labelled=False)
    labelled = [sample for sample in samples if sample.labelled]
    labels = rows_.labels_of_list(str, [sample.label for sample in labelled])
    if all(sample.text for sample in labelled):
        [labels] = rows_.typed([labels])
    numbers = iter(names.of(labels, _own_names(files)))
    rows = []
    for sample in samples:
        key = (name, sample.offset, sample.why or sample.size)
        number = next(numbers) if sample.labelled else UNKNOWN
        rows.append(Row(printable(f"{files.name(name)}#{sample.key}"), number, split_of(name), key, sample.size))
    return Source([], rows, partial(tars.read_members, files))


def _table(files: Files, name: str, names: Names, cfg: Data) -> Source:
    table = tables.read_table(files, name, cfg, labelled=False)
    given = table.columns.get(cfg.label_column, [None] * len(table.numbers))
    labels = rows_.labels_of_list(table.row, given)
    if table.text and cfg.label_column in table.columns:
        [labels] = rows_.typed([labels])
    faults = {entry.path: entry.fault for entry in files.entries()}
    splits = table.columns.get(cfg.split_column, [None] * len(table.numbers))
    rows = []
    columns = zip(table.columns[cfg.image_column], names.of(labels, _own_names(files)), splits, strict=True)
    for i, (path, number, part) in enumerate(columns):
        inside = files.inside(path) if isinstance(path, str) else None
        if inside is None:
            raise DataError(f"{table.row(i)}: path {path!r}; expected one of a file below {files.name()}")
        if faults.get(inside) == AWAY:
            raise files.leaves(inside)
        if inside not in faults:
            files.probe(inside)  # hidden, or not there: raises where it leads away
        rows.append(Row(files.name(inside), number, part if part in SPLITS else None, inside, 0))
    return Source([], rows, partial(_read_remote, files))


def _shards(path: Path, names: Names, split: str | None) -> Source:
    """Shards of raydeep; rows in their order, which is shuffled in train."""
    import pyarrow.parquet as pq

    manifest = shards.load_manifest(path)
    rows = []
    for part in SPLITS if split is None else (split,):
        for shard in manifest.splits[part]["shards"]:
            found = pq.read_table(path / shard["name"], columns=["label", "origin"])
            numbers = [names.number(manifest.classes[label]) for label in found.column("label").to_pylist()]
            places = ((group, at) for group, size in enumerate(shard["groups"]) for at in range(size))
            nbytes = shard["bytes"] // max(1, shard["rows"])
            rows += [
                Row(origin, number, part, (shard["name"], group, at), nbytes)
                for origin, number, (group, at) in zip(found.column("origin").to_pylist(), numbers, places, strict=True)
            ]
    files = Files(str(path))
    shape = (*manifest.stored, decode.CHANNELS[manifest.mode]) if manifest.store == "decoded" else None
    return Source([], rows, partial(_read_shards, files, shape), _block)


def _read_shards(files: Files, shape: tuple[int, int, int] | None, wanted: Iterable[Row]) -> Iterator[Picture]:
    for picture in tables.read_parquet(files, "image", wanted):
        if shape is not None and isinstance(picture, bytes):
            yield np.frombuffer(picture, np.uint8).reshape(shape)
        else:
            yield picture
