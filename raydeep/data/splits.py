"""Shards → the splits of a Dataset: in memory if they fit, else streamed. Knows no Ray."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq

from raydeep import mirror
from raydeep.data import fast, order
from raydeep.data.resident import Dataset, Pixels, Split, in_order, moments
from raydeep.data.streamed import Engine, Streamed, threads
from raydeep.errors import DataError

if TYPE_CHECKING:
    from raydeep.data.shards import Manifest, Progress
    from raydeep.sections import Data

LOAD_ROWS = 1024  # pictures that are copied into memory at a time


def read_dataset(manifest: Manifest, cfg: Data, engine: Engine = threads, progress: Progress | None = None) -> Dataset:
    """The splits of a dataset, decoded in memory or streamed, as data.cache says.

    Args:
        manifest: of the shards.
        cfg: the data section.
        engine: reads and decodes.
        progress: told how many pictures are decoded, while they are read into memory.

    Raises:
        DataError: the pictures vary in size and the job names none, or do not fit data.memory_bytes.
    """
    resident = is_resident(manifest, cfg)
    splits: dict[str, Streamed | Pixels] = {s: streamed(manifest, cfg, s, engine) for s in manifest.splits}
    if resident:
        total, done = sum(len(split.labels) for split in splits.values()), 0
        for name, split in splits.items():
            images = np.empty((len(split.labels), *split.shape), np.uint8)
            batches = in_order(len(images), LOAD_ROWS)
            for rows, pictures in zip(batches, split.read([batches]), strict=True):
                images[rows[0] : rows[-1] + 1] = pictures
                done += len(rows)
                if progress is not None:
                    progress(done, total)
            splits[name] = Pixels(images, split.labels)
    train = splits["train"]
    mean, std = manifest.mean, manifest.std
    if cfg.limit_per_class is not None or len(mean) != train.shape[2]:
        mean, std = moments(train)
    return Dataset(train, splits["val"], splits["test"], manifest.classes, mean, std)


def _labels(file: Path, classes: int) -> np.ndarray:
    """Labels of a shard: int64 N.

    Raises:
        DataError: they are no class numbers.
    """
    try:
        column = pq.read_table(file, columns=["label"]).column(0)
    except (OSError, ValueError, KeyError) as err:
        raise DataError(f"{file}: its labels can't be read: {err}; shard the source again") from None
    if str(column.type) != "int64" or column.null_count:
        raise DataError(f"{file}: labels are {column.type}, {column.null_count} of them null; shard the source again")
    labels = column.to_numpy()
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"{file}: labels from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
    return labels


def in_process(split: Split) -> Split:
    """A split that needs no cluster to be read: another process can take it along."""
    if isinstance(split, Streamed):
        split = copy.copy(split)
        split.engine = threads
    return split


def is_resident(manifest: Manifest, cfg: Data) -> bool:
    """Whether the splits are held decoded in memory. A function of job and dataset alone, never of the machine.

    Raises:
        DataError: data.cache says so, but they take more than data.memory_bytes.
    """
    need = decoded_bytes(manifest, cfg)
    if cfg.cache == "resident" and need > cfg.memory_bytes:
        raise DataError(
            f"{manifest.path}: pictures of {'×'.join(map(str, manifest.shape(cfg)))} take {need:,} bytes decoded, more "
            f"than data.memory_bytes {cfg.memory_bytes:,}; raise it, set data.cache stream, or lower data.image_size "
            f"or data.limit_per_class"
        )
    return cfg.cache != "stream" and need <= cfg.memory_bytes


def decoded_bytes(manifest: Manifest, cfg: Data) -> int:
    """What the splits take in memory, decoded."""
    most = cfg.limit_per_class
    rows = sum(
        min(count, most) if most is not None and split == "train" else count
        for split, facts in manifest.splits.items()
        for count in facts["class_counts"]
    )
    return rows * int(np.prod(manifest.shape(cfg)))


def streamed(manifest: Manifest, cfg: Data, split: str, engine: Engine = threads) -> Streamed:
    """One split on disk; of train, at most data.limit_per_class pictures a class."""
    files = manifest.files(split)
    labels = np.concatenate([_labels(file, len(manifest.classes)) for file in files])
    sizes = [(file, group, rows) for file, shard in enumerate(manifest.splits[split]["shards"])
             for group, rows in enumerate(shard["groups"])]  # fmt: skip
    starts = np.cumsum([0, *(rows for _, _, rows in sizes)])
    keep = np.arange(len(labels))
    if split == "train" and cfg.limit_per_class is not None:
        keep = order.few(labels, cfg.limit_per_class, cfg.split_seed)
    cuts = np.searchsorted(keep, starts)
    groups = [
        (file, group, keep[cuts[i] : cuts[i + 1]] - starts[i])
        for i, (file, group, _) in enumerate(sizes)
        if cuts[i] < cuts[i + 1]
    ]
    form = fast.Format(manifest.store, manifest.stored, manifest.shape(cfg), manifest.side(cfg))
    return Streamed(
        [mirror.name(file) for file in files], groups, labels[keep], form, window_bytes=cfg.window_bytes, engine=engine
    )  # fmt: skip


def origins(manifest: Manifest, cfg: Data, split: str, rows: list[int]) -> list[str]:
    """Where rows of a split come from: the names that the source gave them."""
    found = []
    groups = streamed(manifest, cfg, split).groups
    ends = np.cumsum([len(within) for _, _, within in groups])
    for row in rows:
        which = int(np.searchsorted(ends, row, side="right"))
        file, group, within = groups[which]
        place = within[row - (ends[which] - len(within))]
        names = pq.ParquetFile(manifest.files(split)[file]).read_row_group(group, columns=["origin"]).column(0)
        found.append(names[int(place)].as_py())
    return found
