"""Numbers as words, and the answer of a run in one sentence."""

from __future__ import annotations

import json
from typing import Any

from raydeep.report.folder import Run, number
from raydeep.search.pareto import smallest_close

ABSENT = "–"


def percent(value: Any, digits: int = 1) -> str:
    """0.981 as 98.1%."""
    found = number(value)
    return ABSENT if found is None else f"{100 * found:.{digits}f}%"


def size(value: Any) -> str:
    """Bytes, in powers of 1000: 12345 as 12.3 kB."""
    found = number(value)
    if found is None:
        return ABSENT
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if found >= 0.9995 * scale:
            return f"{found / scale:.{1 if found < 99.95 * scale else 0}f}\u00a0{unit}"
    return f"{found:.0f}\u00a0B"


def times(value: Any) -> str:
    """A ratio: 41.3 as 41×, 6.24 as 6.2×."""
    found = number(value)
    if found is None:
        return ABSENT
    return f"{found:.{0 if found >= 19.5 else 1 if found >= 0.095 else 2}f}×"


def duration(value: Any) -> str:
    """Seconds: 3.14 as 3.1 s, 135 as 2 min 15 s, 9000 as 2 h 30 min."""
    found = number(value)
    if found is None:
        return ABSENT
    if found < 59.95:
        return f"{found:.1f}\u00a0s"
    minutes, seconds = divmod(round(found), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {seconds}\u00a0s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h {minutes}\u00a0min"


def bits(value: Any) -> str:
    """A bit width, or float."""
    found = number(value)
    return "float" if found is None else f"{found:.3g}"


def setting(value: Any) -> str:
    """A value of a trial's configuration as a person writes it in a job file."""
    if value is None:
        return "none"
    if isinstance(value, dict) and value:
        return ", ".join(f"{key}: {setting(part)}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _speed(ratio: float | None) -> str:
    if ratio is None:
        return ""
    slower = ", so slower" if ratio < 0.95 else ""
    return f"{times(ratio)} the speed of the dense model{slower}"


def _smaller(ratio: float | None, size_bytes: Any) -> str:
    if ratio is None:
        return size(size_bytes)
    return f"{times(ratio)} smaller" if ratio >= 1 else f"{times(1 / ratio)} larger"


def _recipe(row: dict[str, Any]) -> str:
    weight, activation = number(row.get("weight_bits")), number(row.get("activation_bits"))
    parts = [f"{percent(row.get('sparsity'), 0)} of its weights are zero"] if number(row.get("sparsity")) else []
    parts.append("float weights" if weight is None else f"{weight:.0f}-bit weights")
    parts.append("float activations" if activation is None else f"{activation:.0f}-bit activations")
    return ", ".join(parts) + (", taught by the dense model" if row.get("distill") else "")


def _sound(row: dict[str, Any]) -> bool:
    known = all(number(row.get(key)) is not None for key in ("val_accuracy", "test_accuracy", "bytes"))
    return known and row.get("verified", True) is not False


def pick(run: Run) -> dict[str, Any] | None:
    """The smallest verified model of the front within 1 point of the dense model's validation accuracy."""
    dense = number((run.dense or {}).get("val_accuracy"))
    return None if dense is None else smallest_close([row for row in run.models if _sound(row)], dense)


def test_rows(run: Run) -> float | None:
    """Pictures of the test split."""
    dataset = run.provenance.get("dataset")
    rows = dataset.get("rows") if isinstance(dataset, dict) else None
    return number(rows.get("test")) if isinstance(rows, dict) else None


def answer(run: Run) -> tuple[str, str]:
    """The outcome of a run.

    Returns:
        The sentence at the top of the page, and the one or two that qualify it.
    """
    dense, chosen = run.dense, pick(run)
    if dense is None:
        return _unfinished(run)
    reference = f"{percent(dense.get('test_accuracy'))} at {size(dense.get('bytes'))}"
    n, accuracy = test_rows(run), number((chosen or dense).get("test_accuracy"))
    doubt = ""
    if n and accuracy is not None:
        error = (accuracy * (1 - accuracy) / n) ** 0.5
        doubt = f" With {n:.0f} test images, one standard error of an accuracy is ±{100 * error:.1f} points."
    if chosen is not None:
        speed = _speed(number(chosen.get("latency_ratio")))
        smaller = _smaller(number(chosen.get("compression_ratio")), chosen.get("bytes"))
        tail = f"{smaller} and {speed}" if speed else f"{smaller} than the dense model"
        return (
            f"At {percent(chosen.get('test_accuracy'))} test accuracy, {size(chosen.get('bytes'))}: {tail}.",
            f"Model {chosen.get('label')} is the smallest of the front whose validation accuracy is within "
            f"1 point of the dense model’s (test accuracy {reference}): {_recipe(chosen)}.{doubt}",
        )
    known = [row for row in run.models if _sound(row)]
    if known:
        best = max(known, key=lambda row: row["val_accuracy"])
        smaller = _smaller(number(best.get("compression_ratio")), best.get("bytes"))
        return (
            f"No compressed model stays within 1 point of the dense model’s "
            f"{percent(dense.get('val_accuracy'))} validation accuracy.",
            f"The closest, {best.get('label')}, reaches {percent(best.get('val_accuracy'))} at "
            f"{size(best.get('bytes'))} ({smaller}).{doubt}",
        )
    if run.models:
        detail = "No exported model passed verification."
    else:
        detail = "The search exported no compressed model." if run.trials else "Trained, not compressed."
    return (
        f"{percent(dense.get('test_accuracy'))} test accuracy at {size(dense.get('bytes'))}.",
        detail + doubt,
    )


def _trials(run: Run) -> int | None:
    """Configurations that the search is to try, as far as the job tells."""
    section = run.job.get("search")
    section = section if isinstance(section, dict) else {}
    most = ["trials", "population"] if section.get("scheduler") == "pbt" else ["trials"]
    found = [value for name in most if (value := number(section.get(name))) is not None]
    return int(min(found)) if found else None


def _unfinished(run: Run) -> tuple[str, str]:
    known = [row for row in run.done if number(row.get("val_accuracy")) is not None]
    if run.trials:
        wanted, ended = _trials(run), len(run.trials) - len(run.going)
        of = f" of {wanted}" if wanted else ""
        head = f"Not finished: {len(run.trials)}{of} trials so far."
        if wanted and len(run.trials) >= wanted:
            head = f"Not finished: all {len(run.trials)} trials ran, their front is not exported yet."
        if run.going:
            head = f"Not finished: {len(run.trials)}{of} trials begun, {ended} of them ended."
        if not known:
            return head, "No trial has succeeded yet."
        best = max(known, key=lambda row: row["val_accuracy"])
        smaller = _smaller(number(best.get("compression_ratio")), best.get("bytes"))
        return head, (
            f"The best so far, trial {best['trial']}, reaches {percent(best['val_accuracy'])} validation "
            f"accuracy at {size(best.get('bytes'))} ({smaller}). No model is verified yet."
        )
    if run.metrics:
        last = run.metrics[-1]
        return (
            f"Not finished: epoch {last['epoch']} of {last.get('epochs', '?')}, "
            f"{percent(last.get('val_accuracy'))} validation accuracy.",
            "The trained model is not evaluated yet.",
        )
    return "Nothing measured yet.", "The folder holds a job, but no epoch and no trial."
