"""The runs of a storage folder: a line each, read from a few small files, so that hundreds take a second or two."""

from __future__ import annotations

import datetime
import difflib
import json
import shlex
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raydeep import lock, mirror, remote
from raydeep.config import Job
from raydeep.disk import parse_lines
from raydeep.errors import RaydeepError
from raydeep.report import words
from raydeep.report.folder import Run, number, objectives_of
from raydeep.run import follow_outcome, locate, storage_folder

FILES = ("job.yaml", "provenance.json", "metrics.jsonl", "ledger.jsonl", "front.json", "evaluation.json")
KINDS = ("train", "compress", "search")
MARKS = ("job.yaml", "provenance.json")  # a folder with one of them is a run
THREADS = 8  # runs of a bucket asked for at once
_Yaml = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of resolved jobs, five times as fast


@dataclass(frozen=True)
class Row:
    """What a run is known by. None: not known, or not yet."""

    name: str
    path: str  # or its address
    job: str | None = None
    kind: str | None = None  # train, compress or search
    status: str = "damaged"  # running, finished, stopped, failed, damaged; unknown: only its own machine knows
    detail: str = ""  # of the status: who works on it, what failed, what is damaged
    created: str | None = None  # ISO 8601
    age_s: float | None = None
    idle_s: float | None = None  # since its files were last written to
    epochs: int | None = None  # trained, of the dense model
    epochs_of: int | None = None
    trials: int | None = None  # ended
    trials_of: int | None = None
    trials_failed: int | None = None
    val_accuracy: float | None = None  # of the dense model, or after the last epoch
    test_accuracy: float | None = None  # of the dense model
    answer: str | None = None  # label of the verified model that answers the run (report.words.pick)
    answer_val_accuracy: float | None = None
    answer_test_accuracy: float | None = None
    answer_bytes: int | None = None
    smallest: str | None = None  # label of the smallest verified model
    smallest_test_accuracy: float | None = None
    smallest_bytes: int | None = None


def storage(text: str | None) -> Path:
    """The folder that runs are listed of: a path, the one that stands for an address, or where jobs keep theirs."""
    return storage_folder(Job()) if text is None else mirror.real(mirror.place(text, "STORAGE"))


def find(text: str) -> Path:
    """The folder of a run: a path, an address, or the name of a run where jobs keep theirs.

    Raises:
        RaydeepError: there is none; similar names are told.
    """
    path = mirror.real(locate(text))
    if mirror.address(path) is not None or path.exists():
        return path
    try:
        known = storage_folder(Job())
        names = mirror.folders(known) if mirror.address(known) is not None or known.is_dir() else []
    except RaydeepError:
        known, names = path.parent, []
    if text in names:  # damaged: no job.yaml
        return known / text
    near = difflib.get_close_matches(text, names, 1, 0.5)
    meant = f"; did you mean {near[0]}?" if near else "; raydeep runs lists those that are there"
    raise RaydeepError(f"{text}: no such run folder, nor a run in {mirror.name(known)}{meant}")


def listing(folder: Path, now: float) -> list[Row]:
    """A row for each run in a storage folder, newest first; other folders in it are left out.

    Args:
        folder: storage.
        now: time, seconds since 1970.

    Raises:
        RaydeepError: there is no such folder, or its bucket can't be read.
    """
    bucket = mirror.address(folder) is not None
    if not bucket and not folder.is_dir():
        raise RaydeepError(f"{folder}: no such folder; give the storage of your jobs: raydeep runs FOLDER")
    try:
        paths = [folder / name for name in mirror.folders(folder) if name[0] != "."]
    except OSError as err:
        raise RaydeepError(f"{folder}: can't be read: {err.strerror}") from None
    with ThreadPoolExecutor(THREADS if bucket else 1) as pool:
        rows = [row for row in pool.map(lambda path: read(path, now), paths) if row is not None]
    return sorted(rows, key=lambda row: (row.age_s is None, row.age_s or 0.0, row.name))


def fetch(path: Path) -> None:
    """Bring the files that a run is known by to this node, from a bucket: not those of a run that goes on here."""
    holder = lock.holder(path)
    if holder is None or not holder.alive:
        mirror.pull(path, lambda name: name in FILES, deep=False)
        follow_outcome(path)


def read(path: Path, now: float) -> Row | None:
    """The row of a run folder; None: it is no run. What can't be read makes a damaged run, not an error."""
    fetch(path)
    try:
        if not any((path / name).is_file() for name in MARKS):
            return None
        return _row(path, now)
    except (RaydeepError, OSError) as err:
        created = None
        with suppress(RaydeepError, OSError):
            created = _object(path / "provenance.json").get("created")
        why = " ".join(str(err).split())[:300]
        return Row(path.name, mirror.name(path), detail=why, created=_text(created), age_s=_age(path, created, now))


