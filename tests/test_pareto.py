"""Fronts, their order and their volume, against brute force and against the published test fronts."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raydeep.search import pareto

Point = tuple[float, ...]


def point_lists(low: int, high: int, sizes: tuple[int, ...] = (2, 3), most: int = 12) -> st.SearchStrategy[list[Point]]:
    """Integer points on a grid so small that ties and duplicates are common."""
    return st.sampled_from(sizes).flatmap(
        lambda size: st.lists(st.tuples(*[st.integers(low, high)] * size), max_size=most)
    )


def any_floats(size: int) -> st.SearchStrategy[list[Point]]:
    """Up to the largest floats and the smallest."""
    return st.lists(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * size), max_size=8)


def dominates(a: Point, b: Point) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


# fronts


def peeled(points: list[Point]) -> list[list[int]]:
    """Takes off front after front by the definition."""
    left, found = list(range(len(points))), []
    while left:
        found.append([i for i in left if not any(dominates(points[j], points[i]) for j in left)])
        left = [i for i in left if i not in found[-1]]
    return found


@given(point_lists(0, 4, sizes=(1, 2, 3, 4), most=20))
def test_fronts_are_those_that_peeling_finds(points):
    assert pareto.fronts(points) == peeled(points)


@given(any_floats(2))
def test_fronts_of_any_floats(points):
    assert pareto.fronts(points) == peeled(points)


def test_equal_points_share_a_front():
    assert pareto.fronts([(2, 2), (1, 1), (2, 2), (1, 1), (0, 3)]) == [[1, 3, 4], [0, 2]]


@pytest.mark.parametrize("size", [2, 3])
def test_fronts_of_2000_points_at_once(size):
    points = np.random.default_rng(size).random((2000, size)).tolist()
    found = pareto.fronts(points)
    assert sorted(i for front in found for i in front) == list(range(2000))
    assert found[0] == sorted(pareto.non_dominated(points))


# crowding


def plain_crowding(points: list[Point]) -> list[float]:
    """Looks for each point's neighbours by (value, index), in rational numbers."""
    distances = []
    for i, point in enumerate(points):
        total: Fraction | float = Fraction(0)
        for k, value in enumerate(point):
            keys = [(Fraction(p[k]), j) for j, p in enumerate(points)]
            extent = max(keys)[0] - min(keys)[0]
            if extent == 0:
                continue
            below = [key for key in keys if key < (value, i)]
            above = [key for key in keys if key > (value, i)]
            total += (min(above)[0] - max(below)[0]) / extent if below and above else math.inf
        distances.append(float(total))
    return distances


@given(point_lists(-3, 3, sizes=(1, 2, 3)))
def test_crowding_is_that_of_plain_code(points):
    assert pareto.crowding(points) == pytest.approx(plain_crowding(points))


@example([(1.7404716470938773e-168, 0.0), (0.0, 0.0), (4.290498537581631e155, 0.0)])  # their ratio is no float
@given(any_floats(2))
def test_crowding_of_any_floats(points):
    assert pareto.crowding(points) == pytest.approx(plain_crowding(points))


def test_crowding_by_hand():
    assert pareto.crowding([(0, 4), (1, 2), (4, 0)]) == [math.inf, 2.0, math.inf]
    assert pareto.crowding([(0, 7), (1, 7), (4, 7)]) == [math.inf, 1.0, math.inf]  # the 7s add nothing
    assert pareto.crowding([(1e9, 4), (1e9 + 1, 2), (1e9 + 4, 0)]) == [math.inf, 2.0, math.inf]  # a narrow range
    assert pareto.crowding([(3, 3), (3, 3)]) == [0.0, 0.0]
    assert pareto.crowding([(0,), (0,), (1,), (2,), (2,)]) == [math.inf, 0.5, 1.0, 0.5, math.inf]
    assert pareto.crowding([]) == []


# epsilon net


