"""Two runs or more on one page: their answers, their fronts on one plot, and all that differs between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from plotly.offline import get_plotlyjs

from raydeep.disk import write_bytes
from raydeep.errors import RaydeepError
from raydeep.report import differences, search, tables, words
from raydeep.report.folder import Run, read_run
from raydeep.report.page import templates
from raydeep.report.plots import MEASURES, SHARES, axes, frame, plot_data
from raydeep.search.objectives import FIELDS, Objectives

DOTS = 40  # classes in the plot; the table has all


class Mark(NamedTuple):
    """How a run is told from the others: never by its colour alone."""

    symbol: str  # plotly's name
    path: str  # the same as SVG in a box of 12 × 12
    dash: str
    light: str
    dark: str


MARKS = (
    Mark("circle", "M6 1a5 5 0 1 0 0 10a5 5 0 1 0 0-10z", "solid", "#00695c", "#4fc3b0"),
    Mark("square", "M1.5 1.5h9v9h-9z", "dash", "#b04a00", "#f0a04b"),
    Mark("triangle-up", "M6 .8l5.6 10H.4z", "dot", "#2f55c8", "#8fb0ff"),
    Mark("diamond", "M6 .3L11.7 6L6 11.7L.3 6z", "dashdot", "#a3216c", "#f08cc4"),
    Mark("cross", "M4 .8h4V4h3.2v4H8v3.2H4V8H.8V4H4z", "longdash", "#5f6200", "#cdd05c"),
    Mark("star", "M6 .4l1.7 3.6 3.9.4-2.9 2.7.8 4L6 9l-3.5 2 .8-4L.4 4.4l3.9-.4z", "longdashdot", "#6b3fb5", "#bfa5ff"),
    Mark("triangle-down", "M6 11.2L.4 1.2h11.2z", "solid", "#a3301c", "#ff9580"),
    Mark("pentagon", "M6 .6l5.5 4-2.1 6.6H2.6L.5 4.6z", "dash", "#3c444c", "#c3cad1"),
)  # fmt: skip


def write_comparison(run_dirs: Sequence[Path], out: Path, names: Sequence[str] | None = None) -> Path:
    """Write a page that compares runs, whole or not at all. Like a run's own page it loads nothing.

    Args:
        run_dirs: two run folders or more, at most as many as there are MARKS.
        out: the file to write.
        names: what the folders are called on the page; None: their paths.

    Returns:
        `out`.

    Raises:
        RaydeepError: a folder is no run or stands there twice, a whole file in one can't be parsed, there are too few
            or too many, or `out` is a folder.
    """
    if not 2 <= len(run_dirs) <= len(MARKS):
        raise RaydeepError(f"{len(run_dirs)} runs: expected 2 to {len(MARKS)} to compare")
    seen: set[Path] = set()
    for path in (run_dir.resolve() for run_dir in run_dirs):
        if path in seen:
            raise RaydeepError(f"{path}: the same run twice; give runs that differ")
        seen.add(path)
    if out.is_dir():
        raise RaydeepError(f"{out}: a folder; --out takes the name of the page, such as {out}/compare.html")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    folders = list(names) if names is not None else [str(run_dir) for run_dir in run_dirs]
    write_bytes(out, render(runs, [run_dir.name for run_dir in run_dirs], folders).encode())
    return out


def render(runs: Sequence[Run], names: Sequence[str], folders: Sequence[str]) -> str:
    """The page as text; `names` are short and `folders` tell where the runs are."""
    drawn = [plot_data(run) for run in runs]
    objectives, letters = differences.common(runs), ascii_uppercase[: len(runs)]
    data = _data(runs, drawn, objectives, letters, names)
    same_data, about = differences.comparable(runs)
    shown = any(one["points"]["bytes"] or one["dense"] or one["curves"] for one in data["runs"])
    differ, same = differences.differing([differences.job_values(run.job) for run in runs])
    told, shared = differences.differing([differences.provenance_values(run) for run in runs])
    all_told = [_told(*one) for one in zip(letters, names, folders, runs, MARKS, strict=False)]
    return templates().get_template("compare.html.j2").render(
        title=", ".join(names),
        runs=all_told,
        of=dict(zip(letters, all_told, strict=True)),
        data=data,
        comparable=same_data,
        about=about,
        headline=differences.headline(runs, letters),
        doubt=differences.doubt(runs),
        rows=[row for run, letter, one in zip(runs, letters, drawn, strict=True) for row in _rows(run, letter, one)],
        volumes=differences.volumes(runs, objectives),
        corner=differences.corner_words(runs, objectives),
        objectives=[search.OBJECTIVES[name] for name in objectives.modes],
        others=[k for k, run in zip(letters, runs, strict=True) if run.trials and run.objectives != objectives],
        words={measure["name"]: measure["words"] for measure in data["measures"]},
        keys=differ,
        same_keys=len(same),
        classes=differences.per_class(data["classes"]),
        few=min((n for found in drawn for n in _tested(found["confusion"]) if n), default=None),
        provenance=told,
        shared=shared,
        cost=differences.costs(runs),
        plotly_js=get_plotlyjs() if shown else "",
    )  # fmt: skip


def _told(letter: str, name: str, folder: str, run: Run, mark: Mark) -> dict[str, Any]:
    sentence, detail = words.answer(run)
    return {
        "index": ascii_uppercase.index(letter), "letter": letter, "name": name, "folder": folder, "mark": mark,
        "sentence": sentence, "detail": detail, "command": str(run.provenance.get("command") or ""),
        "skipped": run.skipped,
    }  # fmt: skip


def _rows(run: Run, letter: str, drawn: dict[str, Any]) -> list[dict[str, Any]]:
    """A run's dense model and its answer, as rows of plain values."""
    chosen = str((words.pick(run) or {}).get("label"))
    rows = tables.models(run, drawn)
    return [row | {"letter": letter} for row in rows if row["is_dense"] or row["label"] == chosen]


