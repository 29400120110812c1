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
import json
import logging
import math
import os
import struct
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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


NEEDS = {"tensorboard": ("tensorboardX", "ray[tune]"), "mlflow": ("mlflow", "raydeep[mlflow]")}  # module, what has it


def check(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing, before anything starts.

    Raises:
        RaydeepError: with the command that installs it.
    """
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
) -> list[Tracker]:
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


# TensorBoard


class TensorBoard(Tracker):
    """Event files in the run's `tensorboard/`: the search there, accuracy and bytes over epochs in `trials/tNNN/`.

    Written through tensorboardX's EventsWriter, not its SummaryWriter: that writes from a thread, which a full disk
    kills unseen, and then blocks the search as its queue fills up. Each line is on the disk when `row` returns.
    """

    def __init__(self, run: Path, old: Sequence[Row], front: Front) -> None:
        self.folder = run / "tensorboard"
        self.progress = Progress(front)
        trials = {row["trial"] for row in old}
        self.skip = {folder: _events(folder) for folder in (self.folder, *map(self._trial, trials))}
        self.writer = _writer(self.folder)
        for row in old:
            self.row(row)
        self.skip = {}

    def _trial(self, trial: int) -> Path:
        return self.folder / "trials" / f"t{trial:03d}"

    def _due(self, folder: Path) -> bool:
        """Whether the next event of a folder is not there yet."""
        self.skip[folder] = self.skip.get(folder, 0) - 1
        return self.skip[folder] < 0

    def row(self, row: Row) -> None:
        values = self.progress.add(row)
        if values and self._due(self.folder):
            self.writer.write_event(_event(len(self.progress.trials), values))
            self.writer.flush()
        folder = self._trial(row["trial"])
        if row["event"] == "rung" and "val_accuracy" in numbers(row) and self._due(folder):
            writer = _writer(folder)  # a file a rung, so that a thousand paused trials hold no file open
            writer.write_event(_event(row["epochs"], {"accuracy": row["val_accuracy"], "bytes": row["bytes"]}))
            writer.close()

    def front(self, rows: list[Row], folders: list[Path]) -> None:
        """Nothing: the front is among the trials."""

    def close(self, status: str) -> None:
        self.writer.close()


def _writer(folder: Path) -> Any:
    from tensorboardX.event_file_writer import EventsWriter

    folder.mkdir(parents=True, exist_ok=True)
    return EventsWriter(str(folder / "events"), f".{time.time_ns()}")  # without it, a second's files share a name


def _event(step: int, values: Mapping[str, float]) -> Any:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    return Event(wall_time=time.time(), step=step, summary=summary)


def _events(folder: Path) -> int:
    """How many events with values a folder's files hold whole (TFRecord: length, its CRC, data, its CRC)."""
    from tensorboardX.proto.event_pb2 import Event

    count = 0
    for path in folder.glob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            if at + 16 + size > len(data):
                break  # cut off by a kill
            count += bool(Event.FromString(data[at + 12 : at + 12 + size]).summary.value)
            at += 16 + size
    return count


# MLflow

ENVIRONMENT = {  # unless the user set them
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # a server that is gone holds a search up for seconds, not four minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
NOT_METRICS = {"trial", "seed", "epochs", "at", "hypervolume"}
OF_MODELS = ("val_accuracy", "test_accuracy", "bytes")
PARENT_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
TRIAL_STATUS = {"done": "FINISHED", "failed": "FAILED"}
MOST_PARAMS = 100  # in one request


class MLflow(Tracker):
    """One run for the search (tag `raydeep.run`), within it one a trial (tag `raydeep.trial`); found by these again.

    In `mlflow.db` and `mlflow-artifacts/` beside the run folders, so that runs of a storage are compared, or in
    what MLFLOW_TRACKING_URI names.
    """

    def __init__(self, run: Path, job_name: str, params: dict[str, Any], old: Sequence[Row], front: Front) -> None:
        self.client, self.experiment = _store(run.resolve().parent, job_name)
        self.progress = Progress(front)
        self.clock_ms = 0
        self.parent = self._parent(run.name, params)
        self.skip = len(self.client.get_metric_history(self.parent, "trials"))
        self.runs: dict[int, str] = {}  # trial → run
        self.configs: dict[int, dict[str, Any]] = {}  # trial → its parameters, as it began
        self.open: set[int] = set()  # trials whose run has not ended
        self.rungs: dict[int, float] = {}  # trial → last rung that is in the store
        for found in self._search(f"tags.`mlflow.parentRunId` = '{self.parent}'"):
            trial = int(found.data.tags["raydeep.trial"])
            self.runs[trial] = found.info.run_id
            self.rungs[trial] = found.data.metrics.get("rung", -1)
            if found.info.status not in TRIAL_STATUS.values():
                self.open.add(trial)
                self.client.update_run(found.info.run_id, status="RUNNING")  # a stopped search goes on
        for row in old:
            self._trial(row, seen=True)
            self._point(row)
        self.skip = 0

    def _search(self, where: str) -> Iterator[Any]:
        token = None
        while token != "":
            page = self.client.search_runs([self.experiment], where, page_token=token)
            yield from page
            token = page.token or ""

    def _parent(self, run_id: str, params: dict[str, Any]) -> str:
        found = next(self._search(f"tags.`raydeep.run` = '{run_id}'"), None)
        if found is None:
            found = self.client.create_run(self.experiment, tags={"raydeep.run": run_id}, run_name=run_id)
        else:
            self.client.update_run(found.info.run_id, status="RUNNING")
        if not found.data.params:  # MLflow refuses to change them
            self._params(found.info.run_id, dict(_dotted(params)))
        return str(found.info.run_id)

    def _params(self, run_id: str, values: dict[str, Any]) -> None:
        from mlflow.entities import Param

        found = [Param(key, _word(value)) for key, value in values.items()]
        for i in range(0, len(found), MOST_PARAMS):
            self.client.log_batch(run_id, params=found[i : i + MOST_PARAMS])

    def _metrics(self, run_id: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        self.clock_ms = max(int(time.time() * 1000), self.clock_ms + 1)  # MLflow drops equal values of equal times
        self.client.log_batch(run_id, [Metric(k, float(v), self.clock_ms, step) for k, v in values.items()])

    def row(self, row: Row) -> None:
        self._trial(row, seen=False)
        self._point(row)

    def _point(self, row: Row) -> None:
        values = self.progress.add(row)
        if values:
            self.skip -= 1
            if self.skip < 0:
                trials = len(self.progress.trials)
                self._metrics(self.parent, {"trials": trials, **values}, trials)

    def _trial(self, row: Row, seen: bool) -> None:
        """Log a line to its trial's run; with `seen`, unless it is there."""
        trial = row["trial"]
        if trial not in self.runs:
            tags = {"mlflow.parentRunId": self.parent, "raydeep.trial": str(trial)}
            self.runs[trial] = self.client.create_run(self.experiment, None, tags, f"t{trial:03d}").info.run_id
            self.open.add(trial)
        is_there = seen and row.get("rung", -1) <= self.rungs.get(trial, -1)
        if row["event"] == "rung":
            self._rung(row, is_there)
        elif trial in self.open:
            self._end(row)

    def _rung(self, row: Row, is_there: bool) -> None:
        trial = row["trial"]
        config = {**row["config"], "seed": row["seed"]}
        first = self.configs.setdefault(trial, config)
        if is_there:
            return
        if first is config:
            self._params(self.runs[trial], config)
        moved = numbers({k: v for k, v in config.items() if v != first.get(k)})  # population-based training
        measured = {k: v for k, v in numbers(row).items() if k not in NOT_METRICS}
        self._metrics(self.runs[trial], {**moved, **measured}, row["epochs"])

    def _end(self, row: Row) -> None:
        run_id = self.runs[row["trial"]]
        if row.get("stopped"):
            self.client.set_tag(run_id, "raydeep.stopped", row["stopped"])
        if row.get("error"):
            self.client.set_tag(run_id, "raydeep.error", row["error"].strip().splitlines()[-1][:500])
        self.client.set_terminated(run_id, TRIAL_STATUS[row["status"]])
        self.open.discard(row["trial"])

    def front(self, rows: list[Row], folders: list[Path]) -> None:
        there = self.client.get_run(self.parent).data.metrics
        for row, folder in zip(rows, folders, strict=True):
            label = folder.name
            self.client.log_artifacts(self.parent, str(folder), f"models/{label}")
            found = {f"{label}.{k}": v for k, v in numbers(row).items() if k in OF_MODELS}
            self._metrics(self.parent, {k: v for k, v in found.items() if there.get(k) != v}, len(self.progress.trials))

    def close(self, status: str) -> None:
        for trial in sorted(self.open):
            self.client.set_terminated(self.runs[trial], "KILLED")
        self.client.set_terminated(self.parent, PARENT_STATUS[status])


def _store(beside: Path, name: str) -> tuple[Any, str]:
    """A client, and the experiment's id in its store."""
    for key, value in ENVIRONMENT.items():  # MLflow reads some of them as it is imported
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)  # tells of its tables
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri and "?" in str(beside):
        raise RaydeepError(f"{beside}: SQLite can't be below a folder with ? in its name; set storage")
    client = MlflowClient(uri or f"sqlite:///{beside / 'mlflow.db'}")
    found = client.get_experiment_by_name(name)
    if found is not None:
        return client, found.experiment_id
    location = None if uri else (beside / "mlflow-artifacts").as_uri()
    return client, client.create_experiment(name, artifact_location=location)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _word(value: Any) -> str:
    """As a job file says it."""
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value, default=str)
