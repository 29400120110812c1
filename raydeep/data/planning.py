"""Which rows of a source go into which shard, and of which split. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from raydeep.data import order, sources
from raydeep.errors import DataError

if TYPE_CHECKING:
    from raydeep.sections import Data


class Task(NamedTuple):
    """One shard to write."""

    split: str
    number: int  # in its split
    rows: list[sources.Row]

    @property
    def name(self) -> str:
        """Of its shard."""
        return f"{self.split}-{self.number:05d}"


def plan(source: sources.Source, cfg: Data) -> list[Task]:
    """Cut the rows of a source into tasks. Pure.

    Train rows come in random order, so that any row group is a sample of the whole; rows that can only be read
    together (see Source.block) stay together.
    """
    names = _assign(source, cfg)
    tasks: list[Task] = []
    for split in sources.SPLITS:
        rows = [row for row, name in zip(source.rows, names, strict=True) if name == split]
        places = np.arange(len(rows))
        if split == "train":
            blocks = places
            if source.block is not None:
                numbers: dict[Any, int] = {}
                blocks = np.array([numbers.setdefault(source.block(row), len(numbers)) for row in rows])
            places = order.shard_order(blocks, cfg.split_seed)
        held, start, number = 0, 0, 0
        for i, place in enumerate(places.tolist()):
            held += _stored_bytes(rows[place], cfg)
            if held >= cfg.shard_bytes or i == len(rows) - 1:
                inside = np.sort(places[start : i + 1])  # read in the order of the source
                tasks.append(Task(split, number, [rows[j] for j in inside.tolist()]))
                held, start, number = 0, i + 1, number + 1
    return tasks


def _stored_bytes(row: sources.Row, cfg: Data) -> int:
    """About what a row takes in a shard."""
    if cfg.resize is None:
        return row.nbytes
    pixels = cfg.resize**2 * (1 if cfg.mode == "grey" else 3)
    return pixels if cfg.store == "decoded" else min(row.nbytes, pixels // 3)


def _assign(source: sources.Source, cfg: Data) -> list[str]:
    """Split of each row: the source's own where it has them, else stratified by seed."""
    own = {row.split for row in source.rows}
    fractions = {}
    if "test" not in own:
        fractions["test"] = cfg.test_fraction
    if "val" not in own:
        fractions["val"] = cfg.val_fraction
    labels = np.array([row.label for row in source.rows])
    open_rows = np.array([row.split in (None, "train") for row in source.rows])
    names = np.array([row.split or "train" for row in source.rows])
    if fractions and open_rows.any():
        names[open_rows] = order.stratified_split(labels[open_rows], fractions, cfg.split_seed)
    for split in sources.SPLITS:
        if not (names == split).any():
            raise DataError(f"{cfg.source} {cfg.path or ''}: the {split} split would be empty; give more pictures")
    return [str(name) for name in names]