def squared(a: tuple[Fraction, ...], b: tuple[Fraction, ...]) -> Fraction:
    return sum(((x - y) ** 2 for x, y in zip(a, b, strict=True)), Fraction(0))


def plain_net(points: list[Point]) -> list[int]:
    """The farthest point by its definition, in rational numbers; of equals the first."""
    if not points:
        return []
    columns = [[Fraction(value) for value in column] for column in zip(*points, strict=True)]
    scaled = list(zip(*([v / ((max(c) - min(c)) or 1) for v in c] for c in columns), strict=True))
    net = [min(range(len(points)), key=lambda i: points[i][0])]
    while len(net) < len(points):
        left = [i for i in range(len(points)) if i not in net]
        gaps = [min(squared(scaled[i], scaled[j]) for j in net) for i in left]
        net.append(left[gaps.index(max(gaps))])
    return net


@given(point_lists(0, 4))
def test_the_net_takes_the_farthest_point_ties_by_index(points):
    if points:  # corners that make each range 4: with quarters the distances are exact, and so are the ties
        size = len(points[0])
        points = [*points, (0,) * size, (4,) * size]
    assert pareto.epsilon_net(points) == plain_net(points)


@given(st.integers(2, 3), st.integers(1, 25), st.integers(0, 2**32 - 1))
def test_the_net_of_scattered_points(size, count, seed):
    points = (np.random.default_rng(seed).random((count, size)) * [1, 1e9, 1e-9][:size]).tolist()
    assert pareto.epsilon_net(points) == plain_net(points)


@given(any_floats(3))
def test_the_net_of_any_floats_is_a_permutation(points):
    net = pareto.epsilon_net(points)
    assert sorted(net) == list(range(len(points)))
    assert not net or net[0] == min(range(len(points)), key=lambda i: points[i][0])


def test_the_net_by_hand():
    line = [(0, 8), (1, 7), (2, 6), (3, 5), (4, 4), (5, 3), (6, 2), (7, 1), (8, 0)]
    assert pareto.epsilon_net(line) == [0, 8, 4, 2, 6, 1, 3, 5, 7]
    assert pareto.epsilon_net([(x, 1e6 * y) for x, y in line]) == [0, 8, 4, 2, 6, 1, 3, 5, 7]
    assert pareto.epsilon_net([(1, 1)] * 4) == [0, 1, 2, 3]


# ranks


@st.composite
def candidates(draw: st.DrawFn) -> tuple[list[Point], list[float]]:
    points = draw(point_lists(0, 4))
    violations = st.lists(st.sampled_from([0, 0, 0, 0.5, 2, math.inf]), min_size=len(points), max_size=len(points))
    return points, draw(violations)


@given(candidates(), st.sampled_from(["crowding", "epsilon_net"]))
def test_ranks(drawn, spread):
    points, violations = drawn
    order = pareto.ranked(points, violations, spread)
    assert sorted(order) == list(range(len(points)))
    feasible = [i for i in order if violations[i] == 0]
    assert order[: len(feasible)] == feasible
    assert order[len(feasible) :] == sorted(order[len(feasible) :], key=lambda i: (violations[i], i))
    for place, i in enumerate(feasible):
        assert not any(dominates(points[j], points[i]) for j in feasible[place + 1 :])


@given(candidates(), st.sampled_from(["crowding", "epsilon_net"]))
def test_ranks_go_by_front_then_by_spread(drawn, spread):
    points, violations = drawn
    feasible = [i for i in range(len(points)) if violations[i] == 0]
    expected = []
    for front in peeled([points[i] for i in feasible]):
        members = [feasible[i] for i in front]
        if spread == "crowding":
            distance = dict(zip(members, pareto.crowding([points[i] for i in members]), strict=True))
            expected += sorted(members, key=lambda i: (-distance[i], i))
        else:
            expected += [members[i] for i in pareto.epsilon_net([points[i] for i in members])]
    assert pareto.ranked(points, violations, spread)[: len(feasible)] == expected


