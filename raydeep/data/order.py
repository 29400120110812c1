"""Which sample is at which position of which epoch. Pure: no state, no arrival order, no cluster.

Everything is a function of (seed, epoch, rows, batch size). A world of N workers only divides each global
batch, so the sequence of global batches is the same for any N and a resume continues it exactly.
"""

from __future__ import annotations

import hashlib

import numpy as np

ORDER, DRAWS = 0x0D, 0xA6  # streams of the counter-based generator


def _rng(stream: int, seed: int, epoch: int, step: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, step, epoch]))


def epoch_order(seed: int, epoch: int, rows: int) -> np.ndarray:
    """The permutation of an epoch: int64 of shape [rows], every row exactly once."""
    return _rng(ORDER, seed, epoch).permutation(rows)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Whole global batches in an epoch; the rows left over come in other epochs (the order changes)."""
    return rows // batch_size


def global_batch(order: np.ndarray, step: int, batch_size: int) -> np.ndarray:
    """Rows of one global batch: int64 of shape [batch_size]."""
    return order[step * batch_size : (step + 1) * batch_size]


def share(batch: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The contiguous part of a global batch that one worker takes; shares differ by one row at most."""
    return np.array_split(batch, world)[rank]


def draws(seed: int, epoch: int, step: int, batch_size: int, width: int) -> np.ndarray:
    """Uniform numbers of a global batch: float64 of shape [batch_size, width] in [0, 1).

    Row i belongs to position i of the global batch, whichever worker takes it.
    """
    return _rng(DRAWS, seed, epoch, step).random((batch_size, width))


def order_hash(order: np.ndarray, batch_size: int) -> str:
    """16 hex digits that name the sequence of global batches of an epoch."""
    used = order[: steps_per_epoch(len(order), batch_size) * batch_size]
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


def few(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Sorted rows of at most `per_class` pictures a class, chosen by seed; nested as `per_class` grows."""
    order = _rng(ORDER, seed, 0, 2).permutation(len(labels))
    picked = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(picked))
