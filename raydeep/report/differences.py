"""What two runs or more differ in, pure: test data, answers, hypervolume, keys, facts and classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_uppercase
from typing import Any

from raydeep.report import search, tables, words
from raydeep.report.folder import DEFAULT, Run, number
from raydeep.search import pareto
from raydeep.search.objectives import SHARES, Objectives

OF_THE_FOLDER = ("storage",)  # keys of a job that say nothing about the run


# can they be compared


def comparable(runs: Sequence[Run]) -> tuple[bool | None, str]:
    """Whether all runs were tested on the same pictures (None: not known), and the sentence that says so.

    The hash of a dataset is that of its classes and of the pictures of each split.
    """
    known = [found if isinstance(found := run.provenance.get("dataset"), dict) else {} for run in runs]
    hashes = [str(one.get("hash") or "") for one in known]
    counts = [words.test_rows(run) for run in runs]
    letters = ascii_uppercase[: len(runs)]
    if not all(hashes):
        which = [letter for letter, found in zip(letters, hashes, strict=True) if not found]
        some = f"{', '.join(which)} {'names' if len(which) == 1 else 'name'} no dataset yet"
        return None, f"Whether the runs are tested on the same pictures is not known: {some}."
    if len(set(hashes)) == 1:
        n = f"{counts[0]:.0f} " if counts[0] else ""
        shapes = [words.setting(one.get("image")) for one in known]
        sizes = "" if len(set(shapes)) == 1 else f", as pictures of {', '.join(shapes)}"
        return True, f"All were tested on the same {n}pictures (dataset {hashes[0][:12]}){sizes}."
    groups: dict[str, list[int]] = {}
    for i, found in enumerate(hashes):
        groups.setdefault(found, []).append(i)
    parts = []
    for digest, members in groups.items():
        n = f"{count:.0f} " if (count := counts[members[0]]) else ""
        parts.append(f"{' and '.join(letters[i] for i in members)} on {n}pictures of dataset {digest[:12]}")
    maybe = ""
    if len(set(counts)) == 1 and len({str(one.get("classes")) for one in known}) == 1:
        maybe = " The hash covers all splits: the test pictures could still be the same, but nothing shows that."
    return False, (
        f"They were tested on different data: {'; '.join(parts)}.{maybe} A difference in accuracy, front or "
        f"hypervolume below may come from the data alone."
    )


def headline(runs: Sequence[Run], letters: str) -> str:
    """The answers in one line; of more than three runs the smallest and the most accurate."""
    found = {letter: words.pick(run) or run.dense for letter, run in zip(letters, runs, strict=True)}

    def of(letter: str) -> str:
        row = found[letter]
        if row is None:
            return f"{letter}: not finished"
        plain = "" if row.get("label") != "dense" else " (dense)"
        return f"{letter}: {words.percent(row.get('test_accuracy'))} at {words.size(row.get('bytes'))}{plain}"

    if len(runs) <= 3:
        return "; ".join(map(of, letters)) + "."
    sized = {letter: size for letter, row in found.items() if row and (size := number(row.get("bytes")))}
    exact = {letter: acc for letter, row in found.items() if row and (acc := number(row.get("test_accuracy")))}
    if not sized or not exact:
        return f"{len(runs)} runs, none of them finished."
    small, best = min(sized, key=lambda k: sized[k]), max(exact, key=lambda k: exact[k])
    if small == best:
        return f"Of {len(runs)} runs, the smallest and most accurate answer is {of(small)}."
    return f"Of {len(runs)} runs, the smallest answer is {of(small)}; the most accurate {of(best)}."


def doubt(runs: Sequence[Run]) -> str:
    """How far apart the answers of two runs are, held against what chance does."""
    rows = [words.pick(run) or run.dense or {} for run in runs]
    found = [(number(row.get("test_accuracy")), words.test_rows(run)) for row, run in zip(rows, runs, strict=True)]
    if len(runs) != 2 or any(a is None or not n for a, n in found):
        return ""
    error = math.sqrt(sum(a * (1 - a) / n for a, n in found if a is not None and n))
    first, second = (a for a, _ in found if a is not None)
    return (
        f"The test accuracies of the two answers are {100 * abs(first - second):.1f} points apart. One standard error "
        f"of such a difference is about ±{100 * error:.1f} points, less where both err on the same pictures."
    )


# fronts


def common(runs: Sequence[Run]) -> Objectives:
    """The objectives that all searches had; accuracy and bytes where they differ or none searched."""
    found = [run.objectives for run in runs if run.trials or run.facts]
    return found[0] if found and all(one == found[0] for one in found) else DEFAULT


def _corner(runs: Sequence[Run], objectives: Objectives) -> tuple[float, ...] | None:
    """The reference that no run's own lies beyond: in each coordinate the worst of theirs."""
    measured = [{**(run.dense or {}), **_reference(run)} for run in runs]
    modes = Objectives(objectives.modes, [])
    corners = [modes.reference(row) for row in measured if row and modes.problem(row) is None]
    return tuple(map(max, zip(*corners, strict=True))) if corners and len(corners) == len(runs) else None


