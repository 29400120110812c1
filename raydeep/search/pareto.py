"""Fronts, pure: which points no other point beats."""

from __future__ import annotations

from collections.abc import Sequence


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