def _row(path: Path, now: float) -> Row:
    job, provenance = _job(path / "job.yaml"), _object(path / "provenance.json")
    front, evaluation = _object(path / "front.json"), _object(path / "evaluation.json")
    ledger, metrics = _lines(path / "ledger.jsonl"), _lines(path / "metrics.jsonl")
    for name in ("models", "unverified"):
        front |= {name: found if isinstance(found := front.get(name), list) else []} if front else {}
    asked = next((row for row in ledger if "trial" not in row), job.get("search"))
    run = Run(job=job, job_text="", provenance=provenance, front=front or None, objectives=objectives_of(asked))
    last: dict[str, Any] = next((row for row in reversed(metrics) if number(row.get("epoch")) is not None), {})
    kind = _kind(job, provenance, ledger, path)
    status, detail = _status(path, run, ledger)
    ends = [row for row in ledger if "trial" in row and row.get("event") != "rung"]
    dense, chosen = run.dense or {}, words.pick(run) or {}
    sound = [row for row in run.models if row.get("verified") is True and number(row.get("bytes")) is not None]
    smallest = min(sound, key=lambda row: row["bytes"], default={})
    created = provenance.get("created")
    searched = kind in ("search", "compress")
    return Row(
        name=path.name,
        path=mirror.name(path),
        job=_text(job.get("name")),
        kind=kind,
        status=status,
        detail=detail,
        created=_text(created),
        age_s=_age(path, created, now),
        idle_s=_idle(path, now),
        epochs=_count(last.get("epoch")),
        epochs_of=_count(last.get("epochs")) or _count(_section(job, "train").get("epochs")),
        trials=len({str(row["trial"]) for row in ends}) if searched else None,
        trials_of=_wanted(job) if searched else None,
        trials_failed=sum(row.get("status") == "failed" for row in ends) if searched else None,
        val_accuracy=_either(dense.get("val_accuracy"), last.get("val_accuracy")),
        test_accuracy=_either(dense.get("test_accuracy"), evaluation.get("accuracy")),
        answer=_text(chosen.get("label")),
        answer_val_accuracy=number(chosen.get("val_accuracy")),
        answer_test_accuracy=number(chosen.get("test_accuracy")),
        answer_bytes=_count(chosen.get("bytes")),
        smallest=_text(smallest.get("label")),
        smallest_test_accuracy=number(smallest.get("test_accuracy")),
        smallest_bytes=_count(smallest.get("bytes")),
    )


def _kind(job: dict[str, Any], provenance: dict[str, Any], ledger: list[dict[str, Any]], path: Path) -> str:
    """What the run is of: its files know best, for a training can go on as a search."""
    try:
        said = [word for word in shlex.split(str(provenance.get("command") or "")) if word in KINDS]
    except ValueError:
        said = []
    section = _section(job, "search")
    once = section.get("space") == {} and section.get("trials") == 1
    if ledger or (said and said[0] != "train"):
        return "compress" if once else "search"
    return said[0] if said else "train"


def _wanted(job: dict[str, Any]) -> int | None:
    """Trials that the search is to try, as far as the job tells."""
    section = _section(job, "search")
    keys = ["trials", "population"] if section.get("scheduler") == "pbt" else ["trials"]
    return min((n for key in keys if (n := _count(section.get(key))) is not None), default=None)


def _status(path: Path, run: Run, ledger: list[dict[str, Any]]) -> tuple[str, str]:
    """How a run stands, and what there is to say about that."""
    holder = lock.holder(path)
    if holder is not None and holder.alive:
        return "running", f"process {holder.pid}"
    ended = run.provenance.get("ended")
    if isinstance(ended, dict):
        return ("stopped", "") if ended.get("status") == "stopped" else ("failed", str(ended.get("error") or ""))
    front = run.front or {}
    broken = [str(row.get("label")) for row in front.get("unverified", []) if isinstance(row, dict)]
    if front and "dense" not in broken:
        return "finished", f"left out, not verified: {', '.join(broken)}" if broken else ""
    if front:
        return "failed", "the dense model does not predict the same in a clean process"
    if holder is not None and holder.alive is None:
        return "unknown", f"process {holder.pid} of {holder.host} works on it, unless it was killed"
    if holder is None and mirror.address(path) is not None and not (path / lock.LOCK).exists():
        return "unknown", "not finished; only the machine that works on it knows whether it still does"
    return "stopped", ""


# the files


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as err:
        raise RaydeepError(f"{path.name}: not readable as JSON: {err}") from None
    if not isinstance(value, dict):
        raise RaydeepError(f"{path.name}: expected a JSON object, found {type(value).__name__}")
    return value


def _job(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.load(path.read_bytes(), Loader=_Yaml) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as err:  # ValueError: no text
        raise RaydeepError(f"{path.name}: not readable as YAML: {err}") from None
    if not isinstance(value, dict):
        raise RaydeepError(f"{path.name}: expected a mapping of sections, found {type(value).__name__}")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    return parse_lines(path.read_bytes()) if path.is_file() else []


def _section(job: dict[str, Any], name: str) -> dict[str, Any]:
    found = job.get(name)
    return found if isinstance(found, dict) else {}


def _age(path: Path, created: Any, now: float) -> float | None:
    try:
        return max(0.0, now - datetime.datetime.strptime(str(created), "%Y-%m-%dT%H:%M:%S%z").timestamp())
    except ValueError:
        times = [stamp.time_ns for name in MARKS if (stamp := remote.stamp(path / name)) is not None]
        return max(0.0, now - min(times) / 1e9) if times else None


def _idle(path: Path, now: float) -> float | None:
    times = [stamp.time_ns for name in FILES if (stamp := remote.stamp(path / name)) is not None]
    return max(0.0, now - max(times) / 1e9) if times else None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _either(*values: Any) -> float | None:
    return next((found for value in values if (found := number(value)) is not None), None)
