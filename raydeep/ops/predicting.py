"""Prediction as Python and the command line call it: in this process, or on Ray into a Parquet file."""

from __future__ import annotations

import glob
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, overload

from rich.console import Console

from raydeep import mirror
from raydeep.errors import DataError, JobError
from raydeep.ops.console import Ui

if TYPE_CHECKING:
    from raydeep.deploy.batch import Summary
    from raydeep.deploy.predict import Prediction

Texts = str | Path | Sequence[str | Path]


@overload
def predict(
    model: str | Path, source: Texts, *, out: None = None, split: str | None = None, batch_size: int | None = None,
    sets: Sequence[str] = (), took: Callable[[Path], None] | None = None,
) -> Iterator[Prediction]: ...  # fmt: skip
@overload
def predict(
    model: str | Path, source: Texts, *, out: str | Path, split: str | None = None, batch_size: int | None = None,
    sets: Sequence[str] = (), top: int = 5, workers: int | None = None, force: bool = False, ui: Ui | None = None,
    took: Callable[[Path], None] | None = None, mute: bool = False,
) -> Summary: ...  # fmt: skip


def predict(
    model: str | Path, source: Texts, *, out: str | Path | None = None, split: str | None = None,
    batch_size: int | None = None, sets: Sequence[str] = (), top: int = 5, workers: int | None = None,
    force: bool = False, ui: Ui | None = None, took: Callable[[Path], None] | None = None, mute: bool = False,
) -> Iterator[Prediction] | Summary:  # fmt: skip
    """Label pictures with an exported model.

    Without `out` in this process, with neither Ray nor torch; with it on Ray, all cores at work, into a Parquet file
    (its columns: deploy/batch.py). Both give the same bits for the same batch size.

    Args:
        model: a model folder (RUN/models/LABEL), a run with one answer, or the s3:// address of either.
        source: one or more of: picture files, folders of pictures, globs, Parquet or tar files or folders of them,
            tables (CSV, TSV, JSON Lines), folders of shards, addresses of these; digits, synthetic, torchvision:NAME,
            package.module:factory.
        out: file or s3:// address to write; it appears when it is whole.
        split: only pictures of this split: train, val or test.
        batch_size: pictures that the network takes at once; None: 32.
        sets: overrides of the data section, such as `data.image_column=img`.
        top: likeliest classes that a row of the file lists.
        workers: with `out`: processes, of one core each; None: all cores.
        force: replace `out`.
        ui: where to show how far it is; None: nowhere.
        took: called with the model folder that `model` stands for, before a picture is looked for.
        mute: with `out`: while Ray runs, nothing that this process writes on stderr is shown, as Ray's C++ parts do.

    Returns:
        Without `out`, a Prediction a picture, as they are made; with it, the counts.

    Raises:
        JobError: `split` is none, or `batch_size`, `top` or `workers` is no whole number above 0; or `sets` are wrong.
        ModelError: the model is none, or a file of it is missing or changed.
        DataError: a source is not there or can't be read, or `out` exists.
        ResourceError: Ray can't be started or joined.
    """
    from raydeep.config import parse_sets
    from raydeep.data.unlabelled import open_pictures
    from raydeep.deploy import predict as here

    _check(split, batch_size=batch_size, top=top, workers=workers)
    job = parse_sets({}, list(sets), "--set")
    target = None if out is None else _target(out, force)
    opened = here.Model.open(model)
    if took is not None:
        took(opened.path)
    texts = [source] if isinstance(source, (str, Path)) else source
    names = [str(text) if target is None else _absolute(str(text)) for text in texts]
    pictures = open_pictures(names, opened.classes, job.data, split)
    size = batch_size or here.BATCH
    if target is None:
        return here.predict(opened, pictures, size, job.data.max_pixels)
    from raydeep.train import cluster

    with (
        tempfile.TemporaryDirectory(prefix="raydeep-predict-") as folder,
        (ui or Ui(Console(quiet=True))).stage("predict") as stage,
    ):
        log = Path(folder) / "ray.log"
        with cluster.cluster(job, log), _stderr_to(log) if mute else nullcontext():
            from raydeep.deploy import batch
            from raydeep.ops.datasets import rate

            found = batch.predict_source(
                opened, pictures, target, top=top, batch_size=size, max_pixels=job.data.max_pixels, workers=workers,
                tell=rate(stage),
            )  # fmt: skip
        stage.text = told(found)
    return found


def _check(split: str | None, **counts: int | None) -> None:
    from raydeep.data.rows import SPLITS

    if split is not None and split not in SPLITS:
        raise JobError(f"split {split!r}: expected {', '.join(SPLITS)}; leave it out for all pictures")
    for name, count in counts.items():
        if count is not None and (not isinstance(count, Integral) or count < 1):
            raise JobError(f"{name} {count!r}: expected a whole number, 1 or more")


def _absolute(text: str) -> str:
    """A local path as processes see it that do not run in this folder; all else as it is."""
    path = Path(text).expanduser()
    return str(path.absolute()) if os.path.lexists(path) or (glob.has_magic(text) and "://" not in text) else text


@contextmanager
def _stderr_to(log: Path) -> Iterator[None]:
    """Send what this process writes on stderr to a file, while Ray's C++ parts may write there.

    Of each pool of actors they warn that a restart needs its arguments, which Ray Data holds until the pool ends.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _target(out: str | Path, force: bool) -> Path:
    path = mirror.place(out if isinstance(out, Path) else str(out), "--out").expanduser()
    name = mirror.name(path)
    if path.is_dir():
        raise DataError(f"--out {name}: a folder; name a file, such as {name.rstrip('/')}/predictions.parquet")
    if not force and mirror.exists(path):
        raise DataError(f"--out {name}: exists; name another file, or add --force to replace it")
    return path


def told(found: Summary) -> str:
    """One line of what became of a source."""
    speed = found.rows / max(1e-9, found.seconds)
    text = f"{found.rows:,} pictures, {speed:,.0f}/s"
    if found.accuracy is not None:
        text += f", accuracy {found.accuracy:.2%} of {found.labelled:,} with a label"
    if found.strange:
        text += f", {found.strange:,} with a label that the model does not have"
    return text
