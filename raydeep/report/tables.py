"""The tables of the page: rows of plain values, every key present."""

from __future__ import annotations

from typing import Any

import numpy as np

from raydeep.report import words
from raydeep.report.folder import Run, number, numbers
from raydeep.tuning import TRAINING

MOST_FAILURES = 50  # shown in full; the rest are counted
MOST_TRIALS = 200  # in the table of what trials took
MOST_ERROR_CHARS = 4000
MODEL_COLUMNS = (
    *("test_accuracy", "val_accuracy", "bytes", "compression_ratio", "sparsity"),
    *("latency_ratio", "latency_spread", "latency_ms", "weight_bits", "activation_bits"),
)


def models(run: Run, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the front's table, dense first, then by falling size.

    Args:
        run: The run.
        data: What the plots draw; `point` in a row is the index of its point, -1 for dense, None for none.
    """
    labels, rows, keys = data["points"]["label"], [], swept(run)
    configs = {row["trial"]: row.get("config") for row in run.trials}
    for row in ([run.dense] if run.dense else []) + run.models:
        label, is_dense = str(row.get("label", "")), row is run.dense
        point = -1 if is_dense and data["dense"] else labels.index(label) if label in labels else None
        config = run.job if is_dense else configs.get(number(row.get("trial")))
        rows.append(
            {name: number(row.get(name)) for name in MODEL_COLUMNS}
            | {
                "label": label,
                "is_dense": is_dense,
                "distill": bool(row.get("distill")),
                "broken": row.get("verified") is False,
                "point": point if labels else None,
                "pick": point is not None and point == data["pick"],
                "config": [_setting(config, key, nested=is_dense) for key in keys],
            }
        )
    return rows


def swept(run: Run) -> list[str]:
    """Keys of train, augment and model that trials differ in: columns of the front's table."""
    return [key for key in _space(run) if key.split(".")[0] in TRAINING]


def compressed(run: Run) -> bool:
    """Whether the front's table tells of bits and zeros: everywhere but in a sweep of nothing but training."""
    keys = swept(run)
    return not keys or keys != _space(run) or any(number(row.get("sparsity")) for row in run.models)


def _space(run: Run) -> list[str]:
    space = run.facts.get("space")
    keys = list(space) if isinstance(space, dict) else []
    tried = (row["config"] for row in run.trials if isinstance(row.get("config"), dict))
    return list(dict.fromkeys([*keys, *(key for config in tried for key in config)]))


def _setting(config: Any, key: str, nested: bool) -> str:
    """What a configuration, or a job with its sections, says of a dotted key."""
    value = config if isinstance(config, dict) else {}
    for part in key.split(".") if nested else [key]:
        if not isinstance(value, dict) or part not in value:
            return words.ABSENT
        value = value[part]
    return words.brief(value)


def verification(run: Run) -> str:
    """What was checked of the exported files, in a sentence or two."""
    rows = [row for row in [run.dense, *run.models] if row]
    if broken := [str(row.get("label")) for row in rows if row.get("verified") is False]:
        return f"Not every exported file behaves like the model it was made from: check {', '.join(broken)}."
    if not rows or not all(row.get("verified") is True for row in rows):
        return ""
    n = number(rows[0].get("rows"))
    over = f"{n:,.0f} validation and test images" if n else "validation and test images"
    differ = [
        f"{number(row.get(key)):.0f} by {row.get('label')} ({kind})"
        for row in rows
        for key, kind in (("packed_differ", "packed"), ("onnx_differ", "onnx"))
        if number(row.get(key))
    ]
    same = f"; predictions that differ: {', '.join(differ)}" if differ else ""
    return f"Every file was loaded again in a clean process and, on the {over}, predicts the same as its model{same}."


def per_class(confusion: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the per-class table, least accurate first.

    Args:
        confusion: `classes` (K names) and `counts` (K × K, true class by predicted class).
    """
    names, counts_KK = confusion["classes"], np.asarray(confusion["counts"])
    rows = []
    for k, name in enumerate(names):
        total, wrong_K = int(counts_KK[k].sum()), counts_KK[k].copy()
        wrong_K[k] = 0
        worst = int(wrong_K.argmax())
        rows.append(
            {
                "name": name,
                "rows": total,
                "accuracy": counts_KK[k, k] / total if total else None,
                "mistaken": f"{names[worst]} ({wrong_K[worst]})" if wrong_K[worst] else "",
            }
        )
    return sorted(rows, key=lambda row: (row["accuracy"] is None, row["accuracy"]))


def failures(run: Run) -> list[dict[str, Any]]:
    """Rows of the first failed trials: trial, configuration, last line of the error, traceback."""
    return [_failure(row) for row in run.failed[:MOST_FAILURES]]


def _failure(row: dict[str, Any]) -> dict[str, Any]:
    error = str(row.get("error") or "").strip()
    config = row["config"] if isinstance(row.get("config"), dict) else {}
    return {
        "trial": row["trial"],
        "config": {key: words.brief(value) for key, value in config.items()},
        "error": error.splitlines()[-1] if error else f"no error was kept (status {row.get('status')})",
        "trace": error[-MOST_ERROR_CHARS:] if "\n" in error else "",
    }


def trials(run: Run, data: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of trials, the dearest first; `share` is of the dearest, `point` as in `models`."""
    points = {trial: i for i, trial in enumerate(data["points"]["trial"]) if trial is not None}
    gpus = _gpus_of_a_trial(run)
    rows = []
    for row in run.trials:
        seconds, cpu = number(row.get("seconds")), number(row.get("cpu_seconds"))
        rows.append(
            {name: number(row.get(name)) for name in ("val_accuracy", "bytes", "epochs")}
            | {
                "trial": row["trial"],
                "label": f"t{row['trial']:03d}",
                "point": points.get(row["trial"]),
                "seconds": seconds,
                "cpu_seconds": cpu,
                "gpu_seconds": gpus * seconds if gpus and seconds is not None else None,
                "ended": str(row.get("stopped") or ("failed" if row.get("status") == "failed" else "")),
            }
        )
    dear = "gpu_seconds" if gpus else "cpu_seconds"
    most = max(numbers(rows, dear), default=0.0)
    rows = [row | {"share": (row[dear] or 0.0) / most if most else 0.0} for row in rows]
    return sorted(rows, key=lambda row: (-(row[dear] or 0.0), row["trial"]))


def _gpus_of_a_trial(run: Run) -> float:
    """GPUs that a trial holds while it runs, by the job."""
    scaling, search = (found if isinstance(found := run.job.get(name), dict) else {} for name in ("scaling", "search"))
    if not scaling.get("use_gpu"):
        return 0.0
    workers = number(search.get("workers_per_trial")) or 1.0
    return workers if workers > 1 else number(search.get("gpus_per_trial")) or 1.0


def cost(run: Run) -> list[tuple[str, str]]:
    """Name and value of each figure that says what the run took."""
    epochs, speeds = len(run.metrics), numbers(run.metrics, "images_per_s")
    figures = []
    if epochs:
        figures += [
            ("Epochs trained", str(epochs)),
            ("Time in epochs", words.duration(_total(run.metrics, "seconds"))),
        ]
        for device, said in (("cpu", "Worker time in epochs"), ("cuda", "GPU time in epochs")):
            rows = [row for row in run.metrics if row.get("device") == device]
            held = sum((number(row.get("seconds")) or 0.0) * (number(row.get("workers")) or 1.0) for row in rows)
            if rows and (device == "cuda" or held > (_total(rows, "seconds") or 0.0)):
                figures.append((said, words.duration(held)))
    if speeds:
        figures.append(("Training, images/s", f"{np.median(speeds):,.0f}"))
    if run.trials:
        failed, gpus = f", {len(run.failed)} failed" if run.failed else "", _gpus_of_a_trial(run)
        figures += [
            ("Trials", f"{len(run.trials)}{failed}"),
            ("Time in trials", words.duration(_total(run.trials, "seconds"))),
            ("CPU time of trials", words.duration(_total(run.trials, "cpu_seconds"))),
            ("GPU time of trials", words.duration(gpus * (_total(run.trials, "seconds") or 0) if gpus else None)),
            ("Search, start to end", words.duration(max(numbers([*run.rungs, *run.trials], "at"), default=None))),
        ]
    return [(name, value) for name, value in figures if value != words.ABSENT]


def _total(rows: list[dict[str, Any]], key: str) -> float | None:
    values = numbers(rows, key)
    return sum(values) if values else None


def provenance(run: Run) -> list[tuple[str, str]]:
    """Name and value of each fact known about where the results come from."""
    known = run.provenance
    hardware, dataset, versions = (
        part if isinstance(part := known.get(key), dict) else {} for key in ("hardware", "dataset", "versions")
    )
    cores, memory, gpus = (hardware.get(key) for key in ("cores", "memory_bytes", "gpus"))
    rows, shape, classes = (dataset.get(key) for key in ("rows", "image", "classes"))
    processor = [str(part) for part in (hardware.get("cpu"), cores and f"{cores} cores") if part]
    images = [f"{n} {split}" for split, n in rows.items()] if isinstance(rows, dict) else []
    facts = [
        ("Run", known.get("id")),
        ("Created", known.get("created")),
        ("Seed", known.get("seed")),
        ("Git commit", known.get("git_commit")),
        ("Processor", ", ".join(processor)),
        ("Memory", words.size(memory) if number(memory) else None),
        ("GPUs", (", ".join(map(str, gpus)) or "none") if isinstance(gpus, list) else None),
        ("Dataset hash", dataset.get("hash")),
        ("Images", ", ".join(images)),
        ("Image shape", " × ".join(map(str, shape)) if isinstance(shape, list) else None),
        ("Classes", len(classes) if isinstance(classes, list) else None),
        ("raydeep", known.get("raydeep")),
        ("Versions", ", ".join(f"{name}\u00a0{version}" for name, version in versions.items())),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]
