"""What a search logs to TensorBoard and MLflow, read back with their own readers; going on; failing quietly."""

from __future__ import annotations

import importlib.util
import os
import struct
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from raydeep.errors import RaydeepError
from raydeep.search import track, track_mlflow, track_tensorboard

PARAMS = {"seed": 0, "search": {"trials": 3, "objectives": ["accuracy", "bytes"], "minutes": None}}


def rung(trial: int, rung: int, accuracy: float, size: int, hypervolume: float, **more: Any) -> dict[str, Any]:
    return {
        "trial": trial, "event": "rung", "rung": rung, "epochs": 3 * rung,
        "config": {"prune.sparsity": 0.5 + trial / 10, "quantize.weight_bits": None, "distill.enabled": True},
        "seed": 100 + trial, "val_accuracy": accuracy, "worst_class_accuracy": accuracy - 0.1, "bytes": size,
        "macs": 1000, "compression_ratio": 10.0, "sparsity": 0.5, "seconds": 1.0, "cpu_seconds": 0.9, "at": 1.0,
        "hypervolume": hypervolume, "artifact_sha256": "00", **more,
    }  # fmt: skip


def end(last: dict[str, Any], stopped: str) -> dict[str, Any]:
    return {**last, "event": "end", "status": "done", "stopped": stopped, "error": None}


FIRST, SECOND, THIRD = rung(0, 0, 0.9, 5000, 1.0), rung(1, 0, 0.8, 4000, 2.0), rung(0, 1, 0.95, 5100, 3.0)
TRACEBACK = "Traceback (most recent call last):\n  ...\nMemoryError: a trial took 9 GB\n"
FAILED = {"trial": 2, "event": "end", "status": "failed", "stopped": "failed", "error": TRACEBACK}
LINES = [
    FIRST,
    SECOND,
    FAILED,  # before its first rung
    THIRD,
    end(SECOND, "not promoted from rung 0"),
    end(THIRD, "trained in full"),
]
POINTS: dict[str, list[tuple[int, float]]] = {  # series → (trials begun, value) at each point
    "hypervolume": [(1, 1), (2, 2), (3, 2), (3, 3)],
    "best_accuracy": [(1, 0.9), (2, 0.9), (3, 0.9), (3, 0.95)],
    "smallest_bytes": [(1, 5000), (2, 4000), (3, 4000), (3, 4000)],
    "front_models": [(1, 1), (2, 2), (3, 2), (3, 2)],
}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An SQLite store with MLflow's tables, which take it two seconds."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        track_mlflow._store(folder, "another job")
    return (folder / "mlflow.db").read_bytes()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, its name such that paths need quoting."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "our runs #1 50%" / "tiny-0101-000000-abcd"
    path.mkdir(parents=True)
    return path


def start(name: str, run: Path, old: list[dict[str, Any]]) -> track.Tracker:
    (tracker,) = track.trackers([name], run, "tiny", PARAMS, old)
    return tracker


def log(tracker: track.Tracker, lines: list[dict[str, Any]], status: str = "finished") -> None:
    for line in lines:
        tracker.row(line)
    tracker.close(status)


# progress


def test_a_point_at_each_new_trial_and_each_change():
    progress = track.Progress(track.by_accuracy_and_bytes)
    found = [progress.add(line) for line in LINES]
    assert [value and value["hypervolume"] for value in found] == [1, 2, 2, 3, None, None]


def test_a_search_says_what_its_front_is():
    progress = track.Progress(lambda rows: range(len(rows)))
    assert [(progress.add(line) or {}).get("front_models") for line in LINES[:2]] == [1, 2]


def test_before_anything_is_measured_there_is_no_point():
    assert track.Progress(track.by_accuracy_and_bytes).add(FAILED) is None


def test_only_finite_numbers_count():
    assert track.numbers({"a": 1, "b": True, "c": None, "d": float("nan"), "e": "1", "f": 0.5}) == {"a": 1, "f": 0.5}


# packages


