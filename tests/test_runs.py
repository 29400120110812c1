"""raydeep runs and raydeep show, over run folders made by hand. No cluster, no torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runfolders import FACTS, TRIALS, dump, ledger, make_run, put
from typer.testing import CliRunner

from raydeep import lock, mirror, remote
from raydeep.cli import app
from raydeep.config import Job
from raydeep.errors import RaydeepError
from raydeep.ops import runs, show
from raydeep.report import words
from raydeep.report.folder import read_run
from raydeep.run import Run

HOLD = """import sys, time, pathlib
from raydeep import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print(1, flush=True)
    time.sleep(60)
"""


@contextmanager
def another_process(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Holds the lock of a run, until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def begun(run: Path, minute: int, **facts: object) -> Path:
    """A run that began at this minute of an hour, in its provenance."""
    provenance = json.loads((run / "provenance.json").read_text())
    dump(run / "provenance.json", provenance | {"created": f"2026-01-02T03:{minute:02d}:00+0000"} | facts)
    return run


NOW = 1_767_323_100.0 + 3600  # an hour after 2026-01-02T03:05:00Z


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in every state. Read only: the tests share them."""
    folder = tmp_path_factory.mktemp("storage")
    begun(make_run(folder / "search"), 1)
    begun(make_run(folder / "train", search=False), 2, command="raydeep train job.yaml")
    half = begun(make_run(folder / "half"), 3)
    for name in ("front.json", "evaluation.json"):
        (half / name).unlink()
    put(half, [row for row in ledger(half) if row.get("trial", 0) < 20 + (row.get("event") == "rung")])  # 20 goes on
    (half / "ledger.jsonl").open("a").write('{"trial": 21, "eve')  # torn by a kill
    failed = make_run(folder / "failed", search=False)
    ended = {"status": "failed", "error": "loss is NaN"}
    begun(failed, 4, command="raydeep train job.yaml", ended=ended)
    (failed / "front.json").unlink()
    begun(make_run(folder / "damaged"), 5)
    (folder / "damaged" / "front.json").write_text('{"dense": ')
    once = begun(make_run(folder / "once"), 6, command="raydeep compress job.yaml")
    (once / "job.yaml").write_text("name: one\nsearch: {trials: 1, space: {}}\n")
    (folder / "datasets" / "digits").mkdir(parents=True)
    (folder / "notes.txt").write_text("no run")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "job.yaml").write_text("name: hidden\n")
    return folder


def row(storage: Path, name: str) -> runs.Row:
    return next(row for row in runs.listing(storage, NOW) if row.name == name)


def test_runs_stand_newest_first_and_other_folders_are_left_out(storage: Path) -> None:
    found = runs.listing(storage, NOW)
    assert [row.name for row in found] == ["once", "damaged", "failed", "half", "train", "search"]
    assert [row.kind for row in found] == ["compress", None, "train", "search", "train", "search"]
    assert [row.status for row in found] == ["finished", "damaged", "failed", "stopped", "finished", "finished"]
    assert [round(row.age_s or 0) for row in found if row.status != "damaged"] == [3540, 3660, 3720, 3780, 3840]


def test_a_row_says_what_came_of_a_run(storage: Path) -> None:
    found, front = row(storage, "search"), json.loads((storage / "search" / "front.json").read_text())
    assert (found.test_accuracy, found.val_accuracy) == (0.9861, 0.9889)
    assert (found.trials, found.trials_of, found.trials_failed) == (TRIALS, 60, 2)
    smallest = min(front["models"], key=lambda model: model["bytes"])
    assert (found.smallest, found.smallest_bytes) == (smallest["label"], smallest["bytes"])
    assert found.smallest_test_accuracy == smallest["test_accuracy"]
    assert show.cells(found)[6] == f"{smallest['test_accuracy']:.2%} at {words.size(smallest['bytes'])}"
    close = [model for model in front["models"] if model["val_accuracy"] >= 0.9889 - 0.01]
    answer = min(close, key=lambda model: model["bytes"])
    assert (found.answer, found.answer_bytes) == (answer["label"], answer["bytes"])
    assert found.answer_test_accuracy == answer["test_accuracy"]
    half = row(storage, "half")
    assert (half.trials, half.trials_failed, half.answer, half.smallest) == (20, 1, None, None)
    assert half.test_accuracy is None
    assert half.val_accuracy == pytest.approx(0.985, abs=0.01)  # after the last epoch
    training = row(storage, "failed")
    assert (training.epochs, training.epochs_of, training.detail) == (40, 40, "loss is NaN")
    assert training.trials is None


