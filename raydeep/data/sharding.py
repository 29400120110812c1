"""Any source → Parquet shards. Strict decoding happens here, once.

The rows of a source are cut into tasks, one a shard. A task reads, checks and writes its rows and leaves a note of
what it found; a runner runs the tasks, one by one or as a Ray Data job (stream.py); the notes make the manifest.
All happens in a hidden folder beside the dataset, which is renamed when whole. What is there after a kill is
taken up again by the next call, if source and job are the same.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from raydeep.data import decode, order, sources
from raydeep.data.planning import Task, plan
from raydeep.data.resident import moments_of
from raydeep.disk import read_json, sha256_file, write_bytes, write_json
from raydeep.errors import DataError, RaydeepError

if TYPE_CHECKING:
    from raydeep.sections import Data

SCHEMA_VERSION = 2
GROUP_ROWS, GROUP_BYTES = 1024, 8 * 2**20  # most rows and bytes of a row group: what is read at once when streaming
JPEG_QUALITY = 95  # of pictures that are scaled
TICK_S = 0.3  # seconds between two signs of life of a task
LOCK = ".lock"

Progress = Callable[[int, int], None]  # pictures done, pictures in all


class Work(NamedTuple):
    """What all tasks share."""

    read: Callable[[Iterable[sources.Row]], Iterator[bytes | np.ndarray | DataError]]  # of the source
    cfg: Data
    folder: Path  # shards and notes are written there

    def __call__(self, task: Task, tell: Callable[[int], None] | None = None) -> None:
        """Do a task; `tell` is called with its rows done, None writes them to a file that rows_done reads."""
        write_shard(self, task, tell or partial(_tell, self.folder, task))


# Contract of a runner: (work, tasks, called now and then with the rows done so far) -> all tasks are done.
Runner = Callable[[Work, Sequence[Task], Callable[[int], None]], None]


def one_by_one(work: Work, tasks: Sequence[Task], tell: Callable[[int], None]) -> None:
    """The runner of one process."""
    done = 0
    for task in tasks:
        work(task, lambda rows, before=done: tell(before + rows))  # type: ignore[misc]
        done += len(task.rows)


def write(cfg: Data, out: Path, progress: Progress | None, run: Runner) -> dict[str, Any] | None:
    """Write a dataset folder; None if it stands there already.

    Raises:
        DataError: nothing to read, a class or split without pictures, too many bad pictures.
    """
    out = out.absolute()
    if out.is_symlink() and not out.exists():
        raise DataError(f"{out}: a link to nothing; remove it or name another folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return None
    if out.is_mount():
        raise DataError(f"{out}: a mount point, which a dataset can't be renamed to when it is whole; name {out}/NAME")
    source = sources.open_source(cfg)
    if not source.rows:
        raise DataError(f"{cfg.source} {cfg.path or ''}: no pictures found")
    tasks = plan(source, cfg)
    with _staging(out) as folder:
        if folder is None:
            return None
        out.with_name(f"{out.name}.quarantine.jsonl").unlink(missing_ok=True)
        try:
            _same_plan(folder, cfg, tasks)
            left = [task for task in tasks if not _done(folder, task)]
            total = sum(len(task.rows) for task in tasks)
            before = total - sum(len(task.rows) for task in left)
            run(Work(source.read, cfg, folder), left, lambda rows: progress(before + rows, total) if progress else None)
        except DataError:  # a source that can't be reached, say: what is done by then is gone on with
            if not any(folder.glob("task-*.json")):
                shutil.rmtree(folder)
            raise
        try:
            facts = _finish(folder, out, source.classes, cfg, tasks)
        except DataError:
            shutil.rmtree(folder)  # going on would not mend it
            raise
        if progress:
            progress(total, total)
        if out.exists():
            out.rmdir()
        os.rename(folder, out)
        (out / LOCK).unlink(missing_ok=True)  # not before: until the name is final, the folder has an owner
        return facts


@contextmanager
def _staging(out: Path) -> Iterator[Path | None]:
    """The hidden folder that becomes `out`, to one process at a time; None if another one made `out` meanwhile."""
    folder = out.with_name(f".{out.name}.part")
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise DataError(f"{out.parent}: can't be made: {err.strerror}; name another folder") from None
        with (folder / LOCK).open("w") as file:
            with suppress(OSError):  # a file system without locks: then people take care
                fcntl.flock(file, fcntl.LOCK_EX)
            if (out / "dataset.json").is_file():
                shutil.rmtree(folder, ignore_errors=True)
                yield None
                return
            try:
                mine = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
            except FileNotFoundError:
                mine = False
            if mine:  # and not that of a folder which its owner has just removed
                yield folder
                return


def _same_plan(folder: Path, cfg: Data, tasks: list[Task]) -> None:
    """Empty the folder unless it holds part of the same dataset."""
    facts = [SCHEMA_VERSION, cfg.model_dump(), sources.fingerprint(cfg)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for task in tasks:
        for row in task.rows:
            digest.update(f"{task.name}\0{row.label}\0{row.nbytes}\0{row.origin}\n".encode())
    file = folder / "plan.json"
    with suppress(RaydeepError, OSError):  # a plan that can't be read is another plan
        if read_json(file) == digest.hexdigest():
            return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    write_json(file, digest.hexdigest())


# one task


def _note(folder: Path, task: Task) -> Path:
    return folder / f"task-{task.name}.json"


def _done(folder: Path, task: Task) -> bool:
    """Whether the note of a task can be read and its shard is there as noted."""
    try:
        note = read_json(_note(folder, task))
        shard = note["shard"]
        whole = shard is None or sha256_file(folder / shard["name"]) == shard["sha256"]
        return whole and note["rows"] == len(task.rows)
    except (RaydeepError, OSError, KeyError, TypeError):
        return False


def write_shard(work: Work, task: Task, tell: Callable[[int], None]) -> None:
    """Check the rows of a task and write them as one shard, then the note of it.

    Raises:
        DataError: pixels are to be stored, but the pictures vary in size.
    """
    read, cfg, folder = work
    images: list[bytes] = []
    kept: list[sources.Row] = []
    bad: list[tuple[str, str]] = []
    sizes: set[tuple[int, int]] = set()
    counts = np.zeros((2, 3, 256), np.int64)  # histograms of grey and of colour pictures
    pixels: list[np.ndarray] = []
    told = time.monotonic()
    for done, (row, picture) in enumerate(zip(task.rows, read(task.rows), strict=True), 1):
        if time.monotonic() - told > TICK_S:
            told = time.monotonic()
            tell(done)
        try:
            if isinstance(picture, DataError):
                raise picture
            data = decode.encode_png(picture) if isinstance(picture, np.ndarray) else picture
            image, data = decode.read_picture(data, cfg.max_pixels)
            if cfg.resize is not None:
                image, data = _scaled(image, data, cfg.resize)
        except DataError as err:
            bad.append((row.origin, str(err)))
            continue
        sizes.add((image.height, image.width))
        bands = np.array(image.histogram(), np.int64).reshape(-1, 256)
        counts[int(len(bands) > 1)] += bands  # a grey picture counts in all three channels
        kept.append(row)
        if cfg.store == "decoded":
            if len(sizes) > 1:
                (h, w), (h2, w2) = sorted(sizes)
                raise DataError(
                    f"{row.origin}: pictures of {h}×{w} and of {h2}×{w2} pixels can't be stored decoded; name one size "
                    f"(--resize N) or store them encoded"
                )
            pixels.append(np.asarray(image))
        else:
            images.append(data)
    grey = not counts[1].any()
    if cfg.store == "decoded":
        images = [_raw(picture, grey) for picture in pixels]
    note = {
        "split": task.split, "rows": len(task.rows), "grey": grey, "sizes": sorted(sizes), "bad": bad,
        "histogram": counts.sum(0).tolist(), "class_counts": _counted([row.label for row in kept]), "shard": None,
    }  # fmt: skip
    if kept:
        places = order.shuffled(len(kept), cfg.split_seed, task.number) if task.split == "train" else range(len(kept))
        note["shard"] = _write_parquet(folder, task, [(images[i], kept[i].label, kept[i].origin) for i in places], cfg)
    write_json(_note(folder, task), note)
    (folder / f"rows-{task.name}").unlink(missing_ok=True)


def _tell(folder: Path, task: Task, done: int) -> None:
    (folder / f"rows-{task.name}").write_text(str(done))


def rows_done(folder: Path, tasks: Sequence[Task]) -> int:
    """Rows of tasks that other processes work on, as far as they have told."""
    done = 0
    for task in tasks:
        if _note(folder, task).is_file():
            done += len(task.rows)
            continue
        try:
            done += int((folder / f"rows-{task.name}").read_text() or 0)
        except (OSError, ValueError):
            continue
    return done


def _scaled(image: Image.Image, data: bytes, side: int) -> tuple[Image.Image, bytes]:
    """The centre square at a side, and its file: a JPEG if it was one, else a PNG."""
    if image.size == (side, side):
        return image, data
    small = Image.fromarray(decode.to_pixels(image, "grey" if image.mode == "L" else "rgb", side).squeeze())
    out = io.BytesIO()
    if data[:2] == b"\xff\xd8":
        small.save(out, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return Image.open(io.BytesIO(out.getvalue())), out.getvalue()
    small.save(out, "PNG")
    return small, out.getvalue()


def _raw(pixels: np.ndarray, grey: bool) -> bytes:
    if not grey and pixels.ndim == 2:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    return pixels.tobytes()


def _counted(labels: list[int]) -> dict[str, int]:
    values, counts = np.unique(np.array(labels, np.int64), return_counts=True)
    return {str(value): int(count) for value, count in zip(values, counts, strict=True)}


def _write_parquet(folder: Path, task: Task, rows: list[tuple[bytes, int, str]], cfg: Data) -> dict[str, Any]:
    images, labels, origins = zip(*rows, strict=True)
    mean_bytes = max(1, sum(map(len, images)) // len(images))
    group = max(1, min(GROUP_ROWS, GROUP_BYTES // mean_bytes))
    kind = pa.binary(len(images[0])) if cfg.store == "decoded" else pa.binary()
    schema = pa.schema([("image", kind), ("label", pa.int64()), ("origin", pa.string())])
    name = f"{task.name}.parquet"
    aside = folder / f".{name}"
    pq.write_table(
        pa.table([list(images), list(labels), list(origins)], schema=schema), aside, row_group_size=group,
        compression={"image": "none", "label": "zstd", "origin": "zstd"}, use_dictionary=["label"],
        write_statistics=["label"],
    )  # fmt: skip
    with aside.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(aside, folder / name)
    groups = [min(group, len(rows) - start) for start in range(0, len(rows), group)]
    size = (folder / name).stat().st_size
    return {"name": name, "rows": len(rows), "bytes": size, "sha256": sha256_file(folder / name), "groups": groups}


# all tasks together


def content_hash(classes: list[str], splits: dict[str, Any]) -> str:
    """Names what a dataset holds."""
    return hashlib.sha256(json.dumps([classes, splits]).encode()).hexdigest()


def _finish(folder: Path, out: Path, classes: list[str], cfg: Data, tasks: list[Task]) -> dict[str, Any]:
    """Write quarantine.jsonl and dataset.json from the notes of the tasks; remove the notes."""
    notes = [read_json(_note(folder, task)) for task in tasks]
    bad = [tuple(entry) for note in notes for entry in note["bad"]]
    quarantine = folder / "quarantine.jsonl"
    lines = "".join(json.dumps({"origin": origin, "reason": reason}) + "\n" for origin, reason in bad)
    write_bytes(quarantine, lines.encode())
    total = sum(note["rows"] for note in notes)
    if bad and len(bad) > cfg.max_bad_fraction * total:
        kept = out.with_name(f"{out.name}.quarantine.jsonl")
        shutil.move(quarantine, kept)
        examples = "; ".join(f"{origin}: {reason}" for origin, reason in bad[:3])
        raise DataError(
            f"{len(bad)} of {total} pictures can't be read ({len(bad) / total:.1%}, allowed "
            f"{cfg.max_bad_fraction:.1%}): {examples}. All are listed in {kept}; mend them or raise "
            f"data.max_bad_fraction"
        )
    known = {f"{task.name}.parquet" for task in tasks} | {quarantine.name, "plan.json", LOCK}
    splits: dict[str, dict[str, Any]] = {}
    for split in sources.SPLITS:
        mine = [note for note in notes if note["split"] == split and note["shard"] is not None]
        if not mine:
            raise DataError(f"the {split} split is empty: every picture of it is in quarantine")
        counts = [sum(note["class_counts"].get(str(i), 0) for note in mine) for i in range(len(classes))]
        found = [note["shard"] for note in mine]
        splits[split] = {"rows": sum(shard["rows"] for shard in found), "class_counts": counts, "shards": found}
    if 0 in splits["train"]["class_counts"]:
        name = classes[splits["train"]["class_counts"].index(0)]
        raise DataError(f"class {name!r} has no picture to train on; give some, or remove the class")
    sizes = np.array([size for note in notes for size in note["sizes"]])
    if cfg.store == "decoded" and len(np.unique(sizes, axis=0)) > 1:
        raise DataError(f"{cfg.path}: pictures vary in size; store them encoded, or name one size with --resize N")
    grey = all(note["grey"] for note in notes)
    histogram = sum(np.array(note["histogram"]) for note in notes if note["split"] == "train")
    mean, std = moments_of(np.asarray(histogram)[: 1 if grey else 3])
    facts = {
        "schema": SCHEMA_VERSION,
        "classes": classes,
        "mode": "grey" if grey else "rgb",
        "store": cfg.store,
        "size_range": [*sizes.min(0).tolist(), *sizes.max(0).tolist()],
        "mean": [round(value, 6) for value in mean],
        "std": [round(value, 6) for value in std],
        "splits": splits,
        "quarantined": len(bad),
        "hash": content_hash(classes, splits),
    }
    write_json(folder / "dataset.json", facts)
    for path in folder.iterdir():
        if path.name not in known | {"dataset.json"}:
            path.unlink()
    (folder / "plan.json").unlink()
    return facts
