"""Read a run folder as it stands: finished, half finished or interrupted in the middle of a line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydeep.errors import JobError, RaydeepError
from raydeep.safeyaml import load_yaml
from raydeep.search.objectives import Objectives
from raydeep.tuning import Search

DEFAULT = Objectives.of(Search())
SUMS = ("seconds", "cpu_seconds", "overhead_seconds")  # of a trial: over its rungs


@dataclass(frozen=True)
class Run:
    """What a run folder holds. A part that is not there is empty, or None."""

    job: dict[str, Any]
    job_text: str
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)  # by stage, then epoch; one line each
    trials: list[dict[str, Any]] = field(default_factory=list)  # by trial number; its end, or its best rung so far
    rungs: list[dict[str, Any]] = field(default_factory=list)  # as they came through; one line each
    facts: dict[str, Any] = field(default_factory=dict)  # what the search is about: the ledger's first line
    objectives: Objectives = DEFAULT  # of the search
    front: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    gallery: dict[str, Any] | None = None
    skipped: dict[str, int] = field(default_factory=dict)  # file name: unreadable lines before its last

    @property
    def done(self) -> list[dict[str, Any]]:
        """Trials with a result: those that finished, and of a search that goes on those that wait at a rung."""
        return [row for row in self.trials if row.get("status") != "failed"]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Trials that failed."""
        return [row for row in self.trials if row.get("status") == "failed"]

    @property
    def going(self) -> list[dict[str, Any]]:
        """Trials that have not ended."""
        return [row for row in self.trials if row.get("event") == "rung"]

    @property
    def dense(self) -> dict[str, Any] | None:
        """The row of the model before compression."""
        row = (self.front or {}).get("dense")
        return row if isinstance(row, dict) else None

    @property
    def models(self) -> list[dict[str, Any]]:
        """The exported models of the front, largest first."""
        rows = [row for row in (self.front or {}).get("models") or [] if isinstance(row, dict)]
        return sorted(rows, key=lambda row: -(number(row.get("bytes")) or 0))


def number(value: Any) -> float | None:
    """`value` as a finite float, or None where it is none (absent, text, true, NaN, infinite)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def numbers(rows: Iterable[dict[str, Any]], key: str) -> list[float]:
    """The finite numbers under a key, of the rows that have one."""
    return [value for row in rows if (value := number(row.get(key))) is not None]


def read_run(run_dir: Path) -> Run:
    """Read what a run folder holds so far.

    Args:
        run_dir: Folder with at least `job.yaml` or `provenance.json`.

    Returns:
        The run. Of repeated lines (a resumed run repeats epochs) the last one counts. Ledgers of both schemas are
        read: in schema 2 a trial has a line for each rung, in schema 1 only one.

    Raises:
        RaydeepError: If the folder is no run, or one of its whole files can't be parsed.
    """
    if not run_dir.is_dir():
        raise RaydeepError(f"{run_dir}: no such folder; expected a run folder, as raydeep train or search writes")
    if not any((run_dir / name).is_file() for name in ("job.yaml", "provenance.json")):
        raise RaydeepError(
            f"{run_dir} is not a run folder: it has neither job.yaml nor provenance.json; "
            "expected a folder that raydeep train or search wrote"
        )
    job_path = run_dir / "job.yaml"
    job_text = job_path.read_text(encoding="utf-8", errors="replace") if job_path.is_file() else ""
    try:
        job = load_yaml(job_text) or {}
    except JobError as err:
        raise RaydeepError(f"{job_path}: {err}") from None
    if not isinstance(job, dict):
        raise RaydeepError(f"{job_path}: expected a mapping of sections, found {type(job).__name__}")
    skipped: dict[str, int] = {}
    metrics = {
        (str(row.get("stage")), int(epoch)): row
        for row in _lines(run_dir / "metrics.jsonl", skipped)
        if (epoch := number(row.get("epoch"))) is not None
    }
    stages = list(dict.fromkeys(stage for stage, _ in metrics))
    lines = _lines(run_dir / "ledger.jsonl", skipped)
    facts = next((row for row in lines if "trial" not in row), {})
    objectives = objectives_of(facts or job.get("search"))
    lines = [row | {"trial": int(trial)} for row in lines if (trial := number(row.get("trial"))) is not None]
    rungs = {(row["trial"], row.get("rung")): row for row in lines if row.get("event") == "rung"}
    trials = _so_far(list(rungs.values()), objectives)
    trials |= {row["trial"]: row for row in lines if row.get("event") != "rung"}  # schema 1 has one line a trial
    return Run(
        job=job,
        job_text=job_text,
        provenance=_object(run_dir / "provenance.json") or {},
        metrics=[metrics[key] for key in sorted(metrics, key=lambda key: (stages.index(key[0]), key[1]))],
        trials=[trials[key] for key in sorted(trials)],
        rungs=list(rungs.values()),
        facts=facts,
        objectives=objectives,
        front=_object(run_dir / "front.json"),
        evaluation=_object(run_dir / "evaluation.json"),
        gallery=_object(run_dir / "gallery.json"),
        skipped=skipped,
    )


def objectives_of(section: Any) -> Objectives:
    """Those of the ledger's first line or of a job's search section; accuracy and bytes where they are not told."""
    known = section if isinstance(section, dict) else {}
    try:
        return Objectives.of(
            Search.model_validate({name: known[name] for name in ("objectives", "constraints") if name in known})
        )
    except ValueError:  # pydantic's, too
        return DEFAULT


def _so_far(rungs: list[dict[str, Any]], objectives: Objectives) -> dict[int, dict[str, Any]]:
    """Number → what a trial's end would say if it ended now."""
    by_trial: dict[int, list[dict[str, Any]]] = {}
    for row in rungs:
        by_trial.setdefault(row["trial"], []).append(row)
    found = {}
    for trial, rows in by_trial.items():
        best = None
        for row in rows:
            if not objectives.problem(row) and objectives.better(row, best):
                best = row
        sums = {name: sum(values) for name in SUMS if (values := numbers(rows, name))}
        found[trial] = (best or rows[-1]) | sums
    return found


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as err:
        raise RaydeepError(f"{path}: not readable as JSON: {err}") from None
    if not isinstance(value, dict):
        raise RaydeepError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _lines(path: Path, skipped: dict[str, int]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file. A torn last line is what a kill leaves: no word about it."""
    if not path.is_file():
        return []
    rows, bad = [], []
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    for index, line in enumerate(lines):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            rows.append(value)
        else:
            bad.append(index)
    if unexpected := [index for index in bad if index != len(lines) - 1]:
        skipped[path.name] = len(unexpected)
    return rows