# what the plots draw


def _data(
    runs: Sequence[Run], drawn: Sequence[dict[str, Any]], objectives: Objectives, letters: str, names: Sequence[str]
) -> dict[str, Any]:
    """Everything the plots draw, as plain JSON values."""
    out = []
    for run, found, letter, name, mark in zip(runs, drawn, letters, names, MARKS, strict=False):
        points = {key: found["points"][key] for key in (*MEASURES, "trial", "label")}
        if run.objectives == objectives:
            front = found["front"]
        else:
            rows = [{key: points[key][i] for key in MEASURES} for i in range(len(points["bytes"]))]
            judged = [i for i, row in enumerate(rows) if objectives.problem(row) is None]
            front = [judged[i] for i in objectives.front([rows[i] for i in judged])]
        out.append({
            "letter": letter, "name": name, "symbol": mark.symbol, "dash": mark.dash, "light": mark.light,
            "dark": mark.dark, "points": points, "front": front, "dense": found["dense"], "pick": found["pick"],
            "curves": found["curves"],
        })  # fmt: skip
    measures = _measures(out)
    present = [measure["name"] for measure in measures]
    columns = [FIELDS[name] for name in objectives.modes]
    return {
        "runs": out, "measures": measures, "axes": axes(columns, present), "objectives": columns,
        "classes": _classes(drawn),
    }  # fmt: skip


def _measures(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the axes offer: each measure that a model of some run has."""
    found = []
    for name, said in MEASURES.items():
        values = [value for run in runs for value in run["points"][name] if value is not None]
        dense = [run["dense"][name] for run in runs if run["dense"] and run["dense"][name] is not None]
        if values or dense or name in ("val_accuracy", "bytes"):
            share = name in SHARES
            first = frame(values + dense) if share else None
            if first is not None and dense:
                first = min(first, *dense)  # what all is held against is in sight
            found.append({"name": name, "words": said, "share": share, "first": first})
    return found


def _classes(drawn: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Accuracy of each class in each run's dense model: `names`, `accuracy` (a column a run, None: not evaluated).

    None where the classes are not the same, or fewer than two runs are evaluated.
    """
    known = [found["confusion"] for found in drawn if found["confusion"]]
    if len(known) < 2 or any(one["classes"] != known[0]["classes"] for one in known):
        return None
    columns = []
    for found in drawn:
        counts = found["confusion"]["counts"] if found["confusion"] else [[0]] * len(known[0]["classes"])
        columns.append([_rounded(row[k], sum(row)) if found["confusion"] else None for k, row in enumerate(counts)])
    return {"names": known[0]["classes"], "accuracy": columns, "shown": DOTS}


def _tested(confusion: dict[str, Any] | None) -> list[int]:
    """Test pictures of each class."""
    return [sum(row) for row in confusion["counts"]] if confusion else []


def _rounded(part: int, total: int) -> float | None:
    return round(part / total, 5) if total else None
