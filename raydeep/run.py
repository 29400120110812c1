"""The run folder: its id, its job and where it came from."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from raydeep import lock, mirror
from raydeep.config import Job, differing, load_job
from raydeep.disk import read_json, write_bytes, write_json
from raydeep.errors import JobError, RaydeepError
from raydeep.machine import provenance

HEAVY = {"checkpoints", "models", "ray", "trials", "workers"}
OUTCOME = ("report.html", "front.json")  # of a run that is finished


def fetch_light(path: Path) -> None:
    """Fetch what a run in a bucket is opened by: all but checkpoints, trials and the models that came of them.

    Raises:
        RaydeepError: there is no such run.
    """
    mirror.pull(path, lambda name: name.split("/")[0] not in HEAVY or name.split("/")[1:2] == ["dense"])
    follow_outcome(path)
    if mirror.address(path) is not None and not (path / "job.yaml").is_file():
        raise RaydeepError(f"{mirror.name(path)}: not a run (no job.yaml); give the address that a command printed")


def follow_outcome(path: Path) -> None:
    """Remove what this node has of a run's outcome and its bucket no longer: not while a process here works on it."""
    holder = lock.holder(path)
    if holder is None or not holder.alive:
        mirror.follow(*(path / name for name in OUTCOME))


def storage_folder(job: Job) -> Path:
    """The folder of a job's run folders and datasets, absolute: a relative `storage` lies below RAYDEEP_STORAGE.

    Of a bucket it is the folder that stands for it on this node (mirror.py).

    Raises:
        RaydeepError: it would lie where Ray unpacks a submitted job, which it removes after the job.
    """
    path, here = mirror.place(job.storage), Path.cwd()
    base = os.environ.get("RAYDEEP_STORAGE")
    if base:
        path = mirror.place(base, "RAYDEEP_STORAGE") / path
    if not path.is_absolute() and any(part.startswith("_ray_pkg_") for part in here.parts):
        raise RaydeepError(
            f"storage {job.storage}: below this job's working directory, which Ray removes after the job; set "
            f"storage=/FOLDER to one that all nodes share, or RAYDEEP_STORAGE in the environment of the cluster"
        )
    return mirror.real(path)


def locate(text: str | Path, what: str = "RUN") -> Path:
    """The path that a user means: as it is, or the one that stands for an address.

    One that is not there but begins with the name of a run where jobs keep theirs is below that run.

    Args:
        text: path, address, or name of a run with or without what lies below it: NAME/models/t012.
        what: the option that it stands in, for errors.

    Raises:
        RaydeepError: an address that can't be used, or no path.
    """
    path = mirror.place(text, what)
    if path.is_absolute() or ".." in path.parts or path.exists():
        return path
    with suppress(RaydeepError):  # that it is not there is told by whoever opens it
        run = storage_folder(Job()) / path.parts[0]
        if mirror.exists(run / "job.yaml"):
            return run.joinpath(*path.parts[1:])
    return path