@given(point_lists(0, 4))
def test_without_violations_all_are_feasible(points):
    assert pareto.ranked(points) == pareto.ranked(points, [0] * len(points), "crowding")


def test_ranks_by_hand():
    points = [(0, 4), (1, 3), (1.5, 2.5), (4, 0), (4, 4), (0, 0)]
    assert pareto.ranked(points, [0, 0, 0, 0, 0, 1]) == [0, 3, 2, 1, 4, 5]  # (0, 0) is the best, but not allowed
    assert pareto.ranked(points, [0, 0, 0, 0, 0, 1], "epsilon_net") == [0, 3, 2, 1, 4, 5]
    assert pareto.ranked(points, [3, 2, 0, 0, 2, 0]) == [5, 2, 3, 1, 4, 0]
    assert pareto.ranked([(1, 1)] * 4) == pareto.ranked([(1, 1)] * 4, spread="epsilon_net") == [0, 1, 2, 3]


def test_bad_violations_and_spreads_are_named():
    with pytest.raises(ValueError, match="1 violations for 2 points"):
        pareto.ranked([(1, 1), (2, 2)], [0])
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"violation 1 is {bad}"):
            pareto.ranked([(1, 1), (2, 2)], [0, bad])
    with pytest.raises(ValueError, match="spread 'grid': expected one of crowding, epsilon_net"):
        pareto.ranked([(1, 1)], spread="grid")


# hypervolume


def unit_cells(points: list[Point], low: int, reference: tuple[int, ...]) -> int:
    """Counts the grid cells, each by its lowest corner, that some point dominates."""
    cells = product(*(range(low, end) for end in reference))
    return sum(any(all(x <= c for x, c in zip(p, cell, strict=True)) for p in points) for cell in cells)


@given(point_lists(-1, 5, sizes=(1, 2, 3, 4)), st.tuples(*[st.integers(0, 4)] * 4))
def test_hypervolume_is_the_number_of_cells(points, reference):
    reference = reference[: len(points[0]) if points else 2]
    assert pareto.hypervolume(points, reference) == unit_cells(points, -1, reference)


@given(st.integers(1, 4), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_hypervolume_by_inclusion_and_exclusion(size, count, seed):
    values = np.random.default_rng(seed).random((count, size))
    boxes = [values[[i for i in range(count) if subset >> i & 1]].max(0) for subset in range(1, 2**count)]
    signs = [1 if subset.bit_count() % 2 else -1 for subset in range(1, 2**count)]
    expected = sum(sign * np.prod(0.9 - np.minimum(box, 0.9)) for sign, box in zip(signs, boxes, strict=True))
    assert pareto.hypervolume(values.tolist(), [0.9] * size) == pytest.approx(expected, abs=1e-12)


@given(point_lists(0, 5), point_lists(0, 5, sizes=(2,)))
def test_more_points_never_dominate_less_and_the_front_is_enough(points, more):
    reference = [5] * (len(points[0]) if points else 2)
    volume = pareto.hypervolume(points, reference)
    assert pareto.hypervolume([points[i] for i in pareto.non_dominated(points)], reference) == volume
    assert pareto.hypervolume([*points, *([*p, 0][: len(reference)] for p in more)], reference) >= volume


def test_points_at_the_reference_count_for_nothing():
    assert pareto.hypervolume([(0, 2), (2, 0), (3, 3)], (2, 2)) == 0.0
    assert pareto.hypervolume([(0, 2), (1, 1)], (2, 2)) == 1.0
    assert pareto.hypervolume([], (2, 2)) == 0.0


# The fronts of ZDT (Zitzler, Deb and Thiele 2000) and DTLZ (Deb et al. 2002) have known hypervolumes. Finite samples
# lie below them, and for samples on a grid the volume is a sum that can be written down.


@pytest.mark.parametrize("n", [1, 2, 10, 100, 1000])
def test_zdt1(n):
    """f2 = 1 - sqrt(f1), reference (1.1, 1.1): 1.21 - 1/3, the area below the curve.

    Sampled at f1 = (i / n)^2 the strips are (2 i + 1) / n^2 wide and 0.1 + i / n high; 0.11 lies beyond f1 = 1.
    """
    exact = 0.21 + Fraction((n - 1) * (4 * n + 1), 6 * n * n)
    volume = pareto.hypervolume([((i / n) ** 2, 1 - i / n) for i in range(n + 1)], (1.1, 1.1))
    assert volume == pytest.approx(float(exact), abs=1e-12)
    assert 0 < 1.21 - 1 / 3 - volume < 0.67 / n


@pytest.mark.parametrize("n", [1, 2, 10, 100, 1000])
def test_zdt2(n):
    """f2 = 1 - f1^2, reference (1.1, 1.1): 1.21 - 2/3.

    Sampled at f1 = i / n the strips are 1 / n wide and 0.1 + (i / n)^2 high; 0.11 lies beyond f1 = 1.
    """
    exact = 0.21 + Fraction((n - 1) * (2 * n - 1), 6 * n * n)
    volume = pareto.hypervolume([(i / n, 1 - (i / n) ** 2) for i in range(n + 1)], (1.1, 1.1))
    assert volume == pytest.approx(float(exact), abs=1e-12)
    assert 0 < 1.21 - 2 / 3 - volume < 0.51 / n


def lattice(n: int) -> np.ndarray:
    """All (i, j, k) with i + j + k = n: Das and Dennis' even spread over a triangle."""
    return np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)], float)


