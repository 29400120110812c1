"""Asynchronous successive halving for several objectives, pure: scheduler.py makes a Ray Tune scheduler of it.

ASHA (Li et al., arXiv 1810.05934) with promotion by Pareto rank as in multi-objective ASHA (Schmucker et al., arXiv
2106.12639). Ray's own schedulers know one metric. Trials stop at each rung; of the n that have reached it, the best
n // reduction may go on, whenever there is room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from raydeep.search import pareto


class Rungs:
    """Who has come how far with which result, and who may go on. Pure."""

    def __init__(self, count: int, reduction: int = 3, spread: Literal["crowding", "epsilon_net"] = "crowding") -> None:
        """Begin.

        Args:
            count: rungs in all.
            reduction: one of so many goes on.
            spread: who goes first within a front: see pareto.ranked.
        """
        self.reduction, self.spread = reduction, spread
        self.results: list[dict[Any, tuple[tuple[float, ...], float]]] = [{} for _ in range(count)]
        self.left: list[set[Any]] = [set() for _ in range(count)]  # who is no longer waiting there
        self.best: list[list[Any] | None] = [None] * count  # who may go on, until the next result

    def add(self, trial: Any, rung: int, point: Sequence[float], violation: float = 0.0) -> None:
        """A trial has come through a rung.

        Args:
            trial: any name.
            rung: from 0.
            point: coordinates, to be minimised.
            violation: of constraints, 0 where they are met.
        """
        self.results[rung][trial] = (tuple(point), violation)
        self.best[rung] = None

    def candidates(self) -> Iterator[tuple[Any, int]]:
        """Who may go on, and to which rung: from the highest rung down, of each the best first."""
        for rung in range(len(self.results) - 2, -1, -1):
            for trial in self._top(rung):
                if trial not in self.left[rung]:
                    yield trial, rung + 1

    def go(self, trial: Any, rung: int) -> None:
        """A trial is on its way to a rung, or has been taken out (rung: the one after where it waits)."""
        for below in range(rung):
            self.left[below].add(trial)

    def drop(self, trial: Any) -> None:
        """A trial goes nowhere any more; its results still count."""
        self.go(trial, len(self.results))

    def _top(self, rung: int) -> list[Any]:
        if self.best[rung] is None:
            names = list(self.results[rung])
            count = len(names) // self.reduction
            found = list(self.results[rung].values())
            order = pareto.ranked([p for p, _ in found], [v for _, v in found], self.spread) if count else []
            self.best[rung] = [names[i] for i in order[:count]]
        return self.best[rung] or []