def _reference(run: Run) -> dict[str, Any]:
    found = run.provenance.get("reference")
    return found if isinstance(found, dict) else {}


def volumes(runs: Sequence[Run], objectives: Objectives) -> list[float | None]:
    """Hypervolume of each run's trials beyond one corner for all; None: it has no trials, or no corner is known."""
    corner = _corner([run for run in runs if run.trials], objectives)
    scale = math.prod(100.0 if name in SHARES else 1.0 for name in objectives.modes)
    out: list[float | None] = []
    for run in runs:
        judged = [row for row in run.done if objectives.problem(row) is None and not objectives.violation(row)]
        if corner is None or not run.trials:
            out.append(None)
        else:
            out.append(scale * pareto.hypervolume([objectives.point(row) for row in judged], corner))
    return out


def corner_words(runs: Sequence[Run], objectives: Objectives) -> str:
    """Where the corner lies, in words; empty where there is no hypervolume to tell of."""
    if all(found is None for found in volumes(runs, objectives)):
        return ""
    units = [("points of " if n in SHARES else "doublings of ") + search.OBJECTIVES[n] for n in objectives.modes]
    return (
        f"Hypervolume is what the trials of a run cover beyond one corner for all runs, in {' × '.join(units)}. In "
        f"each objective the corner is the worst of the runs’ own, so the numbers may differ from those of their pages."
    )


# tables


Values = dict[str, str]


def differing(columns: Sequence[Values]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Keys whose values are not the same in all columns, with the value in each, and the others with theirs."""
    differ, same = [], []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key, words.ABSENT) for column in columns]
        if len(set(values)) > 1:
            differ.append((key, values))
        else:
            same.append((key, values[0]))
    return differ, same


def job_values(job: dict[str, Any]) -> Values:
    """Dotted key → value as a person writes it; a dimension of the search space is one value."""
    out: Values = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value and not prefix.startswith("search.space."):
            for key, part in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), part)
        else:
            out[prefix] = words.setting(value)

    for key, value in job.items():
        if key not in OF_THE_FOLDER:
            walk(str(key), value)
    return out


def provenance_values(run: Run) -> Values:
    """Name → value of each fact about where results come from, versions one by one."""
    facts = {name: value for name, value in tables.provenance(run) if name not in ("Run", "Versions")}
    versions = run.provenance.get("versions")
    return facts | ({str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {})


def costs(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What each run took: name of a figure, and its value of each run."""
    columns = [dict(tables.cost(run)) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, words.ABSENT) for column in columns]) for name in names]


def per_class(classes: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of the table of classes, those that the runs differ in most first."""
    if classes is None:
        return []
    rows = []
    for k, name in enumerate(classes["names"]):
        values = [column[k] for column in classes["accuracy"]]
        known = [value for value in values if value is not None]
        rows.append({"name": name, "values": values, "gap": max(known) - min(known) if len(known) > 1 else None})
    return sorted(rows, key=lambda row: -(row["gap"] or 0.0))
