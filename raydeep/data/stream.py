"""Shards → decoded splits through Ray Data, shared by all processes of a node through the object store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import ray

from raydeep.data import decode
from raydeep.data.resident import Dataset, Pixels, assemble, check_memory, chosen_rows, encoded

if TYPE_CHECKING:
    from raydeep.config import Data
    from raydeep.data.shards import Manifest, Progress

BLOCK_ROWS = 4096  # per-task overhead dominates small data: few, large blocks


def load(manifest: Manifest, cfg: Data, progress: Progress | None = None) -> Dataset:
    """Read and decode all splits with Ray Data, in the order of the shards.

    Raises:
        DataError: the decoded pictures do not fit data.memory_bytes, or vary in size.
    """
    check_memory(manifest, cfg)
    rows = chosen_rows(manifest, cfg)
    splits = {
        split: Pixels(np.empty((len(found), *manifest.shape(cfg)), np.uint8), np.empty(len(found), np.int64))
        for split, found in rows.items()
    }
    ends = np.cumsum([len(found) for found in rows.values()])
    done = 0
    for batch in _decoded(manifest, cfg, rows).iter_batches(batch_size=None, batch_format="numpy"):
        taken, size = 0, len(batch["label"])
        while taken < size:  # a batch may reach over the end of a split
            index = int(np.searchsorted(ends, done, side="right"))
            pixels = list(splits.values())[index]
            at = done - (int(ends[index - 1]) if index else 0)
            take = min(size - taken, int(ends[index]) - done)
            pixels.images[at : at + take] = batch["pixels"][taken : taken + take]
            pixels.labels[at : at + take] = batch["label"][taken : taken + take]
            taken, done = taken + take, done + take
        if progress is not None:
            progress(done, int(ends[-1]))
    assert done == ends[-1], f"Ray Data gave {done} rows of {ends[-1]}"
    for split, pixels in splits.items():
        counts = np.bincount(pixels.labels, minlength=len(manifest.classes))
        most = np.array(manifest.splits[split]["class_counts"])
        if split == "train" and cfg.limit_per_class is not None:
            most = most.clip(max=cfg.limit_per_class)
        assert (counts == most).all(), f"{split}: rows came out of order"
    return assemble(manifest, cfg, splits)


def _decoded(manifest: Manifest, cfg: Data, rows: dict[str, Any]) -> Any:
    """All splits in one pipeline (each pipeline costs seconds to start), in the order of splits and shards."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    blocks = max(1, min(64, sum(len(found) for found in rows.values()) // BLOCK_ROWS))
    if cfg.limit_per_class is not None:  # few rows of many: only those are decoded
        tables = [table for split, found in rows.items() for table in encoded(manifest, split, found)]
        shards: Any = ray.data.from_arrow([table for table in tables if len(table)])
    else:
        files = [str(file) for split in manifest.splits for file in manifest.files(split)]
        shards = ray.data.read_parquet(files, columns=["image", "label"], override_num_blocks=blocks)
    decoder = decode.DecodeRows(manifest.pixel_mode(cfg), manifest.side(cfg))
    return shards.map_batches(decoder.__call__, batch_size=1024, batch_format="numpy")


class Shared(NamedTuple):
    """A Dataset in the object store: one copy a node, read without copying."""

    refs: dict[str, Any]
    classes: list[str]
    mean: list[float]
    std: list[float]

    def get(self) -> Dataset:
        """The dataset; its arrays are read-only views of the object store."""
        names = list(self.refs)
        parts = dict(zip(names, ray.get([self.refs[name] for name in names]), strict=True))
        return Dataset(parts["train"], parts["val"], parts["test"], self.classes, self.mean, self.std)


def share(data: Dataset) -> Shared:
    """Put a dataset into the object store."""
    refs = {name: ray.put(getattr(data, name)) for name in ("train", "val", "test")}
    return Shared(refs, data.classes, data.mean, data.std)