def test_a_model_that_is_not_verified_is_no_answer(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    front = json.loads((run / "front.json").read_text())
    smallest = min(front["models"], key=lambda model: model["bytes"])
    smallest["verified"] = False
    dump(run / "front.json", front)
    assert row(tmp_path, "run").smallest != smallest["label"]
    dump(run / "front.json", front | {"unverified": [{"label": "t099"}]})
    assert (row(tmp_path, "run").status, row(tmp_path, "run").detail) == ("finished", "left out, not verified: t099")
    dump(run / "front.json", front | {"unverified": [{"label": "dense"}]})
    assert row(tmp_path, "run").status == "failed"


def test_the_answer_is_that_of_the_report(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    smallest = row(tmp_path, "run").answer
    front = json.loads((run / "front.json").read_text())
    for model in front["models"]:
        model["latency_ms"] = 0.1 if model["label"] == smallest else 0.01 * (1 + model["bytes"] / 1e6)
    dump(run / "front.json", front)
    put(run, [FACTS | {"objectives": {"accuracy": "max", "latency": "min"}}, *ledger(run)[1:]])
    found, fastest = row(tmp_path, "run").answer, words.pick(read_run(run))
    assert fastest is not None
    assert (found, found != smallest) == (fastest["label"], True)
    (run / "ledger.jsonl").unlink()
    (run / "job.yaml").write_text("search: {objectives: {accuracy: max, latency: min}}\n")
    assert row(tmp_path, "run").answer == found


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("job.yaml", "name: [", "job.yaml: not readable as YAML"),
        ("job.yaml", "- 1\n", "job.yaml: expected a mapping of sections, found list"),
        ("job.yaml", "\0", "job.yaml: not readable as YAML"),
        ("job.yaml", "name: \xff", "job.yaml: not readable as YAML"),  # no UTF-8: the report is not so strict
        ("provenance.json", "", "provenance.json: not readable as JSON"),
        ("provenance.json", "[]", "provenance.json: expected a JSON object, found list"),
        ("evaluation.json", "{", "evaluation.json: not readable as JSON"),
    ],
)
def test_a_damaged_run_is_a_row_that_says_so(tmp_path: Path, name: str, text: str, said: str) -> None:
    make_run(tmp_path / "good")
    (make_run(tmp_path / "bad") / name).write_text(text, encoding="latin-1")
    found = row(tmp_path, "bad")
    assert found.status == "damaged"
    assert found.detail.startswith(said)
    assert row(tmp_path, "good").status == "finished"
    with pytest.raises(RaydeepError, match=re.escape(name)):
        show.facts(tmp_path / "bad", NOW)


@pytest.mark.parametrize("value", [None, 3, "x", [1], {"a": "b"}, [None], [{"label": 1, "bytes": "x"}]])
def test_values_of_another_kind_are_left_out(tmp_path: Path, value: object) -> None:
    run = make_run(tmp_path / "run")
    dump(run / "front.json", {"dense": value, "models": value, "unverified": value, "best": value})
    dump(run / "provenance.json", {"command": value, "created": value, "dataset": value, "ended": value})
    dump(run / "evaluation.json", {"accuracy": value})
    (run / "job.yaml").write_text(json.dumps({"name": value, "search": value, "train": value}))
    (run / "metrics.jsonl").write_text(json.dumps({"epoch": value, "epochs": value}) + "\n" + json.dumps(value))
    put(run, [FACTS, {"trial": value, "event": value, "status": value}])
    found = row(tmp_path, "run")
    assert (found.kind, found.answer, found.smallest) == ("search", None, None)
    assert len(show.cells(found)) == len(show.COLUMNS)


# who works on it


def test_a_run_is_running_while_a_process_holds_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "front.json").unlink()
    assert lock.holder(run) is None
    with another_process(run) as process:
        found = row(tmp_path, "run")
        assert (found.status, found.detail) == ("running", f"process {process.pid}")
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet taken leave of
        assert row(tmp_path, "run").status == "stopped"
        assert lock.holder(run) == (lock.socket.gethostname(), process.pid, False)
    with lock.held(run):
        assert row(tmp_path, "run").detail == f"process {os.getpid()}"
    assert lock.holder(run) is None


