"""A run that work begins on again: its old outcome, the dense model that it began with, the commit of its code."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import raydeep
from raydeep import lock, machine, mirror
from raydeep.config import Job
from raydeep.data import stream
from raydeep.data.shards import Manifest
from raydeep.deploy import folder
from raydeep.errors import ModelError, RaydeepError
from raydeep.ops import runs, session
from raydeep.ops.console import Ui
from raydeep.run import OUTCOME, Run
from raydeep.train import cluster


class Killed(BaseException):
    """What a process does not live to see."""


@pytest.fixture
def given(job: Job, digits_manifest: Manifest) -> Job:
    return job.model_copy(update={"data": job.data.model_copy(update={"path": str(digits_manifest.path)})})


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch, digits: Any) -> Callable[[], None]:
    """Sessions open without Ray; after the call, Ray can't be started."""

    @contextmanager
    def started(*arguments: Any) -> Iterator[Any]:
        yield SimpleNamespace(concurrent_trials=1)

    def broken(*arguments: Any) -> Any:
        raise Killed

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "cluster", started)
    monkeypatch.setattr(stream, "load", lambda *arguments: digits)
    monkeypatch.setattr(stream, "share", lambda data: None)
    return lambda: monkeypatch.setattr(cluster, "cluster", broken)


def finished(run: Run) -> None:
    for name in OUTCOME:
        (run.path / name).write_text('{"dense": {"label": "dense"}, "models": [], "answer": "dense"}')


def status(run: Run) -> tuple[str, str]:
    found = runs.read(run.path, 0.0)
    assert found is not None
    return found.status, found.detail


# an outcome that is one no longer


def test_a_failure_after_an_earlier_finish_is_a_failure(given):
    run = Run.create(given, "raydeep train job.yaml")
    finished(run)
    assert status(run) == ("finished", "")
    run.note(ended={"status": "failed", "error": "loss is NaN"})
    assert status(run) == ("failed", "loss is NaN")
    run.note(ended={"status": "stopped"})
    assert status(run) == ("stopped", "")


def test_work_that_begins_again_takes_the_old_outcome_away(given, no_ray):
    run = Run.create(given, "raydeep train job.yaml")
    finished(run)
    with ExitStack() as stack:
        session.open_session(stack, given, run, "raydeep train", Ui())
    assert not any((run.path / name).exists() for name in OUTCOME)
    assert status(run) == ("stopped", "")  # as after SIGKILL: nothing says how it ended
    with pytest.raises(ModelError, match="nor a finished run"):
        folder.find(run.path)
    finished(run)
    no_ray()
    with pytest.raises(Killed), ExitStack() as stack:
        session.open_session(stack, given, run, "raydeep train", Ui())
    assert all((run.path / name).exists() for name in OUTCOME)  # Ray did not start: nothing has changed


def test_other_nodes_see_that_an_outcome_is_gone(job, bucket, on):
    run = Run.create(job.model_copy(update={"storage": bucket}), "raydeep train job.yaml")
    finished(run)
    run.save()
    on("b")
    there = mirror.place(bucket) / run.path.name
    assert runs.read(there, 0.0).status == "finished"
    assert (there / "front.json").exists()
    on("a")
    run.unfinish()
    on("b")
    for look in (runs.fetch, Run.open):
        (there / "front.json").write_text("{}")  # its own copy, of before
        look(there)
        assert not (there / "front.json").exists()
    (there / "front.json").write_text('{"models": []}')  # just written, not pushed yet
    with lock.held(there), pytest.raises(ModelError, match="no such folder"):
        folder.find(there)
    assert (there / "front.json").exists()
    (there / "front.json").write_text('{"answer": "dense"}')
    with pytest.raises(ModelError, match="nor a finished run"):
        folder.find(there)


# --from


def test_a_run_killed_before_it_took_its_dense_model_takes_it_when_it_goes_on(
    given, small_run, tmp_path, no_ray, monkeypatch
):
    start = tmp_path / "start"
    shutil.copytree(small_run, start)
    monkeypatch.chdir(tmp_path)  # a path that is no longer right from elsewhere
    no_ray()
    with pytest.raises(Killed):
        raydeep.search(given, start="start", quiet=True)
    [path] = Path(given.storage).iterdir()
    assert json.loads((path / "provenance.json").read_text())["start"] == str(start)
    monkeypatch.chdir("/")
    taken: list[Path] = []

    def opened(stack: ExitStack, job: Job, run: Run, command: Any, ui: Ui, start: Path) -> None:
        taken.append(start)
        raise Killed

    monkeypatch.setattr(session, "open_session", opened)
    with pytest.raises(Killed):
        raydeep.search(resume=path, quiet=True)
    assert taken == [start]
    with pytest.raises(RaydeepError, match=r"the run of a search; go on with: raydeep search --resume"):
        raydeep.train(resume=path, quiet=True)
    run = Run.open(path)
    shutil.rmtree(start)
    with pytest.raises(ModelError, match=rf"began with --from {start}, whose dense model .* is gone"):
        session.origin(run)
    run.model("dense").mkdir(parents=True)
    (run.model("dense") / "SHA256SUMS").touch()
    assert session.origin(run) is None


# the commit


def test_a_commit_is_that_of_raydeeps_own_repository(tmp_path):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    file = tmp_path / ".venv" / "raydeep" / "machine.py"
    assert machine._git_commit(file) is None  # no such folder
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n")
    assert machine._git_commit(file) is None  # no repository
    git("init", "-q")
    (tmp_path / "theirs.py").write_text("y = 1\n")
    git("add", "theirs.py")
    git("commit", "-qm", "theirs")
    assert machine._git_commit(file) is None  # a repository of others around it
    git("add", ".venv/raydeep/machine.py")
    git("commit", "-qm", "ours")
    (tmp_path / "theirs.py").write_text("y = 2\n")
    (file.parent / "notes.txt").touch()
    assert machine._git_commit(file) == git("rev-parse", "HEAD")
    file.write_text("x = 2\n")
    assert machine._git_commit(file) == git("rev-parse", "HEAD") + "-dirty"
