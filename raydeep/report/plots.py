"""What the plots draw, as plain JSON values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from raydeep.report import words
from raydeep.report.folder import Run, number
from raydeep.search.pareto import non_dominated

FRAME_POINTS = 0.10  # the plot opens on this much accuracy below its best point, if that leaves enough to see
POINT_COLUMNS = ("bytes", "val_accuracy", "test_accuracy", "compression_ratio", "sparsity", "seconds")
CURVE_COLUMNS = ("epoch", "train_loss", "val_loss", "val_accuracy")


def plot_data(run: Run) -> dict[str, Any]:
    """Everything the plots draw.

    Returns:
        `points` in columns (one entry a point: the finished trials, then exported models that no trial
        made), `front` (indices of points no other beats in bytes and validation accuracy, by bytes), `dense`
        (or None), `pick` (index of the answer's model, or None), `frame` (lowest accuracy first shown, or
        None), `curves` (one entry a stage), `confusion` (or None) and `layers` (an entry an exported model: its
        layers in columns).
    """
    rows = [row for row in run.done if _drawable(row)]
    trials = {row["trial"] for row in rows}
    labels = {number(row.get("trial")): row.get("label") for row in run.models}
    rows += [row for row in run.models if _drawable(row) and number(row.get("trial")) not in trials]
    configs = [row["config"] if isinstance(row.get("config"), dict) else {} for row in rows]
    points: dict[str, Any] = {name: [_short(row.get(name)) for row in rows] for name in POINT_COLUMNS}
    points["trial"] = [_short(row.get("trial")) for row in rows]
    points["label"] = [_text(row.get("label") or labels.get(number(row.get("trial")))) for row in rows]
    points["config"] = {
        key: [words.setting(config[key]) if key in config else "" for config in configs]
        for key in dict.fromkeys(key for config in configs for key in config)
    }
    chosen, dense = words.pick(run), run.dense
    label = _text(chosen.get("label")) if chosen else None
    return {
        "points": points,
        "front": non_dominated([(row["bytes"], -row["val_accuracy"]) for row in rows]),
        "dense": {name: _short(dense.get(name)) for name in POINT_COLUMNS} if dense and _drawable(dense) else None,
        "pick": points["label"].index(label) if label is not None and label in points["label"] else None,
        "frame": frame([row["val_accuracy"] for row in rows]),
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
    }


def frame(accuracies: Iterable[float]) -> float | None:
    """The lowest accuracy to open the plot on, so that collapsed trials don't flatten the rest.

    Returns:
        A fraction, or None to open on everything: nothing would lie outside, or too little inside.
    """
    values = np.asarray(list(accuracies))
    if not values.size:
        return None
    low = float(values.max() - FRAME_POINTS)
    inside = int((values >= low).sum())
    return round(low, 4) if inside < values.size and inside >= max(4, values.size / 3) else None


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