def test_looking_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    (run / lock.LOCK).touch()

    def tried(*arguments: object) -> None:
        raise AssertionError("a lock was tried")

    monkeypatch.setattr(lock.fcntl, "flock", tried)
    before = (run / lock.LOCK).stat().st_mtime_ns
    assert row(tmp_path, "run").status == "finished"
    assert (run / lock.LOCK).stat().st_mtime_ns == before


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path: Path) -> None:
    dump(tmp_path / lock.LOCK, {"host": lock.socket.gethostname(), "pid": os.getpid(), "began": "1"})
    assert lock.holder(tmp_path) == (lock.socket.gethostname(), os.getpid(), False)
    dump(tmp_path / lock.LOCK, {"host": "other", "pid": 7, "began": "1"})
    assert lock.holder(tmp_path) == ("other", 7, None)
    for text in ("", "{", "[]", '{"host": "a"}'):
        (tmp_path / lock.LOCK).write_text(text)
        assert lock.holder(tmp_path) is None


def test_a_run_held_on_another_machine_is_unknown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "front.json").unlink()
    dump(run / lock.LOCK, {"host": "node7", "pid": 7, "began": "1"})
    found = row(tmp_path, "run")
    assert (found.status, found.detail) == ("unknown", "process 7 of node7 works on it, unless it was killed")


def test_how_a_command_ended_is_kept_until_it_goes_on(job: Job) -> None:
    run = Run.create(job, "raydeep train job.yaml")

    def ended(error: BaseException) -> tuple[str, str]:
        with pytest.raises(type(error)), run.working():
            raise error
        found = runs.read(run.path, NOW)
        assert found is not None
        return found.status, found.detail

    assert ended(RaydeepError("loss is NaN\nat step 3")) == ("failed", "loss is NaN")
    assert ended(KeyboardInterrupt()) == ("stopped", "")
    assert ended(OSError()) == ("failed", "OSError")
    with run.working():
        assert json.loads((run.path / "provenance.json").read_text())["ended"] is None
    with pytest.raises(RaydeepError, match="gone"), run.working():  # noqa: PT012
        shutil.rmtree(run.path)  # as where Ray can't be started
        raise RaydeepError("gone")  # and not that there is no provenance.json


# a bucket