@pytest.mark.parametrize("n", [1, 2, 8, 16, 32])
def test_dtlz1(n):
    """f1 + f2 + f3 = 0.5, reference (1, 1, 1): 1 - 1/48, less the corner below the triangle.

    Sampled on the lattice, the cells (2 n)^-3 with a + b + c < n are not dominated, (n + 2 choose 3) of them.
    """
    volume = pareto.hypervolume((lattice(n) / (2 * n)).tolist(), (1, 1, 1))
    assert volume == pytest.approx(1 - math.comb(n + 2, 3) / (2 * n) ** 3, abs=1e-12)
    assert 0 < 1 - 1 / 48 - volume < 0.11 / n


def test_dtlz2():
    """f1^2 + f2^2 + f3^2 = 1, reference (1, 1, 1): 1 - pi/6, less an eighth of the ball."""
    limit = 1 - math.pi / 6
    sizes = [4, 8, 16, 32]  # each lattice holds the one before
    points = [lattice(n) / np.linalg.norm(lattice(n), axis=1, keepdims=True) for n in sizes]
    volumes = [pareto.hypervolume(p.tolist(), (1, 1, 1)) for p in points]
    assert volumes == sorted(set(volumes))
    for n, volume in zip(sizes, volumes, strict=True):
        assert 0 < limit - volume < 1.5 / n


# bad points


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "function",
    [pareto.fronts, pareto.crowding, pareto.epsilon_net, pareto.ranked, lambda p: pareto.hypervolume(p, (9, 9))],
    ids=["fronts", "crowding", "epsilon_net", "ranked", "hypervolume"],
)
def test_bad_points_are_named(function: Callable[[list[Point]], object], value):
    with pytest.raises(ValueError, match=r"point 2 is .*: expected finite"):
        function([(1, 2), (0, 0), (0, value), (value, 1)])
    with pytest.raises(ValueError, match="point 1 has 3 coordinates: expected 2"):
        function([(1, 2), (0, 0, 0)])
    with pytest.raises(ValueError, match="point 0 has 0 coordinates: expected at least 1"):
        function([()])


