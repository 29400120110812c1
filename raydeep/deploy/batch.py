"""Batch prediction on Ray Data: actors with onnxruntime label units of rows, the driver writes one Parquet file.

What travels to an actor is an index of rows, what comes back are probabilities: pictures are read, decoded and dropped
where the network is, a batch at a time. What grows with their number is the index that the driver holds: path, label
and place of each, about 300 bytes, under 100 of them when they travel.

N: rows of a unit; K: classes.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from raydeep import __version__, mirror
from raydeep.data.rows import Row, Source
from raydeep.data.unlabelled import UNKNOWN
from raydeep.deploy.predict import BATCH, Batch, Model, Reader, label
from raydeep.deploy.runtimes import runner
from raydeep.disk import atomic, sha256_file
from raydeep.errors import RaydeepError

UNIT_S, MOST_ROWS = 0.5, 8192  # what an actor does at once
DECODE_S, DECODE_S_A_BYTE = 5e-5, 1.5e-8  # of a picture, about
GROUP_BYTES, GROUP_ROWS = 32 * 2**20, 65_536  # most of a row group of the file, about
AHEAD = 2  # units that an actor has before it: one in work, one waiting


class Summary(NamedTuple):
    """What became of a source."""

    path: Path
    rows: int
    bad: int  # pictures that can't be read: rows with an error
    labelled: int  # rows with a true label that the model knows
    right: int  # of these
    strange: int  # rows with a label that the model does not know
    start_s: float  # until the first unit was done
    seconds: float  # in all

    @property
    def accuracy(self) -> float | None:
        """Share of the labelled rows that are right; None: there are none."""
        return self.right / self.labelled if self.labelled else None


def predict_source(
    model: Model,
    source: Source,
    out: Path,
    *,
    top: int = 5,
    batch_size: int = BATCH,
    max_pixels: int,
    workers: int | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> Summary:
    """Label a source on the Ray that this process is connected to; `out` takes its name when it is whole.

    A row for each picture, in the order of the source: `path`, `label` and `probability` of the likeliest class, `top`
    and `top_probability` of the likeliest few, `probabilities` of all (float32, in the order of the classes,
    which the metadata holds), `true_label` if the source has any labels, and `error`, why a picture can't be read: then
    what a network says is null. The file does not depend on the number of workers.

    Args:
        model: an opened model; its ONNX file travels to the actors.
        source: what all nodes can read.
        out: the file to write, or the path that stands for its address.
        top: likeliest classes that a row lists.
        batch_size: pictures that the network takes at once.
        max_pixels: of one picture.
        workers: actors, of one CPU each; None: as many as Ray has CPUs.
        tell: called with rows done and rows in all.

    Raises:
        DataError: the source can't be read any more.
        ModelError: the ONNX file is broken, is not what the spec says, or gives no finite numbers.
    """
    began = time.monotonic()
    data, top = model.onnx(), min(top, len(model.classes))
    units = plan(model, source, batch_size, workers or _cpus())
    schema = _schema(model, source, top, batch_size)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    arguments = (ray.put(data), model, dataclasses.replace(source, rows=[]), schema, top, batch_size, max_pixels)
    items: Any = ray.data.from_items([{"unit": pickle.dumps(unit)} for unit in units], override_num_blocks=len(units))
    done = items.map_batches(
        _Labeller, fn_constructor_args=arguments, batch_size=None, batch_format="numpy", num_cpus=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(workers or _cpus(), len(units)), max_tasks_in_flight_per_actor=AHEAD
        ),
    )  # fmt: skip
    counts = dict.fromkeys(("rows", "bad", "labelled", "right", "strange"), 0)
    start_s = 0.0
    with atomic(out) as aside, pq.ParquetWriter(aside, schema, compression="zstd") as file:
        writer = _Groups(file, schema, len(model.classes))
        for unit in done.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            if "failed" in unit.column_names:
                raise pickle.loads(unit.column("failed")[0].as_py())
            start_s = start_s or time.monotonic() - began
            writer.add(unit.cast(schema))
            _count(counts, unit, model)
            if tell is not None:
                tell(counts["rows"], len(source.rows))
        writer.flush()
    mirror.push(out)
    return Summary(path=out, start_s=start_s, seconds=time.monotonic() - began, **counts)


def _cpus() -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def plan(model: Model, source: Source, batch_size: int, workers: int) -> list[list[Row]]:
    """Units of whole batches: half a second of work each, four or more a worker where there are enough rows."""
    run, batch = model.run(), np.zeros((batch_size, *model.shape), np.uint8)
    run(batch)
    start = time.perf_counter()
    run(batch)
    a_row = (time.perf_counter() - start) / batch_size + DECODE_S
    a_row += DECODE_S_A_BYTE * float(np.mean([row.nbytes for row in source.rows[:1000]]))
    rows = min(UNIT_S / a_row, MOST_ROWS, len(source.rows) / (4 * workers))
    size = max(1, round(rows / batch_size)) * batch_size
    return [source.rows[at : at + size] for at in range(0, len(source.rows), size)]


class _Labeller:
    """The actor: a network on one thread, and a reader that keeps its files open."""

    def __init__(
        self, onnx: Any, model: Model, source: Source, schema: pa.Schema, top: int, batch_size: int, max_pixels: int
    ) -> None:
        self.run = runner(ray.get(onnx))
        self.model, self.schema, self.top = model, schema, top
        self.names = np.array(source.classes, object)
        self.reader, self.batch_size, self.max_pixels = Reader(source), batch_size, max_pixels

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        try:
            rows: list[Row] = pickle.loads(batch["unit"][0])
            parts = list(label(self.run, self.model, rows, self.reader(rows), self.batch_size, self.max_pixels))
            errors = [error for part in parts for error in part.errors]
            whole = Batch(rows, np.concatenate([part.probabilities for part in parts]), errors)
            return table(whole, self.model.classes, self.names, self.schema, self.top)
        except (RaydeepError, OSError) as err:  # as a value: Ray Data would bury it in kinds of its own
            return pa.table({"failed": [pickle.dumps(err)]})


def table(batch: Batch, classes: list[str], names: np.ndarray, schema: pa.Schema, top: int) -> pa.Table:
    """What was predicted as rows of the file.

    Args:
        batch: N rows.
        classes: of the model.
        names: what the labels of the rows number.
        schema: of the file.
        top: likeliest classes that a row lists.
    """
    bad = np.array([error is not None for error in batch.errors])
    probabilities = batch.probabilities
    order = np.argsort(-np.nan_to_num(probabilities), 1, kind="stable")[:, :top]  # of equal ones the first
    best = np.take_along_axis(probabilities, order, 1)
    known = np.array(classes, object)
    labels = np.array([row.label for row in batch.rows])
    columns = {
        "path": pa.array([row.origin for row in batch.rows]),
        "label": pa.array(known[order[:, 0]], pa.string(), mask=bad),
        "probability": pa.array(best[:, 0], mask=bad),
        "top": _lists(pa.array(known[order].ravel(), pa.string()), top, bad),
        "top_probability": _lists(pa.array(best.ravel()), top, bad),
        "probabilities": _lists(pa.array(probabilities.ravel()), len(classes), bad),
        "error": pa.array(batch.errors, pa.string()),
    }  # fmt: skip
    if "true_label" in schema.names:
        columns["true_label"] = pa.array(names[np.maximum(labels, 0)], pa.string(), mask=labels == UNKNOWN)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _lists(values: pa.Array, size: int, null: np.ndarray) -> pa.Array:
    """Lists of one size, null where there is none."""
    return pa.ListArray.from_arrays(np.arange(len(null) + 1, dtype=np.int32) * size, values, mask=pa.array(null))


def _schema(model: Model, source: Source, top: int, batch_size: int) -> pa.Schema:
    import onnxruntime

    facts = {
        "raydeep": __version__, "onnxruntime": onnxruntime.__version__, "model": mirror.name(model.path),
        "model_onnx_sha256": sha256_file(model.path / "model.onnx"),
        "model_rdz_sha256": sha256_file(model.path / "model.rdz"), "classes": model.classes, "top": top,
        "batch_size": batch_size,
    }  # fmt: skip
    fields: list[tuple[str, pa.DataType]] = [
        ("path", pa.string()), ("label", pa.string()), ("probability", pa.float32()), ("top", pa.list_(pa.string())),
        ("top_probability", pa.list_(pa.float32())), ("probabilities", pa.list_(pa.float32())), ("error", pa.string()),
    ]  # fmt: skip
    if any(row.label != UNKNOWN for row in source.rows):
        fields.insert(3, ("true_label", pa.string()))
    return pa.schema(fields, metadata={"raydeep": json.dumps(facts)})


class _Groups:
    """Writes tables as row groups of one size, whatever their own."""

    def __init__(self, file: pq.ParquetWriter, schema: pa.Schema, classes: int) -> None:
        self.file, self.schema, self.rows = file, schema, 0
        self.size = max(1024, min(GROUP_ROWS, GROUP_BYTES // (4 * classes + 100)))
        self.held: list[pa.Table] = []

    def add(self, part: pa.Table) -> None:
        self.held.append(part)
        self.rows += len(part)
        while self.rows >= self.size:
            whole = pa.concat_tables(self.held)
            self._write(whole.slice(0, self.size))
            self.held, self.rows = [whole.slice(self.size)], len(whole) - self.size

    def flush(self) -> None:
        if self.rows:
            self._write(pa.concat_tables(self.held))

    def _write(self, group: pa.Table) -> None:
        self.file.write_table(group.combine_chunks(), row_group_size=self.size)


def _count(counts: dict[str, int], unit: pa.Table, model: Model) -> None:
    counts["rows"] += len(unit)
    counts["bad"] += len(unit) - unit.column("error").null_count
    if "true_label" in unit.column_names:
        known = set(model.classes)
        pairs = zip(unit.column("true_label").to_pylist(), unit.column("label").to_pylist(), strict=True)
        for true, found in pairs:
            if true is not None and found is not None:
                counts["labelled" if true in known else "strange"] += 1
                counts["right"] += true == found