def test_runs_of_a_bucket_are_listed_by_their_small_files(
    bucket: str, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mirror.place(bucket)
    for name in ("one", "two"):
        run = make_run(folder / name)
        (run / "models" / "dense").mkdir(parents=True)
        (run / "models" / "dense" / "model.safetensors").write_bytes(b"x" * 1000)
        (run / "report.html").write_text("large")
        if name == "two":
            (run / "front.json").unlink()
        mirror.push_folder(run)
    (folder / "datasets").mkdir()
    (folder / "datasets" / "part.parquet").write_bytes(b"x")
    mirror.push_folder(folder / "datasets")
    on("b")
    there = mirror.place(bucket)
    assert there != folder
    listing, deep = remote.listing, []
    monkeypatch.setattr(remote, "listing", lambda *asked: deep.append(asked[2]) or listing(*asked))
    found = {row.name: row for row in runs.listing(there, NOW)}
    assert deep == [False] * 3  # a run's checkpoints and a dataset's shards can be thousands
    assert {name: row.status for name, row in found.items()} == {"one": "finished", "two": "unknown"}
    assert found["one"].path == f"{bucket}/one"
    assert sorted(path.name for path in (there / "one").rglob("*") if path.is_file()) == sorted(runs.FILES)
    facts = show.facts(there / "one", NOW)
    assert facts["next"]["label pictures"].startswith(f"raydeep predict {bucket}/one/models/t")
    on("a")
    (folder / "one" / "front.json").write_text("{}")
    with another_process(folder / "one"):  # what a run of this node has written, and not pushed yet, is left alone
        assert row(folder, "one").status == "running"
    assert (folder / "one" / "front.json").read_text() == "{}"


# the commands


def said(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, str(done.exception) if isinstance(done.exception, RaydeepError) else done.output


def test_the_table(storage: Path) -> None:
    code, text = said("runs", str(storage))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert code == 0
    assert lines["run"] == list(show.COLUMNS)
    answer = row(storage, "search")
    assert lines["search"][1:6] == ["search", "finished", "60/60", "trials,", "2"]
    assert f"{answer.answer_test_accuracy:.2%} at" in text
    assert lines["train"][1:6] == ["train", "finished", "40/40", "epochs", "98.61%"]
    assert lines["half"][1:4] == ["search", "stopped", "20/60"]
    assert "failed: loss is NaN" in text
    assert "damaged: front.json: not readable as JSON" in text
    assert f"6 runs in {storage}" in text


def test_the_table_as_json(storage: Path) -> None:
    code, text = said("runs", str(storage), "--json")
    found = json.loads(text)
    assert code == 0
    assert found["storage"] == str(storage)
    assert [row["name"] for row in found["runs"]] == ["once", "damaged", "failed", "half", "train", "search"]
    assert set(found["runs"][0]) == set(runs.Row.__dataclass_fields__)


def test_where_jobs_keep_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert said("runs") == (0, f"no runs in {tmp_path / 'runs'}\n")
    make_run(tmp_path / "runs" / "here")
    make_run(tmp_path / "base" / "runs" / "there")
    assert "here " in said("runs")[1]
    assert runs.find("here") == tmp_path / "runs" / "here"
    monkeypatch.setenv("RAYDEEP_STORAGE", str(tmp_path / "base"))
    assert [line.split()[0] for line in said("runs")[1].splitlines()[1:2]] == ["there"]
    assert runs.find("there") == tmp_path / "base" / "runs" / "there"
    (tmp_path / "base" / "runs" / "there" / "job.yaml").unlink()
    assert runs.find("there") == tmp_path / "base" / "runs" / "there"  # damaged, but there
    assert said("show", "ther")[1].endswith(f"nor a run in {tmp_path / 'base' / 'runs'}; did you mean there?")
    assert "no such folder" in said("runs", str(tmp_path / "none"))[1]


def test_one_screen(storage: Path) -> None:
    code, text = said("show", str(storage / "search"))
    answer = row(storage, "search")
    assert code == 0
    assert text.startswith("search   search   finished   60/60 trials, 2 failed")
    assert f"At {100 * (answer.answer_test_accuracy or 0):.1f}% test accuracy" in text
    front = json.loads((storage / "search" / "front.json").read_text())
    for model in front["models"]:
        assert f"{model['label']} " in text
    assert f"raydeep predict {storage}/search/models/{answer.answer} PICTURES…" in text
    assert f"raydeep export {storage}/search --trial N" in text
    assert "Trials: 60, 2 failed" in text
    text = said("show", str(storage / "half"))[1]
    assert "Not finished: " in text
    assert f"raydeep search --resume {storage}/half" in text
    assert f"raydeep search {storage}/train/job.yaml --from {storage}/train" in said("show", str(storage / "train"))[1]


def test_one_screen_as_json(storage: Path) -> None:
    found = json.loads(said("show", str(storage / "search"), "--json")[1])
    assert (found["status"], found["front"][0]["label"], found["job"]) == ("finished", "dense", "digits")
    assert found["command"] == "raydeep search jobs/digits.yaml"
    assert found["cost"]["Epochs trained"] == "40"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("damaged", "front.json: not readable as JSON"),
        ("datasets", "is not a run folder"),
        ("nothing", "no such run folder"),
    ],
)
def test_what_can_not_be_shown_is_one_error(storage: Path, name: str, expected: str) -> None:
    code, text = said("show", str(storage / name))
    assert code == 1  # of the runner; main() makes 2 of it
    assert expected in text


def test_looking_costs_no_torch_and_no_ray(storage: Path) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from raydeep.cli import app\n"
        "for words in (['runs', sys.argv[1]], ['show', sys.argv[1] + '/search']):\n"
        "    done = CliRunner().invoke(app, words); assert done.exit_code == 0, done.output\n"
        "print(sorted({'torch', 'ray', 'plotly', 'optuna'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(storage)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, ""), (0, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (86_400, "1 day"), (200_000, "2 days")],
)
def test_age(seconds: float | None, said: str) -> None:
    assert show.age(seconds) == said


def test_a_hundred_runs_take_less_than_a_second_of_this_process(tmp_path: Path) -> None:
    first = make_run(tmp_path / "run-0")
    for k in range(1, 100):
        shutil.copytree(first, tmp_path / f"run-{k}")
    began = time.process_time()
    assert len(runs.listing(tmp_path, NOW)) == 100
    assert time.process_time() - began < 1.0


def test_a_size_is_shown_with_its_space():
    from raydeep.errors import shown

    assert shown("78.7\N{NO-BREAK SPACE}kB\x1b[2J\t") == "78.7\N{NO-BREAK SPACE}kB\\x1b[2J\\t"
