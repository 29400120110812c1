"""Where a search is logged besides its ledger: TensorBoard files, an MLflow store.

A ledger line, `row`, is a dict with `trial` and `event`: "rung" after each rung of a trial, with what was measured,
"end" once at its end. Over a search, both stores get a point whenever one of its values changes:

    step             trials begun
    hypervolume      of the newest line
    best_accuracy    highest validation accuracy so far
    smallest_bytes   so far
    front_models     trials that no other beats, as each was measured last

Everything follows from the lines in their order. A search that goes on therefore replays its old lines, and logs of
them only what the store lacks: nothing twice, and no gap where the driver was killed between ledger and store.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from raydeep.errors import RaydeepError
from raydeep.search.pareto import non_dominated

Row = dict[str, Any]
Front = Callable[[Sequence[Row]], Sequence[int]]


class Tracker(Protocol):
    """Follows one session of a search."""

    def row(self, row: Row) -> None:
        """Take a new line of the ledger."""

    def front(self, rows: list[Row], folders: list[Path]) -> None:
        """Take what was found in the end: the rows of front.json's models, and their folders in the same order."""

    def close(self, status: str) -> None:
        """Take leave: "finished", "failed" or "stopped"."""


NEEDS = {  # module, what has it
    "tensorboard": ("tensorboardX", "ray[tune]"), "mlflow": ("mlflow", "raydeep[mlflow]"),
    "wandb": ("wandb", "raydeep[wandb]"),
}  # fmt: skip


def check(names: Sequence[str], shared: bool = True) -> None:
    """Refuse trackers whose package or place is missing, before anything starts.

    Args:
        names: of the trackers.
        shared: whether the storage is a folder and no bucket.

    Raises:
        RaydeepError: with the command that installs it.
    """
    if "mlflow" in names and not shared and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise RaydeepError(
            "search.track mlflow: its database can't be kept in a bucket; set MLFLOW_TRACKING_URI to a server, or "
            "storage to a folder"
        )
    for name in names:
        module, package = NEEDS[name]
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:  # no origin: a folder of that name, such as one of runs
            raise RaydeepError(f"search.track {name} needs: pip install '{package}'")


def by_accuracy_and_bytes(rows: Sequence[Row]) -> list[int]:
    """Indices of the rows that no other beats in validation accuracy and bytes."""
    return non_dominated([(-row["val_accuracy"], row["bytes"]) for row in rows])


def trackers(
    names: Sequence[str],
    run: Path,
    job_name: str,
    params: dict[str, Any],
    old: Sequence[Row],
    front: Front = by_accuracy_and_bytes,
) -> list[Careful]:
    """Trackers of a search, in the order of their names.

    None of them stops a search: the first failure, here or later, is told once by `warnings.warn` (a RuntimeWarning),
    and that tracker is off until the search goes on another time.

    Args:
        names: of "tensorboard" and "mlflow"; see `check`.
        run: the run folder; its name is the run's id.
        job_name: MLflow's experiment.
        params: what to log of the job, nested or dotted.
        old: lines that the ledger holds from earlier sessions.
        front: measured rows → indices of those that no other beats, by the search's objectives.
    """
    from raydeep.search.track_mlflow import MLflow
    from raydeep.search.track_tensorboard import TensorBoard

    make: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(run, old, front),
        "mlflow": lambda: MLflow(run, job_name, params, old, front),
    }
    return [Careful(name, make[name]) for name in names]


class Careful(Tracker):
    """A tracker that turns itself off at its first failure."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self.tracker: Tracker | None = self._attempt(make)

    def _attempt(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except Exception as err:  # a full disk, a server that is gone: the ledger has it all the same
            self.tracker = None
            said = (str(err).strip() or repr(err)).splitlines()[0][:300]
            text = f"search.track {self.name} is off, the search goes on: {type(err).__name__}: {said}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def row(self, row: Row) -> None:
        if self.tracker is not None:
            self._attempt(self.tracker.row, row)

    def front(self, rows: list[Row], folders: list[Path]) -> None:
        if self.tracker is not None:
            self._attempt(self.tracker.front, rows, folders)

    def close(self, status: str) -> None:
        if self.tracker is not None:
            self._attempt(self.tracker.close, status)


class Progress:
    """What the lines so far come to."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.trials: set[int] = set()
        self.latest: dict[int, Row] = {}  # trial → its last measured row
        self.values: dict[str, float] = {}

    def add(self, row: Row) -> dict[str, float] | None:
        """The values after this line, if it changed any or is a trial's first; the step is `len(self.trials)`."""
        before = (len(self.trials), self.values)
        self.trials.add(row["trial"])
        if row["event"] == "rung" and {"val_accuracy", "bytes"} <= numbers(row).keys():
            self.latest[row["trial"]] = row
            self.values = {
                **self.values,
                **{k: v for k, v in numbers(row).items() if k == "hypervolume"},
                "best_accuracy": max(row["val_accuracy"], self.values.get("best_accuracy", -math.inf)),
                "smallest_bytes": min(row["bytes"], self.values.get("smallest_bytes", math.inf)),
                "front_models": len(self.front(list(self.latest.values()))),
            }
        return self.values if self.values and (len(self.trials), self.values) != before else None


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row."""
    found = ((k, v) for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool))
    return {k: v for k, v in found if math.isfinite(v)}
