"""How a search went: its rungs, why its trials ended, what it reached, and the best model under each constraint."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from raydeep.report import words
from raydeep.report.folder import Run, number, numbers
from raydeep.search.objectives import FIELDS, LOST, SHARES, Objectives
from raydeep.tuning import Constraint

OBJECTIVES = {
    "accuracy": "accuracy", "worst_class": "accuracy of the worst class", "bytes": "size", "latency": "latency",
    "macs": "MACs",
}  # fmt: skip
OWN = ("dense", "scratch")  # what a trial starts from if not from another


def progress(run: Run) -> dict[str, Any]:
    """What the section on the search shows: `rungs` and `ends`, rows of its two tables, and `notes`, sentences."""
    return {"rungs": rungs(run), "ends": ends(run), "notes": [*filter(None, (_starts(run), _overhead(run)))]}


def rungs(run: Run) -> list[dict[str, Any]]:
    """A row for each rung: epochs, how many trials came through, the median seconds and CPU seconds it took them."""
    rows = []
    for rung in sorted({int(n) for n in numbers(run.rungs, "rung")}):
        through = [row for row in run.rungs if row.get("rung") == rung]
        epochs, seconds, cpu = (numbers(through, key) for key in ("epochs", "seconds", "cpu_seconds"))
        rows.append(
            {
                "rung": rung,
                "epochs": int(epochs[-1]) if epochs else None,
                "trials": len(through),
                "seconds": median(seconds) if seconds else None,
                "cpu_seconds": median(cpu) if cpu else None,
            }
        )
    return rows


def ends(run: Run) -> list[tuple[str, int]]:
    """Why trials ended, and how many for that reason, most first; those that go on come last."""
    found = Counter(str(row["stopped"]) for row in run.trials if row.get("stopped"))
    return found.most_common() + ([("not ended yet", len(run.going))] if run.going else [])


def _starts(run: Run) -> str:
    known = [row for row in run.rungs if row.get("start") is not None]
    others = {row["trial"] for row in known if row["start"] not in OWN}
    if not known:
        return ""
    if not others:
        return "No trial began from another trial’s weights."
    count = f"{len(others)} of {len({row['trial'] for row in known})} trials"
    return f"{count} began a rung from another trial’s weights."


def _overhead(run: Run) -> str:
    """What starting the workers of trials took, in a sentence; nothing where a trial is one process."""
    rows = [row for row in run.rungs if number(row.get("overhead_seconds")) is not None and number(row.get("seconds"))]
    if not rows:
        return ""
    lost, took = numbers(rows, "overhead_seconds"), numbers(rows, "seconds")
    return (
        f"Starting and stopping the workers of a trial took a median of {words.duration(median(lost))} a rung, "
        f"{words.percent(sum(lost) / sum(took), 0)} of the time in trials."
    )


def aim(run: Run) -> str:
    """Which trials are on the front, in words."""
    limits = _listed([_limit(limit) for limit in run.objectives.limits])
    what = "trials" if run.trials else "models"
    which = f"{what} that no other beats in {_listed([OBJECTIVES[name] for name in run.objectives.modes])}"
    judged = [row for row in run.done if run.objectives.problem(row) is None]
    if not limits:
        return f"On the front are the {which}."
    if any(run.objectives.violation(row) == 0 for row in judged):
        return f"On the front are, of the trials with {limits}, the {which}."
    return f"No trial has {limits}. On the front are, of those nearest to it, the {which}."


def volume(run: Run) -> str:
    """What the hypervolume measures, in words."""
    modes = run.objectives.modes
    shares, sizes = ([name for name in modes if (name in SHARES) is so] for so in (True, False))
    units = [("points of " if name in SHARES else "doublings of ") + OBJECTIVES[name] for name in modes]
    # the corner, from where it lies for a dense model that measures 1
    doublings = {name: Objectives({name: modes[name]}, []).reference({FIELDS[name]: 1.0})[0] for name in sizes}
    places = [f"{100 * LOST:.0f} points of {OBJECTIVES[name]} below it" for name in shares]
    places += [
        f"at {f'{2**far:g} times ' if (far := abs(doublings[name])) else ''}its {OBJECTIVES[name]}" for name in sizes
    ]
    text = (
        f"Hypervolume is what the results so far cover beyond a corner beside the dense model ({', '.join(places)}), "
        f"in {' × '.join(units)}."
    )
    if len(shares) == len(sizes) == 1:
        alone = 100 * LOST * (1 + abs(doublings[sizes[0]]))
        text += (
            f" A model as accurate as the dense one at half its {OBJECTIVES[sizes[0]]} covers {alone:.0f} by itself."
        )
    return text


def best(run: Run) -> list[dict[str, Any]]:
    """Rows of the table of constraints: the constraint, the model that is best under it, or None, and its measures."""
    found = (run.front or {}).get("best")
    if not isinstance(found, dict):
        return []
    models = {str(row.get("label")): row for row in run.models}
    signs = {True: ">=", False: "<="}  # as front.json has them
    limits = {f"{limit.objective} {signs[limit.at_least]} {limit.bound:g}": limit for limit in run.objectives.limits}
    rows = []
    for key in dict.fromkeys([*limits, *map(str, found)]):
        label = found.get(key)
        row = models.get(str(label), {})
        rows.append(
            {
                "constraint": _limit(limits[key]) if key in limits else key,
                "label": None if label is None else str(label),
                **{name: number(row.get(name)) for name in ("test_accuracy", "val_accuracy", "bytes")},
            }
        )
    return rows


def _limit(limit: Constraint) -> str:
    """A constraint as a person reads it: accuracy ≥ 97%, size ≤ 50,000 bytes."""
    name, bound = limit.objective, limit.bound
    units = {"bytes": f"{bound:,.0f} bytes", "latency": f"{bound:g}\u00a0ms", "macs": f"{bound:,.0f}"}
    value = f"{100 * bound:g}%" if name in SHARES else units[name]
    return f"{OBJECTIVES[name]} {'≥' if limit.at_least else '≤'}\u00a0{value}"


def _listed(parts: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
