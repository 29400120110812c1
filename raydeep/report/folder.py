"""Read a run folder as it stands: finished, half finished or interrupted in the middle of a line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raydeep.errors import RaydeepError


@dataclass(frozen=True)
class Run:
    """What a run folder holds. A part that is not there is empty, or None."""

    job: dict[str, Any]
    job_text: str
    provenance: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)  # by stage, then epoch; one line each
    trials: list[dict[str, Any]] = field(default_factory=list)  # by trial number; one line each
    front: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    skipped: dict[str, int] = field(default_factory=dict)  # file name: unreadable lines before its last

    @property
    def done(self) -> list[dict[str, Any]]:
        """Trials that finished."""
        return [row for row in self.trials if row.get("status") == "done"]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Trials that did not."""
        return [row for row in self.trials if row.get("status") != "done"]

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


def read_run(run_dir: Path) -> Run:
    """Read what a run folder holds so far.

    Args:
        run_dir: Folder with at least `job.yaml` or `provenance.json`.

    Returns:
        The run. Of repeated lines (a resumed run repeats epochs) the last one counts.

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
        job = yaml.safe_load(job_text) or {}
    except yaml.YAMLError as err:
        raise RaydeepError(f"{job_path}: not readable as YAML: {err}") from None
    if not isinstance(job, dict):
        raise RaydeepError(f"{job_path}: expected a mapping of sections, found {type(job).__name__}")
    skipped: dict[str, int] = {}
    metrics = {
        (str(row.get("stage")), int(epoch)): row
        for row in _lines(run_dir / "metrics.jsonl", skipped)
        if (epoch := number(row.get("epoch"))) is not None
    }
    stages = list(dict.fromkeys(stage for stage, _ in metrics))
    trials = {
        int(trial): row
        for row in _lines(run_dir / "ledger.jsonl", skipped)
        if (trial := number(row.get("trial"))) is not None
    }
    return Run(
        job=job,
        job_text=job_text,
        provenance=_object(run_dir / "provenance.json") or {},
        metrics=[metrics[key] for key in sorted(metrics, key=lambda key: (stages.index(key[0]), key[1]))],
        trials=[trials[key] for key in sorted(trials)],
        front=_object(run_dir / "front.json"),
        evaluation=_object(run_dir / "evaluation.json"),
        skipped=skipped,
    )


def _object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError as err:
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
        except ValueError:
            value = None
        if isinstance(value, dict):
            rows.append(value)
        else:
            bad.append(index)
    if unexpected := [index for index in bad if index != len(lines) - 1]:
        skipped[path.name] = len(unexpected)
    return rows
