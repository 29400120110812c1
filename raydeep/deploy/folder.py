"""Which model folder a user means: the folder itself, one of a run, or the address of either."""

from __future__ import annotations

from pathlib import Path

from raydeep import mirror
from raydeep.disk import check_sums, read_json
from raydeep.errors import ModelError
from raydeep.run import follow_outcome, locate


def find(model: str | Path, *read: str) -> Path:
    """A whole model folder on this machine, its checksums checked; one in a bucket is fetched.

    Args:
        model: a model folder (RUN/models/LABEL), or a run that has one answer: its dense model if it was a training,
            else the model that its report names. An s3:// or gs:// address of either, or with the run's name for
            its folder.
        read: files of it that the caller reads, see `check_sums`.

    Raises:
        ModelError: it is neither, the run has no one answer, or a file is missing or changed.
        RaydeepError: the address is none, or can't be read.
    """
    path = locate(model, "MODEL")
    mirror.pull(path, lambda name: "/" not in name)
    follow_outcome(path)
    if not (path / "spec.json").is_file() and (path / "front.json").is_file():
        path = path / "models" / _answer(path)
        mirror.pull(path)
    if not path.is_dir():
        beside = sorted(p.parent.name for p in path.parent.glob("*/spec.json")) if path.parent.is_dir() else []
        there = f"; there are {', '.join(beside[:12])}" if beside else "; see RUN/models/"
        raise ModelError(f"{mirror.name(path)}: no such folder{there}")
    if not (path / "spec.json").is_file():
        raise ModelError(f"{mirror.name(path)}: not a model folder (no spec.json), nor a finished run; see RUN/models/")
    check_sums(path, *read)
    return path


def _answer(run: Path) -> str:
    """Label of the model that a run stands for."""
    front = read_json(run / "front.json")
    if label := front.get("answer"):
        return str(label)
    labels = [str(row["label"]) for row in front["models"]] or ["dense"]
    if len(labels) > 1:
        raise ModelError(
            f"{mirror.name(run)}: a run with {len(labels)} models, none of them close to the dense one; name one: "
            f"{', '.join(f'models/{label}' for label in labels)}"
        )
    return labels[0]
