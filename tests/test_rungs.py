"""Who goes on from a rung: successive halving as the papers tell it, against a plain reading of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydeep.search import pareto
from raydeep.search.rungs import Rungs

Point = tuple[float, ...]
Result = tuple[Point, float]  # and the violation
Step = tuple[bool, int, Point, float]  # who: a new trial or one in flight, which of them, and its result


def steps(size: int) -> st.SearchStrategy[list[Step]]:
    """What happens in a search: trials come in any order, several in flight; points on a small grid, so that ties
    are common; some violate constraints.
    """
    point = st.tuples(*[st.integers(0, 5).map(float)] * size)
    violation = st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0])
    return st.lists(st.tuples(st.booleans(), st.integers(0, 3), point, violation), min_size=1, max_size=40)


def plain(
    results: list[dict[int, Result]], gone: list[set[int]], reduction: int, spread: str
) -> tuple[int, int] | None:
    """get_job of Li et al. (arXiv 1810.05934), algorithm 2: from the highest rung down, the best of the top 1/reduction
    that has not gone on yet; the order is that of Schmucker et al. (2106.12639).
    """
    for rung in range(len(results) - 2, -1, -1):
        names = list(results[rung])
        found = [results[rung][name] for name in names]
        order = pareto.ranked([p for p, _ in found], [v for _, v in found], spread)
        top = [names[i] for i in order[: len(names) // reduction]]
        left = [name for name in top if name not in gone[rung]]
        if left:
            return left[0], rung + 1
    return None


@pytest.mark.parametrize("spread", ["crowding", "epsilon_net"])
@given(st.integers(1, 3).flatmap(steps), st.integers(2, 4), st.integers(1, 4))
def test_who_goes_on_is_whom_the_paper_says(spread, drawn, reduction, count):
    rungs = Rungs(count, reduction, spread)
    results: list[dict[int, Result]] = [{} for _ in range(count)]
    gone: list[set[int]] = [set() for _ in range(count)]
    flying: list[tuple[int, int]] = []
    trials = 0
    for new, which, point, violation in drawn:
        found = next(rungs.candidates(), None)
        assert found == plain(results, gone, reduction, spread)
        if found is None or (new and len(flying) < 3):
            found, trials = (trials, 0), trials + 1
        name, rung = found
        if rung:
            assert name not in gone[rung - 1]  # nobody twice
            gone[rung - 1].add(name)
        rungs.go(name, rung)
        flying.append(found)
        name, rung = flying.pop(which % len(flying))
        results[rung][name] = (point, violation)
        rungs.add(name, rung, point, violation)
        for below, those in enumerate(gone[:-1]):
            assert those >= set(results[below + 1])
            top = len(results[below]) // reduction
            assert bool(those) <= bool(top)


@given(steps(1).map(lambda drawn: [(point, violation) for _, _, point, violation in drawn]), st.integers(2, 4))
def test_of_results_that_all_came_first_the_share_goes_and_feasible_ones_before_others(results, reduction):
    rungs = Rungs(2, reduction)
    for name, (point, violation) in enumerate(results):
        rungs.add(name, 0, point, violation)
    went = []
    while (found := next(rungs.candidates(), None)) is not None:
        rungs.go(*found)
        went.append(found)
    assert len(went) == len(results) // reduction
    feasible = sum(v == 0 for _, v in results)
    assert sum(results[name][1] == 0 for name, _ in went) == min(feasible, len(went))
    assert {rung for _, rung in went} <= {1}


@given(st.lists(st.integers(0, 10**6), unique=True, min_size=1, max_size=60), st.integers(2, 4))
def test_with_one_objective_the_order_is_that_of_asha(values, reduction):
    rungs = Rungs(2, reduction)
    for name, value in enumerate(values):
        rungs.add(name, 0, (float(value),))
        expected = sorted(range(name + 1), key=values.__getitem__)[: (name + 1) // reduction]
        assert list(rungs.candidates()) == [(best, 1) for best in expected]


def test_the_highest_rung_comes_first_and_of_each_the_best():
    rungs = Rungs(3, 2)
    for name in range(4):
        rungs.add(name, 0, (float(-name),))
    for name in (0, 1):
        rungs.go(name, 1)
        rungs.add(name, 1, (float(name),))
    assert list(rungs.candidates()) == [(0, 2), (3, 1), (2, 1)]
    rungs.go(0, 2)
    assert list(rungs.candidates()) == [(3, 1), (2, 1)]


def test_too_few_results_let_nobody_go_on():
    rungs = Rungs(2, 3)
    for name in range(2):
        rungs.add(name, 0, (0.0, 0.0))
        assert list(rungs.candidates()) == []
    rungs.add(2, 0, (1.0, 1.0))
    assert [name for name, _ in rungs.candidates()] in ([0], [1])


def test_from_the_last_rung_nobody_goes_on():
    rungs = Rungs(1, 2)
    for name in range(9):
        rungs.add(name, 0, (float(name),))
    assert list(rungs.candidates()) == []


def test_who_is_dropped_does_not_go_on_but_still_counts():
    rungs = Rungs(2, 2)
    for name in range(4):
        rungs.add(name, 0, (float(name),))
    rungs.drop(0)
    assert list(rungs.candidates()) == [(1, 1)]  # not trial 2: trial 0 is one of the best two
    rungs.drop(1)
    assert list(rungs.candidates()) == []


def test_a_better_result_later_on_takes_nobody_back():
    """Asynchronous: who went on early is not recalled, so more than n // reduction may have gone in the end."""
    rungs = Rungs(2, 2)
    gone = []
    for value in (9.0, 8.0, 7.0, 6.0, 5.0, 4.0):
        rungs.add(value, 0, (value,))
        for name, rung in list(rungs.candidates()):
            rungs.go(name, rung)
            gone.append(name)
    assert gone == [8.0, 7.0, 6.0, 5.0, 4.0]  # of six