@pytest.mark.parametrize(
    ("name", "mend"),
    [("mlflow", r"pip install 'raydeep\[mlflow\]'"), ("tensorboard", r"pip install 'ray\[tune\]'")],
)
def test_a_missing_package_is_named_with_its_mend(name, mend, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(RaydeepError, match=rf"search\.track {name} needs: {mend}"):
        track.check([name])


def test_a_folder_that_is_called_like_the_package_is_not_it(tmp_path):
    (tmp_path / "mlflow").mkdir()
    code = (
        "import sys; from raydeep.search import track; sys.path = [p for p in sys.path if 'packages' not in p]\n"
        "try: track.check(['mlflow'])\nexcept track.RaydeepError as err: print(err)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout == "search.track mlflow needs: pip install 'raydeep[mlflow]'\n"


def test_packages_that_are_there_pass_and_are_not_imported():
    code = (
        "import sys; from raydeep.search import track; track.check(['tensorboard', 'mlflow'])\n"
        "print(sorted({'mlflow', 'tensorboardX', 'ray', 'torch'} & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


# TensorBoard


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag → (step, value) in a folder's event files: with TensorBoard's reader, or tensorboardX's messages."""
    if importlib.util.find_spec("tensorboard"):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        reader.Reload()
        return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        with path.open("rb") as file:
            while header := file.read(12):
                assert masked_crc32c(header[:8]) == struct.unpack("<I", header[8:])[0]
                data = file.read(struct.unpack("<Q", header[:8])[0])
                assert masked_crc32c(data) == struct.unpack("<I", file.read(4))[0]
                event = Event.FromString(data)
                for value in event.summary.value:
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def approx(series: dict[str, list[tuple[int, float]]]) -> dict[str, list[Any]]:
    return {tag: [pytest.approx(point) for point in points] for tag, points in series.items()}


def check_tensorboard(run: Path) -> None:
    folder = run / "tensorboard"
    assert scalars(folder) == approx(POINTS)
    assert scalars(folder / "trials" / "t000") == approx(
        {"accuracy": [(0, 0.9), (3, 0.95)], "bytes": [(0, 5000), (3, 5100)]}
    )
    assert scalars(folder / "trials" / "t001") == approx({"accuracy": [(0, 0.8)], "bytes": [(0, 4000)]})
    assert sorted(path.name for path in (folder / "trials").iterdir()) == ["t000", "t001"]


def test_tensorboard_has_the_search_and_its_trials(run):
    tracker = start("tensorboard", run, [])
    log(tracker, LINES)
    check_tensorboard(run)


@pytest.mark.parametrize("logged", range(len(LINES)))
@pytest.mark.parametrize("ahead", [0, 1])
def test_tensorboard_goes_on_without_repeating(run, logged, ahead):
    """Killed after so many lines; the ledger may be a line ahead."""
    tracker = start("tensorboard", run, [])
    for line in LINES[:logged]:
        tracker.row(line)
    log(start("tensorboard", run, LINES[: logged + ahead]), LINES[logged + ahead :])
    check_tensorboard(run)


def test_tensorboard_goes_on_after_a_file_that_was_cut_off(run):
    tracker = start("tensorboard", run, [])
    for line in LINES[:3]:
        tracker.row(line)
    (file,) = (run / "tensorboard").glob("events*")
    file.write_bytes(file.read_bytes()[:-5])
    assert track_tensorboard._events(run / "tensorboard") == 2
    log(start("tensorboard", run, LINES[:3]), LINES[3:])
    assert track_tensorboard._events(run / "tensorboard") == 4


# MLflow


@pytest.fixture
def store(run: Path, empty_store: bytes) -> Path:
    """The run folder, beside an empty store."""
    (run.parent / "mlflow.db").write_bytes(empty_store)
    return run


def everything(client: Any) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name("tiny").experiment_id]))


