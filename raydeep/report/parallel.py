"""The parallel coordinates of a search: an axis a key that was searched, and one for each measure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from raydeep.report import words
from raydeep.report.folder import Run, number

FEW = 7  # numbers that are marked one by one, evenly spaced
UNSET = 0.12  # how far above the mark for "not set" an axis begins
MOST_TICK_CHARS = 16


def axes(run: Run, rows: Sequence[dict[str, Any]], measures: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What parallel coordinates draw; nothing unless two trials differ in what was searched.

    Args:
        run: the run.
        rows: of the points of the page.
        measures: `name`, `words`, whether a `share`, and the lowest value `first` shown; they come after the keys.

    Returns:
        Of each axis its `name`, `words`, whether it is a `key` of the search or a measure, `at` (0, below, to 1, of
        each point; None: a point without a configuration), `ticks` (pairs of place and text), and for an axis of
        numbers the `ends` of its scale and whether it is a `log`; of one of names `ends` is None.
    """
    configs = [
        row["config"] if isinstance(row.get("config"), dict) and row.get("trial") is not None else None for row in rows
    ]
    space = run.facts.get("space")
    space = space if isinstance(space, dict) else {}
    seen = dict.fromkeys(key for config in configs if config for key in config)
    keys = list(dict.fromkeys([*(key for key in space if key in seen), *seen]))
    if sum(config is not None for config in configs) < 2 or not keys:
        return []
    found = [_of_key(key, configs, space.get(key)) for key in keys]
    return [
        *found,
        *(_of_measure(measure, configs, rows) for measure in measures if measure["name"] != "test_accuracy"),
    ]


def _of_key(key: str, configs: Sequence[dict[str, Any] | None], dimension: Any) -> dict[str, Any]:
    values = [None if config is None or key not in config else (config[key],) for config in configs]  # (None,): none
    present = [value[0] for value in values if value is not None]
    ranged = isinstance(dimension, dict) and "low" in dimension
    numeric = all(number(value) is not None for value in present)
    if numeric and (ranged or len(set(present)) > FEW):
        log = bool(ranged and dimension.get("log") and min(present) > 0)
        low, high = min(present), max(present)
        places: dict[str, float] = {}
        scale: list[tuple[float, str]] = [(place(v, low, high, log), f"{v:g}") for v in steps(low, high, log)]
        at = [None if value is None else place(value[0], low, high, log) for value in values]
        ends: list[float] | None = [low, high]
    else:
        names = _ordered({words.brief(value): value for value in present})
        places = {name: k / max(1, len(names) - 1) if len(names) > 1 else 0.5 for k, name in enumerate(names)}
        scale = [(share, _cut(name)) for name, share in places.items()]
        at = [None if value is None else places[words.brief(value[0])] for value in values]
        ends, log = None, False
    if any(value is None and config is not None for value, config in zip(values, configs, strict=True)):
        lift = lambda share: UNSET + (1 - UNSET) * share  # noqa: E731
        scale = [(0.0, words.ABSENT), *((lift(share), text) for share, text in scale)]
        at = [
            None if config is None else 0.0 if share is None else lift(share)
            for share, config in zip(at, configs, strict=True)
        ]
        ends = None
    return _axis(key, key, True, at, scale, ends, log)


def _of_measure(
    measure: dict[str, Any], configs: Sequence[dict[str, Any] | None], rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """An accuracy begins where the close-up of the plot does: what lies below stands at the foot of its axis."""
    name, share = measure["name"], measure["share"]
    values = [None if config is None else number(row.get(name)) for config, row in zip(configs, rows, strict=True)]
    present = [value for value in values if value is not None] or [1.0]
    low, high = min(present), max(present)
    cut = share and measure["first"] is not None and low < measure["first"] < high
    low = measure["first"] if cut else low
    say = {"bytes": words.size, "macs": words.count, "latency_ms": lambda v: f"{v:.3g}\u00a0ms"}.get(name)
    marks = steps(low, high, not share)
    digits = 0 if all(abs(100 * v - round(100 * v)) < 1e-6 for v in marks) else 1
    say = say or (lambda v: words.percent(v, digits))
    ticks = [(place(v, low, high, not share), say(v).replace(".0\u00a0", "\u00a0")) for v in marks]
    if cut:
        ticks = [(0.0, f"< {words.percent(low)}"), *(tick for tick in ticks if tick[0] > 0.08)]
    at = [None if value is None else place(max(value, low), low, high, not share) for value in values]
    return _axis(name, measure["words"], False, at, ticks, [low, high], not share)


def _axis(
    name: str, said: str, key: bool, at: list[float | None], ticks: list[tuple[float, str]], ends: Any, log: bool
) -> dict[str, Any]:
    return {
        "name": name, "words": said, "key": key, "log": log, "ends": ends,
        "at": [None if share is None else round(share, 4) for share in at],
        "ticks": [[round(share, 4), text] for share, text in ticks],
    }  # fmt: skip


def place(value: float, low: float, high: float, log: bool = False) -> float:
    """Where a number stands on an axis from `low` (0) to `high` (1)."""
    if high == low:
        return 0.5
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def steps(low: float, high: float, log: bool = False) -> list[float]:
    """Round numbers from `low` to `high`, both included if they are, to mark an axis with: 2 to 6, or the ends."""
    if high == low:
        return [low]
    span = high / low if log else high - low
    if log and span >= 4:
        bases: tuple[int, ...] = (1,) if span > 3000 else (1, 3) if span > 30 else (1, 2, 5)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [base * 10.0**k for k in decades for base in bases]
    else:
        width = high - low
        unit = 10.0 ** math.floor(math.log10(width / 3))
        step = next(unit * n for n in (1, 2, 5, 10) if width / (unit * n) <= 5)
        found = [step * k for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
    slack = 1e-9 * abs(high - low)
    found = [float(f"{value:.12g}") for value in found if low - slack <= value <= high + slack]
    return found if len(found) > 1 else [low, high]


def _ordered(found: dict[str, Any]) -> list[str]:
    """Names of settings: numbers by size, false and true, the rest as they came, none last."""

    def rank(item: tuple[str, Any]) -> tuple[int, float]:
        value = item[1]
        if isinstance(value, bool):
            return 1, value
        return (0, value) if number(value) is not None else (3 if value is None else 2, 0)

    return [name for name, _ in sorted(found.items(), key=rank)]


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TICK_CHARS else f"{text[: MOST_TICK_CHARS - 1]}…"
