"""What a dataset folder holds, whether it is whole, and which pictures of train stand in val or test too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from raydeep import mirror
from raydeep.data import decode
from raydeep.data.shards import Manifest, load_manifest
from raydeep.data.sources import SPLITS
from raydeep.disk import sha256_file
from raydeep.errors import DataError
from raydeep.machine import usable_cores

THUMB = 8  # side of the colour thumbnails that tell whether two pictures look alike
ALIKE = 0.985  # correlation of two thumbnails; on CIFAR-10, all pairs above it that were looked at are one photo
LEAST_SIDE = 32  # smaller pictures have too little in them: different ones look alike
FLAT = 4.0  # standard deviation of a thumbnail, grey levels; below it, a picture has no structure to compare
CHUNK = 2048  # rows of a split that are compared with all of another one at a time

Progress = Callable[[int, int], None]


def info(manifest: Manifest) -> dict[str, Any]:
    """Counts, class balance, sizes and hash of a dataset, from its manifest alone."""
    low_h, low_w, high_h, high_w = manifest.size_range
    channels = decode.CHANNELS[manifest.mode]
    splits = {}
    for name, facts in manifest.splits.items():
        counts = facts["class_counts"]
        splits[name] = {
            "rows": facts["rows"], "shards": len(facts["shards"]), "bytes": sum(s["bytes"] for s in facts["shards"]),
            "class_counts": dict(zip(manifest.classes, counts, strict=True)),
            "imbalance": max(counts) / min(counts) if min(counts) else None,
        }  # fmt: skip
    one_size = (low_h, low_w) == (high_h, high_w)
    rows = sum(split["rows"] for split in splits.values())
    return {
        "path": mirror.name(manifest.path), "hash": manifest.hash, "classes": len(manifest.classes),
        "mode": manifest.mode, "store": manifest.store, "height": [low_h, high_h], "width": [low_w, high_w],
        "mean": manifest.mean,
        "std": manifest.std, "quarantined": manifest.quarantined, "rows": rows,
        "decoded_bytes": rows * low_h * low_w * channels if one_size else None, "splits": splits,
    }  # fmt: skip


class Seen(NamedTuple):
    """What a scan of one shard found."""

    problems: list[str]
    labels: np.ndarray  # int64 N
    origins: list[str]
    exact: np.ndarray  # int64 N, from the SHA-256 of the pixels
    looks: np.ndarray  # float16 of shape [N, 3 · THUMB²]: see thumbnail


class Pair(NamedTuple):
    """A picture that stands in two splits."""

    first: str  # <split>: <origin>
    second: str
    same: bool  # pixel for pixel; otherwise they look alike


class Report(NamedTuple):
    """Result of a verification."""

    problems: list[str]
    pairs: list[Pair]
    repeated: dict[str, int]  # split → pictures of it that stand in it more than once


def verify(path: Path, progress: Progress | None = None) -> Report:
    """Read every shard of a dataset whole: hashes, columns, labels, every picture; find pictures in two splits.

    Raises:
        DataError: the folder is no dataset.
    """
    manifest = load_manifest(path)
    shards = [(split, shard) for split in SPLITS for shard in manifest.splits[split]["shards"]]
    jobs = [(manifest.path / shard["name"], shard, manifest) for _, shard in shards]
    total, done = sum(shard["rows"] for _, shard in shards), 0
    found: dict[str, list[Seen]] = {split: [] for split in SPLITS}
    problems: list[str] = []
    for (split, shard), seen in zip(shards, _scanned(jobs), strict=True):
        found[split].append(seen)
        problems += seen.problems
        done += shard["rows"]
        if progress is not None:
            progress(done, total)
    for split, parts in found.items():
        counts = np.bincount(np.concatenate([p.labels for p in parts]), minlength=len(manifest.classes)).tolist()
        if not problems and counts != manifest.splits[split]["class_counts"]:
            problems.append(f"{split}: class counts are {counts}, dataset.json says otherwise")
    repeated = {}
    for split, parts in found.items():
        _, counts = np.unique(np.concatenate([part.exact for part in parts]), return_counts=True)
        repeated[split] = int(counts[counts > 1].sum())
    return Report(problems, list(_pairs(found)), repeated)


def _scanned(jobs: list[tuple[Path, dict[str, Any], Manifest]]) -> Iterator[Seen]:
    """The scans of the shards, in order: on all cores if there are several."""
    if len(jobs) <= len(SPLITS):
        yield from (scan(*job) for job in jobs)
        return
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        yield from pool.map(scan, *zip(*jobs, strict=True))


def scan(file: Path, shard: dict[str, Any], manifest: Manifest) -> Seen:
    """Read one shard whole."""
    problems: list[str] = []
    if sha256_file(file) != shard["sha256"]:
        problems.append(f"{file}: its sha256 is not that of dataset.json")
    exact: list[int] = []
    looks: list[np.ndarray] = []
    labels: list[int] = []
    origins: list[str] = []
    try:
        parts = pq.ParquetFile(file)
        sizes = [parts.metadata.row_group(i).num_rows for i in range(parts.num_row_groups)]
        if sizes != shard["groups"]:
            problems.append(f"{file}: row groups of {sizes} rows, dataset.json says {shard['groups']}")
        for batch in parts.iter_batches(256, columns=["image", "label", "origin"]):
            for row in batch.to_pylist():
                where = f"{file} row {len(labels)} ({row['origin']})"
                if row["label"] is None or not 0 <= row["label"] < len(manifest.classes):
                    problems.append(f"{where}: label {row['label']}, expected 0 to {len(manifest.classes) - 1}")
                    row["label"] = 0
                labels.append(row["label"])
                origins.append(row["origin"])
                try:
                    image = _picture(row["image"], manifest)
                except DataError as err:
                    problems.append(f"{where}: {err}")
                    exact.append(-len(problems))
                    looks.append(np.zeros(3 * THUMB**2, np.float16))
                    continue
                digest = hashlib.sha256(f"{image.size}{image.mode}".encode() + image.tobytes()).digest()
                exact.append(int.from_bytes(digest[:8], "big", signed=True))
                looks.append(thumbnail(image))
    except (OSError, ValueError, KeyError) as err:
        problems.append(f"{file}: not readable as a shard: {err}; shard the source again")
    stacked = np.array(looks, np.float16).reshape(-1, 3 * THUMB**2)
    return Seen(problems, np.array(labels, np.int64), origins, np.array(exact, np.int64), stacked)


def _picture(data: bytes, manifest: Manifest) -> Image.Image:
    if manifest.store == "encoded":
        return decode.open_picture(data)
    height, width = manifest.stored
    if len(data) not in (height * width, height * width * 3):
        raise DataError(f"{len(data):,} bytes, expected pixels of {height}×{width}")
    pixels = np.frombuffer(data, np.uint8).reshape(height, width, -1)
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels)


def thumbnail(image: Image.Image) -> np.ndarray:
    """What a picture looks like from afar: float16 of shape [3 · THUMB²], mean 0, length 1; zeros: nothing to tell."""
    small = image.convert("RGB").resize((THUMB, THUMB), Image.Resampling.BOX)
    values = np.asarray(small, np.float32).reshape(-1, 3)
    structure = values - values.mean(0)
    values = (values - values.mean()).reshape(-1)
    if min(image.size) < LEAST_SIDE or np.linalg.norm(structure) < FLAT * len(values) ** 0.5:
        return np.zeros(len(values), np.float16)
    return (values / np.linalg.norm(values)).astype(np.float16)


def _pairs(found: dict[str, list[Seen]]) -> Iterator[Pair]:
    for one, other in combinations(SPLITS, 2):
        a, b = _joined(found[one]), _joined(found[other])
        same = set(_equal(a.exact, b.exact))
        alike = set(_alike(a.looks, b.looks)) - same
        for pairs, exactly in ((same, True), (alike, False)):
            for i, j in sorted(pairs):
                yield Pair(f"{one}: {a.origins[i]}", f"{other}: {b.origins[j]}", exactly)


def _joined(parts: list[Seen]) -> Seen:
    return Seen(
        [], np.concatenate([p.labels for p in parts]), [o for p in parts for o in p.origins],
        np.concatenate([p.exact for p in parts]), np.concatenate([p.looks for p in parts]),
    )  # fmt: skip


def _equal(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[int, int]]:
    places: dict[int, list[int]] = {}
    for j, value in enumerate(other.tolist()):
        places.setdefault(value, []).append(j)
    for i, value in enumerate(one.tolist()):
        for j in places.get(value, ()):
            yield i, j


def _alike(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[int, int]]:
    columns = other.astype(np.float32).T
    for start in range(0, len(one), CHUNK):
        rows, found = np.nonzero(one[start : start + CHUNK].astype(np.float32) @ columns > ALIKE)
        yield from zip((rows + start).tolist(), found.tolist(), strict=True)
