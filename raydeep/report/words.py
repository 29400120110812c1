"""Numbers as words, and the answer of a run in one sentence."""

from __future__ import annotations

import json
from typing import Any

from raydeep.report.folder import Run, number

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


def speed(value: Any) -> str:
    """A ratio of latencies, where hundredths count: 0.97×."""
    found = number(value)
    return times(value) if found is None or found >= 9.995 else f"{found:.2f}×"


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


def brief(value: Any) -> str:
    """As `setting`, a drawn number with no more digits than a person reads: 0.03404."""
    return f"{value:.4g}" if isinstance(value, float) else setting(value)


def sentence(text: str) -> str:
    """A line as a sentence: a capital, a full stop."""
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}" if text else ""


def setting(value: Any) -> str:
    """A value of a trial's configuration as a person writes it in a job file."""
    if value is None:
        return "none"
    if isinstance(value, dict) and value:
        return ", ".join(f"{key}: {setting(part)}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def count(value: Any) -> str:
    """A number of operations: 347392 as 347 k, 1200000 as 1.2 M."""
    found = number(value)
    if found is None:
        return ABSENT
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if found >= 0.9995 * scale:
            return f"{found / scale:.3g}\u00a0{unit}"
    return f"{found:.0f}"


ALIKE = 0.05  # a ratio so near to 1 is none to speak of
Claim = tuple[int, str, str]  # better (1), alike (0) or worse (-1) than the dense model; "41×"; "smaller"


def _claim(ratio: float | None, better: str, alike: str, worse: str) -> Claim | None:
    """What a ratio to the dense model amounts to, above 1 being better."""
    if ratio is None or ratio <= 0:
        return None
    if abs(ratio - 1) < ALIKE:
        return 0, "", alike
    return (1, times(ratio), better) if ratio > 1 else (-1, times(1 / ratio), worse)


def _comparison(row: dict[str, Any], dense: dict[str, Any], by: str) -> str:
    """41× smaller and 6.2× faster than the dense model: what the search was after first, then the rest."""
    macs, dense_macs = number(row.get("macs")), number(dense.get("macs"))
    claims = {
        "bytes": _claim(number(row.get("compression_ratio")), "smaller", "as large", "larger"),
        "latency_ms": _claim(number(row.get("latency_ratio")), "faster", "as fast", "slower"),
        "macs": _claim(dense_macs / macs if macs and dense_macs else None, "fewer MACs", "as many MACs", "more MACs"),
    }
    wanted = [by, *(name for name in ("bytes", "latency_ms") if name != by)]
    known = [claim for name in wanted if (claim := claims.get(name))]
    good, worse, alike = ([c for c in known if c[0] == sign] for sign in (1, -1, 0))
    differ = " but ".join(" and ".join(f"{ratio} {word}" for _, ratio, word in part) for part in (good, worse) if part)
    same = " and ".join(word for *_, word in alike)
    if not differ:
        return f"{same} as the dense model" if same else ""
    return f"{differ} than the dense model" + (f" and {same}" if same and good else f", {same}" if same else "")


def _smaller(ratio: float | None, size_bytes: Any) -> str:
    claim = _claim(ratio, "smaller", "as large as the dense model", "larger")
    return size(size_bytes) if claim is None else f"{claim[1]} {claim[2]}".strip()


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
    """The verified model of the front that answers the search, as its objectives tell (Objectives.answer)."""
    dense, sound = number((run.dense or {}).get("val_accuracy")), [row for row in run.models if _sound(row)]
    return None if dense is None else run.objectives.answer(sound, dense)


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
    measured = run.provenance.get("reference")  # of it, the MACs are told nowhere else
    dense = (measured if isinstance(measured, dict) else {}) | dense
    reference = f"{percent(dense.get('test_accuracy'))} at {size(dense.get('bytes'))}"
    n, accuracy = test_rows(run), number((chosen or dense).get("test_accuracy"))
    doubt = ""
    if n and accuracy is not None:
        error = (accuracy * (1 - accuracy) / n) ** 0.5
        doubt = f" With {n:,.0f} test images, one standard error of an accuracy is ±{100 * error:.1f} points."
    if chosen is not None and run.objectives.only_accuracy:
        gain = 100 * (chosen["test_accuracy"] - dense["test_accuracy"])
        against = "as accurate as" if abs(gain) < 0.05 else f"{abs(gain):.1f} points {'above' if gain > 0 else 'below'}"
        return (
            f"{percent(chosen['test_accuracy'])} test accuracy: {against} the model of the job’s own settings.",
            f"Model {chosen.get('label')} has the highest validation accuracy of those found "
            f"({percent(chosen['val_accuracy'])}; the job’s own {percent(dense.get('val_accuracy'))}), "
            f"at {size(chosen.get('bytes'))}.{doubt}",
        )
    if chosen is not None:
        by = run.objectives.cost
        what = {"bytes": "smallest", "latency_ms": "fastest", "macs": "one with the fewest MACs"}[by]
        amount = {
            "latency_ms": f"{number(chosen.get('latency_ms')) or 0:.3g}\u00a0ms a picture",
            "macs": f"{count(chosen.get('macs'))} MACs",
        }.get(by, size(chosen.get("bytes")))
        return (
            f"At {percent(chosen.get('test_accuracy'))} test accuracy, {amount}: {_comparison(chosen, dense, by)}.",
            f"Model {chosen.get('label')} is the {what} of the front whose validation accuracy is within "
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