def read(run: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A client, the search's run, and its trials' runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parent}/mlflow.db")
    found = everything(client)
    (parent,) = (r for r in found if r.data.tags.get("raydeep.run") == run.name)
    nested = [r for r in found if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(found) == len(nested) + 1
    return client, parent, {r.info.run_name: r for r in nested}


def history(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))


def check_mlflow(run: Path) -> None:
    client, parent, trials = read(run)
    assert {name: history(client, parent, name) for name in POINTS} == {k: sorted(v) for k, v in POINTS.items()}
    assert parent.data.params == {
        "seed": "0", "search.trials": "3", "search.objectives": '["accuracy", "bytes"]', "search.minutes": "none",
    }  # fmt: skip
    assert sorted(trials) == ["t000", "t001", "t002"]
    assert history(client, trials["t000"], "val_accuracy") == [(0, 0.9), (3, 0.95)]
    assert history(client, trials["t000"], "bytes") == [(0, 5000), (3, 5100)]
    assert history(client, trials["t001"], "val_accuracy") == [(0, 0.8)]
    assert trials["t000"].data.params == {
        "prune.sparsity": "0.5", "quantize.weight_bits": "none", "distill.enabled": "true", "seed": "100",
    }  # fmt: skip
    assert trials["t000"].data.metrics.keys() == {
        "val_accuracy", "worst_class_accuracy", "bytes", "macs", "compression_ratio", "sparsity", "seconds",
        "cpu_seconds", "rung",
    }  # fmt: skip
    assert [trials[f"t{i:03d}"].info.status for i in range(3)] == ["FINISHED", "FINISHED", "FAILED"]
    assert trials["t001"].data.tags["raydeep.stopped"] == "not promoted from rung 0"
    assert trials["t002"].data.tags["raydeep.error"] == "MemoryError: a trial took 9 GB"
    assert trials["t002"].data.params == trials["t002"].data.metrics == {}
    assert parent.info.status == "FINISHED"


def test_mlflow_has_the_search_and_its_trials_within(store):
    log(start("mlflow", store, []), LINES)
    check_mlflow(store)
    assert sorted(path.name for path in store.parent.iterdir()) == ["mlflow.db", store.name]


@pytest.mark.parametrize(("logged", "ahead"), [(0, 1), (1, 0), (2, 1), (3, 1), (4, 0), (4, 1), (6, 0)])
def test_mlflow_goes_on_without_repeating(store, logged, ahead):
    """Killed after so many lines; the ledger may be a line ahead."""
    tracker = start("mlflow", store, [])
    for line in LINES[:logged]:
        tracker.row(line)
    log(start("mlflow", store, LINES[: logged + ahead]), LINES[logged + ahead :])
    check_mlflow(store)


def test_mlflow_takes_a_stopped_search_up_again(store):
    log(start("mlflow", store, []), LINES[:3], "stopped")
    _, parent, trials = read(store)
    assert {parent.info.status, trials["t000"].info.status} == {"KILLED"}
    failed_at = trials["t002"].info.end_time
    tracker = start("mlflow", store, LINES[:3])
    _, parent, trials = read(store)
    assert {parent.info.status, trials["t000"].info.status} == {"RUNNING"}
    assert (trials["t002"].info.status, trials["t002"].info.end_time) == ("FAILED", failed_at)
    log(tracker, LINES[3:])
    check_mlflow(store)


def test_mlflow_keeps_what_a_population_changes_as_metrics(store):
    config = {"train.lr": 0.1, "augment.flip": True}
    tracker = start("mlflow", store, [])
    tracker.row(rung(0, 0, 0.9, 5000, 1.0, config=config))
    tracker.row(rung(0, 1, 0.9, 5000, 1.0, config={**config, "train.lr": 0.12}))
    client, _, trials = read(store)
    assert trials["t000"].data.params["train.lr"] == "0.1"
    assert history(client, trials["t000"], "train.lr") == [(3, 0.12)]


