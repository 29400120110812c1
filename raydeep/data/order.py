"""Which sample is at which position of which epoch. Pure: no state, no arrival order, no cluster.

Everything is a function of (seed, epoch, rows, batch size). A world of N workers only divides each global
batch, so the sequence of global batches is the same for any N and a resume continues it exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ORDER, DRAWS, GROUPS, WINDOW, SHARDS = 0x0D, 0xA6, 0x6A, 0x71, 0x5D  # streams of the counter-based generator


def _rng(stream: int, seed: int, epoch: int, step: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, step, epoch]))


def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The permutation of an epoch: int64 of shape [rows], every row exactly once."""
    return _rng(ORDER, seed, epoch).permutation(rows)


def stream_order(seed: int, epoch: int, groups: np.ndarray, window_rows: int, batch_size: int) -> np.ndarray:
    """The order of an epoch that can be read from disk: int64 of shape [rows], every row exactly once.

    The row groups are shuffled and cut into windows of at least `window_rows` rows; the rows of a window are
    shuffled together. Inside each global batch rows stand in the order of their groups, so that a worker, which
    takes a contiguous share, reads few of them.

    Args:
        seed: of the job.
        epoch: from 0.
        groups: rows of each row group, int64 of shape [groups]; row r of group g is row sum(groups[:g]) + r.
        window_rows: rows that are shuffled together; it bounds what a world holds decoded.
        batch_size: the global batch.
    """
    starts = np.cumsum(groups) - groups
    chosen = _rng(GROUPS, seed, epoch).permutation(len(groups))
    sizes = groups[chosen]
    place = np.repeat(np.arange(len(chosen)), sizes)  # of its group in the shuffled order, a row
    rows = np.arange(len(place)) - np.repeat(np.cumsum(sizes) - sizes - starts[chosen], sizes)
    start = done = 0
    for k, size in enumerate(sizes):
        done += int(size)
        if done - start >= window_rows or k == len(sizes) - 1:
            shuffled = start + _rng(WINDOW, seed, epoch, start).permutation(done - start)
            rows[start:done], place[start:done] = rows[shuffled], place[shuffled]
            start = done
    batch = np.arange(len(rows)) // batch_size
    return rows[np.lexsort((place, batch))]


def steps_per_epoch(rows: int, batch_size: int, drop_last: bool = True) -> int:
    """Global batches in an epoch; `drop_last` leaves out one that is not full (the order changes each epoch)."""
    return rows // batch_size if drop_last else -(-rows // batch_size)


def global_batch(order: np.ndarray, step: int, batch_size: int) -> np.ndarray:
    """Rows of one global batch: int64 of shape [batch_size], fewer in a last one that is kept."""
    return order[step * batch_size : (step + 1) * batch_size]


def cut(values: np.ndarray, parts: int, multiple: int = 1) -> list[np.ndarray]:
    """Contiguous parts, cut at multiples of `multiple`, which differ by one of these at most; some may be empty."""
    units = -(-len(values) // multiple)
    ends = [min(len(values), multiple * (units // parts * (i + 1) + min(i + 1, units % parts))) for i in range(parts)]
    return [values[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def share(batch: np.ndarray, rank: int, world: int, multiple: int = 1) -> np.ndarray:
    """The contiguous part of a global batch that one worker takes; see cut."""
    return cut(batch, world, multiple)[rank]


def draws(seed: int, epoch: int, step: int, batch_size: int, width: int) -> np.ndarray:
    """Uniform numbers of a global batch: float64 of shape [batch_size, width] in [0, 1).

    Row i belongs to position i of the global batch, whichever worker takes it. A larger width leaves the columns
    before as they are.
    """
    if not width:
        return np.empty((batch_size, 0))
    return np.ascontiguousarray(_rng(DRAWS, seed, epoch, step).random((width, batch_size)).T)


def order_hash(order: np.ndarray, batch_size: int, drop_last: bool = True) -> str:
    """16 hex digits that name the sequence of global batches of an epoch."""
    used = order[: steps_per_epoch(len(order), batch_size, drop_last) * batch_size]
    return hashlib.sha256(f"{batch_size}:".encode() + np.ascontiguousarray(used, "<i8").tobytes()).hexdigest()[:16]


def eval_range(rows: int, rank: int, world: int) -> tuple[int, int]:
    """Rows [start, stop) that one worker evaluates; together the workers take every row exactly once."""
    return rows * rank // world, rows * (rank + 1) // world


def stratified_split(labels: np.ndarray, fractions: dict[str, float], seed: int) -> np.ndarray:
    """Assign rows to splits, the same share of every class in each.

    Args:
        labels: int64 of shape [rows].
        fractions: split name → share of the rows; what is left is train. A class of two rows or more gives
            at least one row to each split as long as one stays in train.
        seed: of the choice.

    Returns:
        str array of shape [rows].
    """
    out = np.full(len(labels), "train", dtype="<U5")
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = rows[_rng(ORDER, seed, int(label), 1).permutation(len(rows))]
        for name, fraction in fractions.items():
            take = min(max(1, round(fraction * np.sum(labels == label))), len(rows) - 1)
            out[rows[:take]] = name
            rows = rows[take:]
    return out


def shard_order(blocks: np.ndarray, seed: int) -> np.ndarray:
    """The order in which the rows of a source are put into shards: int64 of shape [rows].

    Blocks come in a random order, the rows of a block together and in their own order.

    Args:
        blocks: the block of each row, from 0: int64 of shape [rows].
        seed: of the choice.
    """
    place = _rng(SHARDS, seed, 0).permutation(int(blocks.max(initial=-1)) + 1)
    return np.argsort(place[blocks], kind="stable")


def shuffled(rows: int, seed: int, number: int) -> np.ndarray:
    """The order of the rows inside shard `number`: int64 of shape [rows]."""
    return _rng(SHARDS, seed, number, 1).permutation(rows)


class Plan(NamedTuple):
    """What a worker reads, and where each row of its batches is found in it."""

    units: list[np.ndarray]  # rows to read together, int64
    unit: np.ndarray  # unit of each row of the batches, int64 of shape [rows]
    offset: np.ndarray  # its place inside the unit, int64 of shape [rows]


def fetch_plan(batches: Sequence[np.ndarray], groups: np.ndarray, unit_rows: int) -> Plan:
    """Cut what a worker's batches of one epoch need into units, in the order in which they are needed.

    Units follow the row groups, so that a group is read once, or as often as `unit_rows` cuts it.

    Args:
        batches: rows of each of the worker's batches, in order, int64 each.
        groups: rows of each row group, int64 of shape [groups].
        unit_rows: most rows of a unit.
    """
    rows = np.concatenate([np.empty(0, np.int64), *batches])
    group = np.searchsorted(np.cumsum(groups), rows, side="right")
    _, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    sequence = np.argsort(first[inverse], kind="stable")  # groups by first need, inside a group by need
    place = np.empty(len(rows), np.int64)
    place[sequence] = np.arange(len(rows))
    units = [rows[sequence[start : start + unit_rows]] for start in range(0, len(rows), unit_rows)]
    return Plan(units, place // unit_rows, place % unit_rows)


def few(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Sorted rows of at most `per_class` pictures a class, chosen by seed; nested as `per_class` grows."""
    order = _rng(ORDER, seed, 0, 2).permutation(len(labels))
    picked = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(picked))