def test_the_index_is_that_among_all_points():
    with pytest.raises(ValueError, match="point 2 "):
        pareto.ranked([(1, 2), (0, 0), (0, math.nan)], [1, 0, 0])
    with pytest.raises(ValueError, match="point 1 "):  # infeasible ones too
        pareto.ranked([(1, 2), (0, math.nan)], [0, 1])


def test_a_bad_reference_is_named():
    with pytest.raises(ValueError, match="reference 0 is"):
        pareto.hypervolume([(1, 1)], (2, math.inf))
    with pytest.raises(ValueError, match="points of 2 coordinates, a reference of 3"):
        pareto.hypervolume([(1, 1)], (2, 2, 2))


# one front, and the choice from it


def brute_force(points: list[Point]) -> set[int]:
    return {i for i, p in enumerate(points) if not any(dominates(q, p) for q in points) and p not in points[:i]}


@given(point_lists(0, 6, sizes=(1, 2, 3), most=25))
def test_the_front_is_that_of_brute_force_in_the_order_of_its_points(points):
    front = pareto.non_dominated(points)
    assert set(front) == brute_force(points)
    assert [points[i] for i in front] == sorted(points[i] for i in front)
    assert len(front) == len(set(front))


def test_of_equal_points_the_first_stays():
    assert pareto.non_dominated([(2, 2), (1, 3), (2, 2), (1, 3)]) == [1, 0]


@given(st.integers(0, 40), st.integers(1, 12))
def test_spread_keeps_both_ends_and_the_order(count, most):
    indices = list(range(100, 100 + count))
    found = pareto.spread(indices, most)
    assert len(found) == min(count, most)
    assert found == sorted(set(found))
    if count and most > 1:
        assert (found[0], found[-1]) == (indices[0], indices[-1])


def test_spread_is_even():
    assert pareto.spread(range(9), 3) == [0, 4, 8]


def test_the_smallest_close_model_is_chosen_on_validation():
    rows = [
        {"val_accuracy": 0.99, "bytes": 900},
        {"val_accuracy": 0.97, "bytes": 300},  # exactly a point below
        {"val_accuracy": 0.969, "bytes": 100},
    ]
    assert pareto.smallest_close(rows, 0.98) is rows[1]
    assert pareto.smallest_close(rows, 1.1) is None
    assert pareto.smallest_close([], 0.5) is None


def test_the_most_accurate_come_first_of_equal_ones_the_smaller_and_then_by_trial():
    best_first = [
        {"val_accuracy": 0.9, "bytes": 900, "trial": 5},
        {"val_accuracy": 0.8, "trial": 6},  # of unknown size
        {"val_accuracy": 0.8, "bytes": 1, "trial": 1},
        {"val_accuracy": 0.8, "bytes": 2, "trial": 3},
        {"val_accuracy": 0.8, "bytes": 2, "trial": 4},
        {"val_accuracy": 0.7, "bytes": 0, "trial": 0},
    ]
    for rows in (best_first, best_first[::-1]):
        assert sorted(rows, key=pareto.by_accuracy) == best_first


def test_one_of_many_is_the_last():
    assert pareto.spread(range(100, 105), 1) == [104]


def test_points_of_other_lengths_have_no_front():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        pareto.non_dominated([(1, 2), (1,)])


def test_ties_of_crowding_go_by_index_however_many_they_are():
    points = [(float(i), float(40 - i)) for i in range(41)]
    assert pareto.ranked(points) == [0, 40, *range(1, 40)]


def test_integers_count_as_floats():
    assert pareto.hypervolume([(0, 0)], (2**40, 2**40)) == 2.0**80


def test_coordinates_of_very_different_size_count_alike():
    points = [(0.0, 4.0), (1.0, 2.0), (3.0, 1.0), (4.0, 0.0)]
    far = [(x * 1e307, y * 1e-300) for x, y in points]
    assert pareto.crowding(far) == pytest.approx(pareto.crowding(points))
    assert pareto.epsilon_net(far) == pareto.epsilon_net(points)
