"""Tables and labels, given to shard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hostile.harness import Case, Stock
from hostile.parts import Make, all_of, cut, encoded, file, link

SHARDED = ("out", "out/*")
NAMES = [f"{i:02d}.png" for i in range(40)]


def pictures(folder: Path, stock: Stock) -> None:
    """t/00.png … t/39.png."""
    (folder / "t").mkdir(exist_ok=True)
    for i, name in enumerate(NAMES):
        (folder / "t" / name).write_bytes(encoded(seed=i))


def csv(rows: Sequence[Sequence[Any]], head: str = "image,label") -> str:
    return "\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n"


GOOD = [(name, ("cat", "dog")[i % 2]) for i, name in enumerate(NAMES)]


def images(
    group: str, name: str, table: str | bytes, says: str, code: int = 2, kind: str = "csv",
    leaves: tuple[str, ...] | None = None, *also: Make,
) -> Case:  # fmt: skip
    """40 pictures and a table."""
    left = (SHARDED if code == 0 else ()) if leaves is None else leaves
    make = all_of(pictures, *also, file(f"t/labels.{kind}", table))
    return Case(group, name, "raydeep shard t out --set data.source=images", says, make, code, left)


def table(name: str, columns: dict[str, Any] | pa.Table, says: str, *also: Make, code: int = 2) -> Case:
    """A Parquet file with the pictures in it."""

    def make(folder: Path, stock: Stock) -> None:
        (folder / "t").mkdir()
        whole = columns if isinstance(columns, pa.Table) else pa.table(columns)
        pq.write_table(whole, folder / "t" / "train.parquet")

    left = SHARDED if code == 0 else ("out.quarantine.jsonl",)
    command = "raydeep shard t out --set data.source=parquet"
    return Case("tables", name, command, says, all_of(make, *also), code, left)


def labels(name: str, values: Sequence[Any], says: str, code: int = 2) -> Case:
    """The labels of the 40 pictures, as JSON Lines."""
    rows = [{"image": image, "label": value} for image, value in zip(NAMES, [*values] * 40, strict=False)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return images("labels", name, text, says, code, "jsonl")


BLOBS = [encoded(seed=i) for i in range(40)]
INTS = [i % 2 for i in range(40)]
REPEATED = pa.table({  # 2 GB of text in a file of some kilobytes: one value of 1 MB, 2,000 times
    "image": pa.array(BLOBS * 50), "label": pa.DictionaryArray.from_arrays([0] * 2000, ["x" * 1_000_000]),
})  # fmt: skip
STRUCTS = pa.array([{"bytes": blob, "path": None} for blob in BLOBS])
TWICE = pa.Table.from_arrays([pa.array(BLOBS), pa.array(INTS), pa.array(INTS)], names=["image", "label", "label"])
DEEP = '{"image": "00.png", "label": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
ALIKE = ["cat", "сat"]  # the second begins with a Cyrillic letter

CASES = [
    images("tables", "CSV with NULs", b"image,label\n00.png,ca\0t\n01.png,dog\n" * 20, "labels.csv"),
    images("tables", "a binary file called .csv", bytes(range(256)) * 40, "labels.csv"),
    images("tables", "CSV without its header", csv(GOOD[1:], "00.png,cat"), "labels.csv.*image"),
    images("tables", "CSV with the label column twice", csv([(a, b, b) for a, b in GOOD], "image,label,label"),
           "label"),
    images("tables", "CSV of 40 names that climb out", csv([(f"../../etc/passwd{i}", i % 2) for i in range(40)]),
           "labels.csv line 2: path"),
    images("tables", "CSV with an absolute path", csv([*GOOD, ("/etc/passwd", "cat")]), "labels.csv.*/etc/passwd"),
    images("tables", "CSV with a URL", csv([*GOOD, ("http://169.254.169.254/latest", "cat")]), "labels.csv.*169.254"),
    images("tables", "CSV with a name that clears the terminal", csv([*GOOD, ("../\x1b[2J.png", "cat")]), "labels.csv"),
    images("tables", "CSV that names a link out", csv([*GOOD, ("away.png", "cat")]), "a link that leaves t; copy it",
           2, "csv", None, link("t/away.png", "/etc/passwd")),
    images("tables", "CSV that names a picture 40 times", csv([("00.png", "cat"), ("00.png", "dog")] * 20),
           "stands in line 2 too"),
    images("tables", "JSON Lines nested 100,000 deep", DEEP, "labels.jsonl", 2, "jsonl"),
    images("tables", "JSON Lines cut in a line", json.dumps({"image": "00.png", "label": "cat"})[:-5], "labels.jsonl",
           2, "jsonl"),
    images("tables", "an empty table", "", "labels.csv"),
    images("tables", "a header alone", "image,label\n", "labels.csv|no pictures|no row"),
    images("tables", "names of 100,000 characters", csv([("a" * 100_000, "cat"), *GOOD]),
           "1 of 41 pictures can't",
           2, "csv", ("out.quarantine.jsonl",)),
    table("Parquet whose footer is cut off", {"image": BLOBS, "label": INTS},
          "train.parquet", cut("t/train.parquet", 0.9)),
    table("text called .parquet", {"image": BLOBS, "label": INTS}, "train.parquet", file("t/train.parquet", "no" * 50)),
    table("Parquet without rows", {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
          "2 or more classes"),
    table("Parquet with pictures as numbers", {"image": INTS, "label": INTS}, "train.parquet.*image"),
    table("Parquet with pictures as lists", {"image": [[1, 2]] * 40, "label": INTS}, "train.parquet.*image"),
    table("Parquet with pictures as structs", {"image": STRUCTS, "label": INTS}, "2 classes", code=0),
    table("Parquet with the label column twice", TWICE, "train.parquet.*label"),
    table("Parquet without labels", {"image": BLOBS, "klass": INTS}, "train.parquet.*label"),
    table("Parquet whose pictures are text", {"image": ["no picture"] * 40, "label": INTS}, "40 of 40|train.parquet"),
    table("Parquet of 2 GB of label in 200 KB", REPEATED, "a label of 1,000,000 characters"),
    labels("NaN", [float("nan"), 0], "labels.jsonl line"),
    labels("negative", [-1, 0], "labels.jsonl.*-1"),
    labels("1e300", [1e300, 0], "labels.jsonl line"),
    labels("half a class", [0.5, 0], "labels.jsonl.*0.5"),
    labels("true and false", [True, False], "labels.jsonl line"),
    labels("a list", [[0, 1], [0]], "labels.jsonl line"),
    labels("an object", [{"a": 1}], "labels.jsonl line"),
    labels("an empty text", ["", "cat"], "labels.jsonl line"),
    labels("null", [None, "cat", "dog"], "labels.jsonl line"),
    labels("class 100,001 of 2", [0, 100_001], "labels.jsonl.*100.?001|class"),
    labels("one class only", ["cat"], "class"),
    labels("text and numbers", ["cat", 1], "labels.jsonl line"),
    labels("letters that look alike", ALIKE, "2 classes", 0),
    labels("half a character", ["\ud800", "cat"], "labels.jsonl"),
    labels("a name of 100,000 characters", ["x" * 100_000, "cat"], "a label of 100,000 characters, at most 1,000"),
    labels("names that clear the terminal", ["\x1b[2J", "cat\r\n"], "2 classes", 0),
    images("labels", "classes by name for numbers that are not there", csv([(n, i % 2) for i, n in enumerate(NAMES)]),
           "expected one of 1 classes", 2, "csv", None, file("t/classes.json", '["only"]')),
    images("labels", "a class in test only", csv([(n, k, "test" if k == "dog" else "train") for n, k in GOOD],
           "image,label,split"), "class|split"),
    images("labels", "a split that is none", csv([(n, k, "trainn") for n, k in GOOD], "image,label,split"), "trainn"),
]  # fmt: skip
