"""Fronts, pure: which points no other point beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def non_dominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other point dominates, all coordinates minimised.

    A point dominates another if it is no worse in every coordinate and better in one. Of equal points the
    first stays.

    Args:
        points: N points of K coordinates each.

    Returns:
        Indices sorted by the first coordinate, then the others.
    """
    order = sorted(range(len(points)), key=lambda i: (*points[i], i))
    front: list[int] = []
    for i in order:  # sorted: only an earlier point can dominate a later one
        if not any(all(a <= b for a, b in zip(points[j], points[i], strict=True)) for j in front):
            front.append(i)
    return front


def spread(indices: Sequence[int], most: int) -> list[int]:
    """At most `most` of the indices, evenly spaced, both ends kept."""
    if len(indices) <= most:
        return list(indices)
    if most == 1:
        return [indices[-1]]
    return [indices[round(k * (len(indices) - 1) / (most - 1))] for k in range(most)]


CLOSE = 0.01  # accuracy that a model may lose against the dense one and still stand for it (1 point)


def smallest_close(rows: Sequence[dict[str, Any]], dense: float) -> dict[str, Any] | None:
    """The smallest model whose validation accuracy is within 1 point of the dense model's.

    Chosen on validation, so that the test accuracy quoted beside it is not picked for being high.

    Args:
        rows: with `val_accuracy` and `bytes`.
        dense: validation accuracy of the dense model.
    """
    close = [row for row in rows if dense - row["val_accuracy"] <= CLOSE + 1e-9]
    return min(close, key=lambda row: row["bytes"], default=None)
