"""What the plots draw, as plain JSON values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from raydeep.data import meter
from raydeep.report import parallel, words
from raydeep.report.folder import Run, number, numbers
from raydeep.search.objectives import FIELDS

FRAME_POINTS = 0.10  # the plot opens on this much accuracy below its best point, if that leaves enough to see
MEASURES = {  # column → its words as an axis of the plot
    "val_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
    "worst_class_accuracy": "accuracy of the worst class",
    "bytes": "packed size",
    "macs": "MACs",
    "latency_ms": "latency",
}
SHARES = ("val_accuracy", "test_accuracy", "worst_class_accuracy")  # fractions of 1; the others are positive
POINT_COLUMNS = (*MEASURES, "compression_ratio", "sparsity", "epochs", "rung", "rungs")
METERED = ("wait", "transfer", "augment", "step")  # stages of which the meter of an epoch tells
CURVE_COLUMNS = ("epoch", "train_loss", "val_loss", "val_accuracy")


def plot_data(run: Run) -> dict[str, Any]:
    """Everything the plots draw.

    Returns:
        `points` in columns (one entry a point: the trials with a result, then exported models that no trial made),
        `front` (indices of the points on the front of the search's own objectives, by the first of them), `dense`
        (or None), `measures` (what the axes offer: `name`, `words`, whether a `share`, and the lowest value `first`
        shown, or None), `axes` (x and y that the plot opens on), `objectives` (columns), `pick` (index of the answer's
        model, or None), `volume` (the hypervolume over time, or None), `curves` (one entry a stage), `confusion` (or
        None), `layers` (an entry an exported model: its layers in columns), `parallel` (axes, see parallel.axes) and
        `input` (where the time of each epoch went, or None).
    """
    rows = _rows(run)
    configs = [row["config"] if isinstance(row.get("config"), dict) else {} for row in rows]
    points: dict[str, Any] = {name: [_short(row.get(name)) for row in rows] for name in POINT_COLUMNS}
    points["trial"] = [_short(row.get("trial")) for row in rows]
    points |= {name: [_text(row.get(name)) for row in rows] for name in ("label", "start")}
    points["going"] = [row.get("event") == "rung" for row in rows]
    points["config"] = {
        key: [words.brief(config[key]) if key in config else "" for config in configs]
        for key in dict.fromkeys(key for config in configs for key in config)
    }
    judged = [i for i, row in enumerate(rows) if run.objectives.problem(row) is None]
    chosen, dense = words.pick(run), {**(run.dense or {}), **_reference(run)}
    label = _text(chosen.get("label")) if chosen else None
    measures, objectives = _measures(run, rows, dense), [FIELDS[name] for name in run.objectives.modes]
    return {
        "points": points,
        "front": [judged[i] for i in run.objectives.front([rows[i] for i in judged])],
        "dense": {name: _short(dense.get(name)) for name in POINT_COLUMNS} if _drawable(dense) else None,
        "measures": measures,
        "axes": axes(objectives, [measure["name"] for measure in measures]),
        "objectives": objectives,
        "pick": points["label"].index(label) if label is not None and label in points["label"] else None,
        "volume": _volume(run),
        "curves": [
            {"stage": stage}
            | {
                name: [_short(row.get(name)) for row in run.metrics if str(row.get("stage")) == stage]
                for name in CURVE_COLUMNS
            }
            for stage in dict.fromkeys(str(row.get("stage")) for row in run.metrics)
        ],
        "confusion": _confusion(run),
        "layers": [found for row in run.models if (found := _layers(row))],
        "parallel": parallel.axes(
            run, rows, [m for m in measures if m["name"] in {"val_accuracy", "bytes", *objectives}]
        ),
        "input": _input(run),
    }


def axes(objectives: Sequence[str], present: Sequence[str]) -> dict[str, str]:
    """The measures that the plot opens on: the first two objectives, an accuracy upwards.

    Args:
        objectives: columns, in the order of the job.
        present: columns that there are points of; validation accuracy and bytes stand in for what is missing.
    """
    names = [name for name in (*objectives, "val_accuracy", "bytes") if name in present]
    first, second = list(dict.fromkeys([*names, *present, "val_accuracy", "bytes"]))[:2]
    return {"x": first, "y": second} if second in SHARES and first not in SHARES else {"x": second, "y": first}


def _rows(run: Run) -> list[dict[str, Any]]:
    """The trials with a result and the models that no trial made; what only the export measured, filled in."""
    rows = [row for row in run.done if _drawable(row)]
    trials = {row["trial"] for row in rows}
    exported = {number(row.get("trial")): row for row in run.models}
    filled = ["label", "test_accuracy"]
    if not numbers(rows, "latency_ms"):  # the trials' own is of another hour
        filled.append("latency_ms")
    through = Counter(row["trial"] for row in run.rungs)
    rows = [row | {"rungs": through.get(row["trial"])} for row in rows]
    rows = [row | {k: exported.get(row["trial"], {}).get(k, row.get(k)) for k in filled} for row in rows]
    return rows + [row for row in run.models if _drawable(row) and number(row.get("trial")) not in trials]


def _reference(run: Run) -> dict[str, Any]:
    """The dense model's measures as the search took them: those it compared with."""
    found = run.provenance.get("reference")
    found = found if isinstance(found, dict) else {}
    return {key: found[key] for key in MEASURES if number(found.get(key)) is not None}


def _measures(run: Run, rows: list[dict[str, Any]], dense: dict[str, Any]) -> list[dict[str, Any]]:
    """What the axes offer: all that there is, unless it is the same everywhere."""
    wanted = {FIELDS[name] for name in run.objectives.names} | {"val_accuracy", "bytes"}
    further, early = ([row for row in rows if ((number(row.get("rungs")) or 0) > 1) is so] for so in (True, False))
    if not further:
        further, early = rows, []
    found = []
    for name, said in MEASURES.items():
        values = numbers(rows, name)
        if values and (name in wanted or len({*values, *numbers([dense], name)}) > 1):
            share = name in SHARES
            first = frame(numbers(further, name), numbers(early, name)) if share else None
            found.append({"name": name, "words": said, "share": share, "first": first})
    return found


def _volume(run: Run) -> dict[str, Any] | None:
    """The hypervolume after each rung, by time and by how many trials had a result; None: not more than one."""
    columns: dict[str, list[Any]] = {name: [] for name in ("at", "trials", "value", "trial", "rung")}
    seen = set()
    for row in run.rungs:
        seen.add(row["trial"])
        if number(row.get("at")) is not None and number(row.get("hypervolume")) is not None:
            entry = (row["at"], len(seen), row["hypervolume"], row["trial"], row.get("rung"))
            for column, value in zip(columns.values(), entry, strict=True):
                column.append(_short(value))
    return columns if len(columns["at"]) > 1 else None


def _input(run: Run) -> dict[str, Any] | None:
    """Shares of each epoch: `waiting` for pictures, `augment`, `step` (forward, backward, update) and the `rest`."""
    columns: dict[str, list[Any]] = {name: [] for name in ("epoch", "waiting", "augment", "step", "rest")}
    for row in run.metrics:
        seconds, spent = number(row.get("seconds")), row.get("meter")
        if (
            not seconds
            or not isinstance(spent, dict)
            or not all(number(spent.get(f"{s}_s")) is not None for s in METERED)
        ):
            continue
        worked = seconds - (number(row.get("start_s")) or 0.0)
        waiting = meter.waiting({"device": "cpu", "start_s": 0.0, **row})
        augment, step = (min(1.0, spent[f"{stage}_s"] / max(worked, 1e-9)) for stage in ("augment", "step"))
        rest = max(0.0, 1 - waiting - augment - step)
        for column, value in zip(columns.values(), (row["epoch"], waiting, augment, step, rest), strict=True):
            column.append(round(value, 4))
    if not columns["epoch"]:
        return None
    total = {name: float(np.mean(columns[name])) for name in ("waiting", "augment", "step")}
    return columns | {"mean": total, "bound": meter.BOUND}


def frame(accuracies: Iterable[float], lesser: Iterable[float] = ()) -> float | None:
    """The lowest accuracy to open the plot on, so that collapsed trials don't flatten the rest.

    Args:
        accuracies: of the points that the frame should hold enough of.
        lesser: of others, which may lie outside: trials that were given up early.

    Returns:
        A fraction, or None to open on everything: nothing would lie outside, or too little inside.
    """
    values, others = np.asarray(list(accuracies)), np.asarray(list(lesser))
    if not values.size:
        return None
    everything = np.concatenate([values, others])
    low = float(everything.max() - FRAME_POINTS)
    enough = int((values >= low).sum()) >= max(4, values.size / 3)
    return round(low, 4) if enough and (everything < low).any() else None


def _confusion(run: Run) -> dict[str, Any] | None:
    counts = (run.evaluation or {}).get("confusion")
    if not isinstance(counts, list) or not counts or not all(isinstance(row, list) for row in counts):
        return None
    if any(len(row) != len(counts) or any(number(n) is None for n in row) for row in counts):
        return None
    dataset = run.provenance.get("dataset")
    names = dataset.get("classes") if isinstance(dataset, dict) else None
    if not isinstance(names, list) or len(names) != len(counts):
        names = list(range(len(counts)))
    return {"classes": [str(name) for name in names], "counts": [[int(n) for n in row] for row in counts]}


def _layers(model: dict[str, Any]) -> dict[str, Any] | None:
    """The layers of a model in columns; `loss` is what each width of each layer was measured to cost, if it was."""
    rows = [row for row in model.get("layers") or [] if isinstance(row, dict) and number(row.get("parameters"))]
    if not rows:
        return None
    measured = found if isinstance(found := model.get("sensitivity"), dict) else {}
    return {
        "label": _text(model.get("label")),
        "layer": [str(row.get("layer")) for row in rows],
        "shape": ["×".join(str(n) for n in row.get("shape") or []) for row in rows],
        "bits": [_short(row.get("weight_bits")) for row in rows],
        "activations": [_short(row.get("activation_bits")) for row in rows],
        "zeros": [_short(1 - (number(row.get("nonzeros")) or 0) / row["parameters"]) for row in rows],
        **{name: [_short(row.get(name)) for row in rows] for name in ("parameters", "macs", "bytes")},
        "loss": [
            {width: _short(loss) for width, loss in widths.items()}
            if isinstance(widths := measured.get(str(row.get("layer"))), dict) else {}
            for row in rows
        ],
    }  # fmt: skip


def _drawable(row: dict[str, Any]) -> bool:
    return (number(row.get("bytes")) or 0) > 0 and number(row.get("val_accuracy")) is not None


def _short(value: Any) -> float | int | None:
    """A number with no more digits than a plot shows; None where there is none."""
    found = number(value)
    if found is None:
        return None
    return int(found) if found.is_integer() else float(f"{found:.5g}")


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