def test_mlflow_keeps_the_models_of_the_front(store):
    folders = [store / "models" / label for label in ("dense", "t000")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "model.rdz").write_text(folder.name)
    rows = [
        {"label": folder.name, "val_accuracy": 0.9, "test_accuracy": accuracy, "bytes": 9, "verified": True}
        for folder, accuracy in zip(folders, (0.97, 0.96), strict=True)
    ]
    for old in ([], LINES):  # as a search that was through goes on
        tracker = start("mlflow", store, old)
        tracker.front(rows, folders)
        tracker.close("finished")
    client, parent, _ = read(store)
    found = {k: v for k, v in parent.data.metrics.items() if "." in k}
    assert found == {
        "dense.val_accuracy": 0.9, "dense.test_accuracy": 0.97, "dense.bytes": 9,
        "t000.val_accuracy": 0.9, "t000.test_accuracy": 0.96, "t000.bytes": 9,
    }  # fmt: skip
    assert len(history(client, parent, "t000.test_accuracy")) == 1
    assert [f.path for f in client.list_artifacts(parent.info.run_id, "models")] == ["models/dense", "models/t000"]
    (kept,) = (store.parent / "mlflow-artifacts").rglob("models/t000/model.rdz")
    assert kept.read_text() == "t000"


def test_mlflow_sets_the_runs_of_a_storage_side_by_side(store):
    other = store.with_name("tiny-0102-000000-abcd")
    for run in (store, other):
        log(start("mlflow", run, []), LINES[:1])
    from mlflow import MlflowClient

    found = everything(MlflowClient(f"sqlite:///{store.parent}/mlflow.db"))
    assert {r.data.tags.get("raydeep.run") for r in found} == {store.name, other.name, None}
    assert len(found) == 4


def test_mlflow_says_nothing_on_the_terminal_and_leaves_nothing_where_one_stands(run, tmp_path):
    code = (
        "import logging, sys; from pathlib import Path; from raydeep.search import track\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "(tracker,) = track.trackers(['mlflow'], Path(sys.argv[1]), 'tiny', {}, []); tracker.close('finished')\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled())"
    )
    here = tmp_path / "here"
    here.mkdir()
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(run)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PYTEST")) and k != "CI"}
    said = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=True)
    assert (said.stdout, said.stderr, os.listdir(here)) == ("True\n", "", [])
    assert (run.parent / "mlflow.db").is_file()


# failures


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def row(self, *args: Any) -> None:
        self.calls += 1
        raise OSError(28, "No space left on device")

    front = close = row


def test_a_tracker_that_fails_says_so_once_and_is_off():
    broken = Broken()
    tracker = track.Careful("mlflow", lambda: broken)
    with pytest.warns(RuntimeWarning, match=r"search\.track mlflow is off, the search goes on: OSError: .*No space"):
        tracker.row(FIRST)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.row(SECOND)
        tracker.front([], [])
        tracker.close("finished")
    assert broken.calls == 1


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_store_that_can_not_be_opened_stops_nothing(name, run):
    (run / "tensorboard").write_text("a file")
    (run.parent / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.warns(RuntimeWarning, match=f"search.track {name} is off"):
        tracker = start(name, run, [])
    log(tracker, LINES)


def test_a_full_disk_turns_tensorboard_off(run):
    tracker = start("tensorboard", run, [])
    assert isinstance(tracker, track.Careful)
    assert isinstance(tracker.tracker, track_tensorboard.TensorBoard)
    records = tracker.tracker.writer._py_recordio_writer
    records._writer = Path("/dev/full").open("wb")  # noqa: SIM115
    with pytest.warns(RuntimeWarning, match="tensorboard is off.*No space left"):
        tracker.row(FIRST)
    log(tracker, LINES[1:])


class Gone(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        pass


def test_a_server_that_fails_turns_mlflow_off(run, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with HTTPServer(("127.0.0.1", 0), Gone) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        try:
            with pytest.warns(RuntimeWarning, match="mlflow is off"):
                tracker = start("mlflow", run, [])
        finally:
            server.shutdown()
            thread.join()
    log(tracker, LINES)
    assert not (run.parent / "mlflow.db").exists()
