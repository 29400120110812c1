"""What of a project goes to a cluster with a job: the job file and Python files, as one zip. Never data. Pure."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from raydeep.errors import RaydeepError

MAX_BYTES = 90 * 2**20  # Ray's job server refuses 100 MiB
MAX_RAW_BYTES = 20 * MAX_BYTES  # not even packed
MAX_FILES = 20_000
SUFFIXES = (".py", ".pyi")
SKIPPED = ("__pycache__", "node_modules", "site-packages", "build", "dist")
# A folder with one of these is an environment, a dataset, a run or a model: nothing in it is source.
MARKS = ("pyvenv.cfg", "dataset.json", "provenance.json", "spec.json")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the same files make the same zip, which Ray then does not upload again


class Bundle(NamedTuple):
    """A packed project."""

    path: Path  # the zip
    job: str  # the job file in it
    files: int
    bytes: int


def _walk(root: Path, sources: bool) -> Iterator[Path]:
    """Files below a folder, sorted; if `sources`, Python ones only and no folder of other things."""
    for here, folders, names in os.walk(root):
        if sources and not set(MARKS).isdisjoint(names):
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if f[0] != "." and f not in SKIPPED)
        if sources and "raydeep" in folders and (Path(here) / "raydeep" / "sections.py").is_file():
            folders.remove("raydeep")  # the driver and the workers must run the same code: that of the cluster
        for name in sorted(names):
            if name[0] != "." and (not sources or name.endswith(SUFFIXES)):
                yield Path(here) / name


def files(root: Path, job: Path, include: Sequence[str] = ()) -> dict[str, Path]:
    """What goes into the bundle: name in it → file.

    Args:
        root: the project, usually where the command is run; its Python files go.
        job: the job file; one outside of `root` is put at the top.
        include: further files and folders below `root`, whole, hidden files left out.

    Raises:
        RaydeepError: a path is not there or not below `root`, or there are too many files.
    """
    root, job = root.resolve(), job.resolve()
    if not job.is_file():
        raise RaydeepError(f"{job}: no such job file")
    found = {job.relative_to(root).as_posix() if job.is_relative_to(root) else job.name: job}
    chosen = [(root, True)]
    for text in include:
        try:
            path = (root / text).resolve()
            there = (path.is_file() or path.is_dir()) and path.is_relative_to(root)
        except (OSError, RuntimeError, ValueError):  # a link in a circle, a name that no file can have
            there = False
        if not there:
            raise RaydeepError(f"--include {text}: expected a file or folder below {root}")
        chosen.append((path, False))
    for path, sources in chosen:
        for file in [path] if path.is_file() else _walk(path, sources):
            if real := _regular(file, root):
                found.setdefault(file.relative_to(root).as_posix(), real)
            if len(found) > MAX_FILES:
                raise RaydeepError(f"{root}: more than {MAX_FILES:,} Python files below it; run this in your project")
    return found


def _regular(file: Path, root: Path) -> Path | None:
    """The file that a name stands for; None: none that may travel (a link away or in a circle, a pipe)."""
    try:
        real = file.resolve()
        return real if real.is_relative_to(root) and stat.S_ISREG(real.stat().st_mode) else None
    except (OSError, RuntimeError):
        return None


def pack(root: Path, job: Path, out: Path, include: Sequence[str] = ()) -> Bundle:
    """Write the zip.

    Args:
        root: the project.
        job: the job file.
        out: the zip to write.
        include: see `files`.

    Raises:
        RaydeepError: see `files`; or the zip is larger than the job server takes, with the largest files.
    """
    chosen = files(root, job, include)
    for name in chosen:
        if not name.isprintable():
            raise RaydeepError(f"{name!r}: a name that other systems can't have; rename the file")
    if sum(file.stat().st_size for file in chosen.values()) > MAX_RAW_BYTES:
        raise _too_large(chosen)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(chosen.items()):
            info = zipfile.ZipInfo(name, EPOCH)
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, file.read_bytes())
            if out.stat().st_size > MAX_BYTES:
                break
    size = out.stat().st_size
    if size > MAX_BYTES:
        raise _too_large(chosen)
    own = next(name for name, file in chosen.items() if file == job.resolve())
    return Bundle(out, own, len(chosen), size)


def _too_large(chosen: dict[str, Path]) -> RaydeepError:
    largest = sorted(chosen.items(), key=lambda item: -item[1].stat().st_size)[:3]
    named = ", ".join(f"{name} ({file.stat().st_size / 2**20:.1f} MiB)" for name, file in largest)
    return RaydeepError(
        f"the bundle is larger than {MAX_BYTES // 2**20} MiB packed, about what a job server takes; its largest files: "
        f"{named}. Leave them out (data belongs where all nodes read it: data.path), or run this in a smaller folder"
    )
