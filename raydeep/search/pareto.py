"""Fronts, pure: which points no other point beats, in which order the others follow, how much they dominate.

N points of K coordinates each, all minimised. Point a dominates b if it is no worse in every coordinate and better
in one. `non_dominated` takes points as they come; the other functions raise ValueError if a coordinate is not finite
or points differ in length.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Points = Sequence[Sequence[float]]


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


def smallest_close(rows: Sequence[dict[str, Any]], dense: float, by: str = "bytes") -> dict[str, Any] | None:
    """The smallest model whose validation accuracy is within 1 point of the dense model's.

    Chosen on validation, so that the test accuracy quoted beside it is not picked for being high.

    Args:
        rows: with `val_accuracy` and the column `by`; those without it don't count.
        dense: validation accuracy of the dense model.
        by: the column that is to be small.
    """
    close = [row for row in rows if dense - row["val_accuracy"] <= CLOSE + 1e-9 and row.get(by) is not None]
    return min(close, key=lambda row: (row[by], *by_accuracy(row)), default=None)


def by_accuracy(row: dict[str, Any]) -> tuple[float, float, str]:
    """What the most accurate models are first by; of equal ones the smaller, so that their order does not matter."""
    return -row["val_accuracy"], row.get("bytes") or 0, str(row.get("trial"))


def fronts(points: Points) -> list[list[int]]:
    """Non-dominated sorting: no point dominates one of front 0, only points of fronts 0 to f one of front f + 1.

    Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", section III-A. One pass over the
    sorted points: a point is one front behind the last of those that dominate it. O(N log N) time for two coordinates,
    else O(K N^2); O(K N) memory.

    Returns:
        Indices by front, rising within each; every index once. Equal points are in the same front.
    """
    values_NK = _values(points)
    order = np.lexsort(values_NK.T[::-1])  # by the first coordinate, then the others: dominating points come first
    values_NK = values_NK[order]
    front_N = _behind_two(values_NK) if values_NK.shape[1:] == (2,) else _behind(values_NK)
    found: list[list[int]] = [[] for _ in range(front_N.max(initial=-1) + 1)]
    for place in np.argsort(order):  # by index
        found[front_N[place]].append(int(order[place]))
    return found


def _behind(values_NK: np.ndarray) -> np.ndarray:
    """Front of each point, the points sorted by the first coordinate, then the others."""
    front_N = np.zeros(len(values_NK), int)
    for i in range(1, len(values_NK)):
        above = values_NK[:i]
        dominating = (above <= values_NK[i]).all(1) & (above < values_NK[i]).any(1)
        front_N[i] = front_N[:i].max(where=dominating, initial=-1) + 1
    return front_N


def _behind_two(values_N2: np.ndarray) -> np.ndarray:
    """The same for two coordinates: within a front the second one falls, so its last point tells for the front."""
    front_N = np.zeros(len(values_N2), int)
    lasts: list[float] = []  # second coordinate of the last point of each front: rises from front to front
    before: list[float] = []
    for i, point in enumerate(values_N2.tolist()):
        front = int(front_N[i - 1]) if point == before else bisect_right(lasts, point[1])
        lasts[front : front + 1] = [point[1]]
        front_N[i], before = front, point
    return front_N


def crowding(points: Points) -> list[float]:
    """Crowding distances: the gap between a point's two neighbours over the range, summed over the coordinates.

    Deb et al. 2002 (NSGA-II), section III-B. The points are one front, as a rule.

    Returns:
        N distances: infinite for the first and the last point in some coordinate. Points that are equal in a
        coordinate stand there in the order of their indices, so one of them is the end. A coordinate in which all
        points are equal adds 0 and has no ends: a single point has distance 0.
    """
    raw_NK = _values(points)
    values_NK, ranges_K = _scaled(raw_NK)
    distances_N = np.zeros(len(values_NK))
    for raw_N, column_N, extent in zip(raw_NK.T, values_NK.T, ranges_K, strict=True):
        if extent > 0:
            order = np.argsort(raw_N, kind="stable")  # scaled, tiny differences may vanish
            column_N = column_N[order]
            distances_N[order[1:-1]] += (column_N[2:] - column_N[:-2]) / extent
            distances_N[order[[0, -1]]] = np.inf
    return distances_N.tolist()


def epsilon_net(points: Points) -> list[int]:
    """All indices, each the farthest from those before it, so that every beginning of the list is spread out.

    The order within a front of multi-objective ASHA: Schmucker et al. 2021 (arXiv 2106.12639), after Clarkson 2006,
    "Nearest-neighbor searching and metric space dimensions". Distances are Euclidean, each coordinate scaled to
    [0, 1] over the points (one in which all are equal counts for nothing). The points are one front, as a rule.

    Returns:
        N indices, first the best point in the first coordinate. Ties go to the lowest index, here and after.
    """
    values_NK, ranges_K = _scaled(_values(points))
    ranges_K[ranges_K == 0] = 1
    gaps_N = np.full(len(values_NK), np.inf)  # squared distance to the nearest point taken; -1: taken itself
    net: list[int] = []
    while len(net) < len(values_NK):
        taken = int(gaps_N.argmax() if net else values_NK[:, 0].argmin())
        net.append(taken)
        gaps_N = np.minimum(gaps_N, (((values_NK - values_NK[taken]) / ranges_K) ** 2).sum(1))
        gaps_N[taken] = -1
    return net


def _by_crowding(points: Points) -> list[int]:
    return np.argsort(-np.array(crowding(points)), kind="stable").tolist()


# One front's points -> all their indices, best first.
SPREADS: dict[str, Callable[[Points], list[int]]] = {"crowding": _by_crowding, "epsilon_net": epsilon_net}


def ranked(points: Points, violations: Sequence[float] | None = None, spread: str = "crowding") -> list[int]:
    """All indices, best first: feasible before infeasible, then by front, then spread out within the front.

    The order of constrained NSGA-II (Deb et al. 2002, section VI). Fronts and distances are those of the feasible
    points alone.

    Args:
        points: [N, K].
        violations: N numbers >= 0, 0 for a feasible point; None: all are feasible. Infeasible points rank by these.
        spread: within a front by falling crowding distance ("crowding") or in `epsilon_net`'s order ("epsilon_net").

    Returns:
        N indices; ties go to the lowest.

    Raises:
        ValueError: a violation is negative or NaN, their number is not N, or the spread is unknown.
    """
    if spread not in SPREADS:
        raise ValueError(f"spread {spread!r}: expected one of {', '.join(SPREADS)}")
    _values(points)
    violations = [0.0] * len(points) if violations is None else violations
    if len(violations) != len(points):
        raise ValueError(f"{len(violations)} violations for {len(points)} points")
    for i, violation in enumerate(violations):
        if not violation >= 0:
            raise ValueError(f"violation {i} is {violation}: expected a number >= 0")
    feasible = [i for i, violation in enumerate(violations) if violation == 0]
    infeasible = sorted((i for i in range(len(points)) if violations[i] > 0), key=lambda i: (violations[i], i))
    order: list[int] = []
    for front in fronts([points[i] for i in feasible]):
        front = [feasible[i] for i in front]
        order += [front[i] for i in SPREADS[spread]([points[i] for i in front])]
    return order + infeasible


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """The volume that the points dominate below the reference (Zitzler and Thiele 1999), exact up to rounding.

    By slices across the last coordinate (While et al. 2006, "A faster algorithm for calculating hypervolume"): in
    2-D one sweep, in K-D of the order of N^(K-1) steps. A point that is not better than the reference (K coordinates)
    in every coordinate counts for nothing; dominated and equal points add nothing.
    """
    reference_K = _values([reference], "reference")[0]
    values_NK = _values(points)
    if len(points) and values_NK.shape[1] != len(reference_K):
        raise ValueError(f"points of {values_NK.shape[1]} coordinates, a reference of {len(reference_K)}")
    values_NK = values_NK[(values_NK < reference_K).all(1)]  # none of no points, whatever K
    return _volume(values_NK, reference_K) if len(values_NK) else 0.0


def _volume(values_NK: np.ndarray, reference_K: np.ndarray) -> float:
    """The same of N >= 1 points that are all better than the reference."""
    if len(reference_K) == 1:
        return float(reference_K[0] - values_NK.min())
    values_NK = values_NK[np.argsort(values_NK[:, -1], kind="stable")]
    heights_N = np.diff(values_NK[:, -1], append=reference_K[-1])
    if len(reference_K) == 2:
        return float((heights_N * (reference_K[0] - np.minimum.accumulate(values_NK[:, 0]))).sum())
    base = values_NK[:0, :-1]  # the front of the points so far without the last coordinate
    area = volume = 0.0
    for point, height in zip(values_NK[:, :-1], heights_N, strict=True):
        if not (base <= point).all(1).any():
            base = np.vstack([base[~(point <= base).all(1)], point])
            area = _volume(base, reference_K[:-1])
        volume += area * float(height)
    return volume


def _values(points: Points, name: str = "point") -> np.ndarray:
    """Float64 of shape [N, K]; ValueError for the first point that is not as long as point 0 or not finite."""
    for i, point in enumerate(points):
        if len(point) == 0 or len(point) != len(points[0]):
            raise ValueError(f"{name} {i} has {len(point)} coordinates: expected {len(points[0]) or 'at least 1'}")
        if not all(map(math.isfinite, point)):
            raise ValueError(f"{name} {i} is {tuple(point)}: expected finite coordinates")
    return np.array(points, np.float64).reshape(len(points), -1 if len(points) else 1)


def _scaled(values_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values with each coordinate over a power of 2 (exact, no difference overflows), and their ranges [K]."""
    values_NK = np.ldexp(values_NK, -np.frexp(np.abs(values_NK).max(0, initial=0))[1])
    return values_NK, np.ptp(values_NK, axis=0) if len(values_NK) else np.zeros(1)