class Run:
    """A run folder. Creating one writes the resolved job and the provenance."""

    def __init__(self, path: Path, job: Job) -> None:
        self.path = path
        self.job = job

    def __repr__(self) -> str:
        return f"Run({self.name!r})"

    @classmethod
    def create(cls, job: Job, command: str | Callable[[str], str], **noted: Any) -> Run:
        """Make `<storage>/<name>-<id>/`.

        Args:
            job: is written there.
            command: what reproduces the run, or makes that of the run's name.
            noted: more facts for its provenance.
        """
        storage = storage_folder(job)
        run_id = f"{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        path = storage / f"{job.name}-{run_id}"
        try:
            path.mkdir(parents=True)
        except OSError as err:
            raise RaydeepError(f"storage: can't make {path}: {err.strerror}; set storage=FOLDER") from None
        run = cls(path, job)
        run._write_job()
        facts = {"id": path.name, "command": command if isinstance(command, str) else command(run.name)}
        write_json(path / "provenance.json", {**facts, **noted, **provenance(job.seed)})
        mirror.push(path / "provenance.json")
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open an existing run: its folder, its address, or its name where jobs keep theirs.

        Raises:
            RaydeepError: if the folder is no run.
        """
        path = mirror.real(locate(path))
        fetch_light(path)
        if not (path / "job.yaml").is_file():
            raise RaydeepError(f"{path}: not a run folder (no job.yaml); give the folder that a command printed")
        return cls(path, load_job(path / "job.yaml"))

    def take(self, job: Job, force: bool = False) -> None:
        """Go on with this job, which must be the run's own; if `force`, it may differ and becomes it.

        Raises:
            JobError: it differs; the keys are named.
        """
        changed = differing(self.job, job)
        if changed and not force:
            raise JobError(
                f"{self.name}: began with another job: {'; '.join(changed)}. Go on with its own (--resume RUN alone), "
                f"start a new run (no --resume), or add --force to go on with the changed job"
            )
        if changed:
            before = read_json(self.path / "provenance.json").get("changed_jobs", [])
            self.unfinish()  # an outcome of the job before would stand beside this one
            self.job = job.model_copy(update={"storage": self.job.storage})
            self._write_job()
            self.note(changed_jobs=[*before, changed])

    def _write_job(self) -> None:
        text = yaml.safe_dump(self.job.model_dump(mode="json"), sort_keys=False)
        write_bytes(self.path / "job.yaml", text.encode())
        mirror.push(self.path / "job.yaml")

    @property
    def name(self) -> str:
        """For people: the folder, or its address."""
        return mirror.name(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes of this machine from working on the run; a killed process frees it.

        Raises:
            RaydeepError: another process works on it.
        """
        with lock.held(self.path) as free:
            if not free:
                found = lock.holder(self.path)
                who = f"process {found.pid} of {found.host}" if found else "another process"
                raise RaydeepError(f"{self.name}: {who} works on this run; wait for it or stop it")
            yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """The same while a command works on the run: `ended` in provenance.json tells how, if not well."""
        with self.locked():
            if read_json(self.path / "provenance.json").get("ended"):
                self.note(ended=None)
            try:
                yield
            except BaseException as err:
                words = (str(err).strip() or type(err).__name__).splitlines()[0][:300]
                stopped = not isinstance(err, Exception)  # Ctrl-C, SIGTERM
                if stopped:
                    err.add_note(self.name)  # what the command line says can be gone on with
                with suppress(RaydeepError, OSError):  # what ends the command is told, not this; the folder may be gone
                    self.note(ended={"status": "stopped"} if stopped else {"status": "failed", "error": words})
                raise

    def unfinish(self) -> None:
        """Work begins again: nobody shall take the old outcome for that of the run, however this ends."""
        mirror.drop(*(self.path / name for name in OUTCOME))

    def save(self) -> None:
        """Bring what this process wrote to the bucket, where the run is kept in one; workers and trials do so too."""
        mirror.push_folder(self.path / "trials" / "dense")
        for folder in sorted((self.path / "models").glob("[!.]*")):
            mirror.push_folder(folder, last="SHA256SUMS")
        mirror.push_folder(self.path, only=lambda name: name.split("/")[0] not in HEAVY)

    def model(self, label: str) -> Path:
        """Folder of one model."""
        return self.path / "models" / label

    @property
    def dense(self) -> dict[str, Any]:
        """The dense model, as front.json has it: label, accuracies, bytes, latency and so on.

        Raises:
            RaydeepError: the run has not come so far.
        """
        return self._front()["dense"]

    @property
    def front(self) -> list[dict[str, Any]]:
        """The verified models of the Pareto front, a row of front.json each, by the objectives; none after train.

        Raises:
            RaydeepError: the run has not come so far.
        """
        return self._front()["models"]

    def _front(self) -> dict[str, Any]:
        if not (self.path / "front.json").is_file():
            raise RaydeepError(f"{self.name}: has no front.json yet; finish it with --resume")
        return read_json(self.path / "front.json")

    def note(self, **facts: Any) -> None:
        """Add facts to provenance.json."""
        file = self.path / "provenance.json"
        write_json(file, {**read_json(file), **facts})
        mirror.push(file)
