"""A search in an MLflow store; see track.py for what the values mean."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from raydeep.errors import RaydeepError
from raydeep.search.track import Front, Progress, Row, Tracker, numbers

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
