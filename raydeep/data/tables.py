"""Sources whose labels stand in a table: Parquet files with the pictures inside, and a folder beside a table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Container, Hashable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raydeep.data import rows as rows_
from raydeep.data.files import AWAY, Files, open_files, read_files
from raydeep.data.rows import SPLITS, Labels, Picture, Row, Source, printable, split_of
from raydeep.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydeep.config import Data

TABLES = (".csv", ".tsv", ".jsonl", ".parquet")


def own_names(files: Files, listed: Container[str]) -> list[str] | None:
    """What `classes.json` at the root, if there is one, calls integer labels."""
    name = "classes.json"
    return rows_.parse_names(files.name(name), files.read(name)) if name in listed else None


# Parquet with the pictures inside


def parquet(cfg: Data) -> Source:
    """Parquet files with a column of encoded pictures and a label column of integers or strings.

    `train*.parquet`, `val*.parquet` and `test*.parquet` name splits; with no `train*`, all files are split.
    A `classes.json` (list of names) beside them names integer labels.

    Raises:
        DataError: there is no such file or column, a file is torn, or a label is none.
    """
    files = open_files(cfg)
    entries = files.entries(deep=False)
    listed = [entry.path for entry in entries]
    names = [name for name in listed if name.endswith(".parquet")]
    if not names:
        raise DataError(f"data.path: {files.name()} holds no *.parquet files")
    if any(split_of(name) == "train" for name in names):
        splits = {name: split_of(name) for name in names if split_of(name)}
    else:
        splits = dict.fromkeys(names)
    away = [entry.path for entry in entries if entry.path in splits and entry.fault == AWAY]
    if away:
        raise files.leaves(away[0])
    indexed = [index_parquet(files, name, cfg) for name in splits]
    own = (
        rows_.parse_names(files.name("classes.json"), files.read("classes.json")) if "classes.json" in listed else None
    )
    classes, codes = rows_.code(files.name(), [part.labels for part in indexed], own)
    rows = []
    for name, part, coded in zip(splits, indexed, codes, strict=True):
        starts = np.cumsum([0, *part.sizes])
        groups = np.repeat(np.arange(len(part.sizes)), part.sizes)
        places = np.arange(len(coded)) - starts[groups]
        facts = zip(coded.tolist(), groups.tolist(), places.tolist(), strict=True)
        rows += [
            Row(f"{printable(name)}#{i}", label, splits[name], (name, group, at), part.nbytes[group])
            for i, (label, group, at) in enumerate(facts)
        ]
    return Source(classes, rows, partial(read_parquet, files, cfg.image_column), _group)


def _group(row: Row) -> Hashable:
    return row.key[:2]


class Index(NamedTuple):
    """What the footer of a Parquet file and its label column tell."""

    labels: Labels
    sizes: list[int]  # rows of each row group
    nbytes: list[int]  # of one picture, about, in each row group


def index_parquet(files: Files, name: str, cfg: Data, labelled: bool = True) -> Index:
    """The index of one file; unless it must be labelled, labels are absent where the column is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = files.name(name)
    try:
        with files.open(name) as opened, pq.ParquetFile(opened) as parts:
            schema = parts.schema_arrow
            for key, column in (("image_column", cfg.image_column), ("label_column", cfg.label_column)):
                if column not in schema.names and (labelled or key == "image_column"):
                    raise DataError(f"{where}: no column {column!r}, found {', '.join(schema.names)}; set data.{key}")
            kind = schema.field(cfg.image_column).type
            label = schema.field(cfg.label_column).type if cfg.label_column in schema.names else None
            if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)):
                raise DataError(
                    f"{where}: column {cfg.image_column!r} is {kind}; expected binary (the bytes of a picture file) "
                    f"or a struct with such a field `bytes`; set data.image_column"
                )
            sizes, nbytes = [], []
            for group in map(parts.metadata.row_group, range(parts.num_row_groups)):
                chunks = [group.column(i) for i in range(group.num_columns)]
                total = sum(c.total_uncompressed_size for c in chunks if _of(c.path_in_schema, cfg.image_column))
                sizes.append(group.num_rows)
                nbytes.append(total // max(group.num_rows, 1))
        if label is None:
            return Index(rows_.labels_of_list(str, [None] * sum(sizes)), sizes, nbytes)
        text = pa.types.is_string(label) or pa.types.is_large_string(label) or pa.types.is_binary(label)
        with files.open(name) as opened, pq.ParquetFile(opened, read_dictionary=[cfg.label_column] * text) as parts:
            labels = rows_.labels_of_arrow(
                lambda i: f"{where} row {i}", parts.read(columns=[cfg.label_column]).column(cfg.label_column)
            )
    except (OSError, ValueError, KeyError) as err:
        raise DataError(f"{where}: not readable as Parquet: {err}") from None
    return Index(labels, sizes, nbytes)


def _of(path: str, column: str) -> bool:
    return path == column or path.startswith(f"{column}.")


def read_parquet(files: Files, column: str, wanted: Iterable[Row]) -> Iterator[Picture]:
    """Pictures by file, row group and place in it (the rows' keys); a group is held until another one is asked for."""
    import pyarrow.parquet as pq

    opened: tuple[str, Any] | None = None
    held: Hashable = None
    pictures: Any = None
    try:
        for row in wanted:
            name, group, at = row.key
            if held != (name, group):
                pictures = None  # free the last group before the next is read
                try:
                    if opened is None or opened[0] != name:
                        if opened is not None:
                            opened[1].close(force=True)
                        opened = name, pq.ParquetFile(files.open(name))
                    pictures = opened[1].read_row_group(group, columns=[column]).column(column)
                except (OSError, ValueError) as err:
                    raise DataError(f"{files.name(name)} row group {group}: not readable as Parquet: {err}") from None
                held = name, group
            value = pictures[at].as_py()
            if isinstance(value, dict):  # the struct of Hugging Face image columns: {"bytes": …, "path": …}
                value = value.get("bytes")
            yield value if isinstance(value, bytes) else DataError("null: no picture")
    finally:
        if opened is not None:
            opened[1].close(force=True)


# a folder of pictures and a table


class Table(NamedTuple):
    """The columns of a label table, and what to call its rows."""

    where: str
    unit: str  # row or line
    numbers: Sequence[int]
    columns: dict[str, list[Any]]
    text: bool  # whether labels were read as text

    def row(self, i: int) -> str:
        return f"{self.where} {self.unit} {self.numbers[i]}"


def images(cfg: Data) -> Source:
    """A folder of pictures and a table (CSV, TSV, JSON Lines or Parquet) of paths, labels and perhaps splits.

    Paths are relative to data.path. A picture that is named but not there is a row whose read says so.

    Raises:
        DataError: no such table or column; a path that is none, leaves the folder or stands there twice; a label that
            is none; a split other than train, val and test.
    """
    files = open_files(cfg)
    entries = {entry.path: entry for entry in files.entries()}
    table = read_table(files, _table_name(files, cfg, list(entries)), cfg)
    given = table.columns[cfg.label_column]
    labels = rows_.labels_of_list(table.row, given)
    if table.text:
        [labels] = rows_.typed([labels])
    own = (
        rows_.parse_names(files.name("classes.json"), files.read("classes.json")) if "classes.json" in entries else None
    )
    classes, [codes] = rows_.code(table.where, [labels], own)
    splits = table.columns.get(cfg.split_column)
    rows: list[Row] = []
    seen: dict[str, int] = {}
    for i, (given_path, label) in enumerate(zip(table.columns[cfg.image_column], codes.tolist(), strict=True)):
        path = files.inside(given_path) if isinstance(given_path, str) else None
        if path is None:
            raise DataError(f"{table.row(i)}: path {given_path!r}; expected one of a file below {files.name()}")
        if (first := seen.setdefault(path, i)) != i:
            raise DataError(
                f"{table.row(i)}: path {path!r} stands in {table.unit} {table.numbers[first]} too; keep one"
            )
        entry = entries.get(path)
        if entry is not None and entry.fault == AWAY:
            raise files.leaves(path)
        size = entry.size if entry is not None else files.probe(path) or 0
        split = None if splits is None else _split(table, i, splits[i], cfg)
        rows.append(Row(printable(path), label, split, path, size))
    return Source(classes, rows, partial(read_files, files))


def _split(table: Table, i: int, value: Any, cfg: Data) -> str:
    word = value.strip() if isinstance(value, str) else value
    if word not in SPLITS:
        raise DataError(
            f"{table.row(i)}: {cfg.split_column} {value!r}; expected train, val or test (or name another column, or "
            f"none that is there, with data.split_column)"
        )
    return str(word)


def _table_name(files: Files, cfg: Data, listed: list[str]) -> str:
    """The table that the job names, or the only one."""
    if cfg.labels is not None:
        name = files.inside(cfg.labels)
        if name is None:
            raise DataError(f"data.labels: {cfg.labels} is not below {files.name()}; name a table there")
        if not name.lower().endswith(TABLES):
            raise DataError(f"data.labels: {cfg.labels}: expected a name that ends with {', '.join(TABLES)}")
        return name
    found = [name for name in listed if "/" not in name and name.lower().endswith(TABLES)]
    if len(found) != 1:
        what = f"holds {len(found)} tables ({', '.join(found)})" if found else "holds no table of labels"
        raise DataError(f"data.path: {files.name()} {what}; name one ({', '.join(TABLES)}) with data.labels")
    return found[0]


def read_table(files: Files, name: str, cfg: Data, labelled: bool = True) -> Table:
    """The columns of a table that the job names; that of pictures must be there, and if `labelled` that of labels.

    Raises:
        DataError: it can't be read, lacks a column, or holds no rows.
    """
    where = files.name(name)
    try:
        data = files.read(name)
    except OSError as err:
        raise DataError(f"data.labels: {where}: {err.strerror or err}; name an existing table") from None
    wanted = [cfg.image_column, cfg.label_column, cfg.split_column]
    needed = wanted[: 1 + labelled]
    if name.lower().endswith(".parquet"):
        table = _from_parquet(where, data, wanted, needed)
    else:
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as err:
            raise DataError(f"{where}: not UTF-8 text (byte {err.start}); save it as UTF-8") from None
        if name.lower().endswith(".jsonl"):
            table = _from_jsonl(where, text, wanted, needed)
        else:
            table = _from_csv(where, text, wanted, needed, "\t" if name.lower().endswith(".tsv") else ",")
    if not table.numbers:
        raise DataError(f"{where}: holds no rows; give pictures")
    return table


def _need(where: str, found: list[str], needed: list[str]) -> None:
    """Refuse a table without the columns of pictures and labels."""
    for key, column in zip(("image_column", "label_column"), needed, strict=False):
        if column not in found:
            raise DataError(
                f"{where}: no column {column!r}, found {', '.join(map(str, found)) or 'nothing'}; set data.{key}"
            )


def _from_parquet(where: str, data: bytes, wanted: list[str], needed: list[str]) -> Table:
    import pyarrow.parquet as pq

    try:
        parts = pq.ParquetFile(io.BytesIO(data))
        names = parts.schema_arrow.names
        _need(where, names, needed)
        table = parts.read(columns=[name for name in wanted if name in names])
        columns = {name: table.column(name).to_pylist() for name in table.column_names}
    except (OSError, ValueError) as err:
        raise DataError(f"{where}: not readable as Parquet: {err}") from None
    return Table(where, "row", range(len(table)), columns, False)


def _from_jsonl(where: str, text: str, wanted: list[str], needed: list[str]) -> Table:
    numbers: list[int] = []
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise DataError(f"{where} line {number}: not valid JSON: {err}") from None
        if not isinstance(value, dict):
            raise DataError(f"{where} line {number}: {line.strip()[:40]!r}; expected an object a line")
        _need(f"{where} line {number}", list(value), needed)
        numbers.append(number)
        objects.append(value)
    split = wanted[2]
    names = wanted if any(split in value for value in objects) else wanted[:2]
    return Table(where, "line", numbers, {name: [value.get(name) for value in objects] for name in names}, False)


def _from_csv(where: str, text: str, wanted: list[str], needed: list[str], comma: str) -> Table:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True)
    try:
        header = [name.strip() for name in next(lines, [])]
        _need(where, header, needed)
        twice = [name for name in wanted if header.count(name) > 1]
        if twice:
            raise DataError(f"{where}: the column {twice[0]!r} stands there twice; rename one")
        places = {name: header.index(name) for name in wanted if name in header}
        columns: dict[str, list[Any]] = {name: [] for name in places}
        numbers = []
        start = lines.line_num + 1
        for cells in lines:
            if cells:
                if len(cells) != len(header):
                    raise DataError(
                        f"{where} line {start}: {len(cells)} cells, expected {len(header)}; put cells that hold a "
                        f"{'comma' if comma == ',' else 'tab'} in quotes"
                    )
                numbers.append(start)
                for name, at in places.items():
                    columns[name].append(cells[at])
            start = lines.line_num + 1
    except csv.Error as err:
        raise DataError(f"{where} line {lines.line_num}: not valid CSV: {err}") from None
    return Table(where, "line", numbers, columns, True)
