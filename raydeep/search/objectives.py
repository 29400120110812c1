"""What a search is after, pure: results as points to minimise, constraints, and the hypervolume that is reached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from raydeep.search import pareto
from raydeep.tuning import Constraint, Search

FIELDS = {
    "accuracy": "val_accuracy", "worst_class": "worst_class_accuracy", "bytes": "bytes", "latency": "latency_ms",
    "macs": "macs",
}  # fmt: skip
SHARES = ("accuracy", "worst_class")  # fractions of 1; the others are positive and count by their ratio
SLOWER = 2.0  # and those that take more than so many times its time
LOST = 0.10  # models that lose more accuracy than this against the dense one add nothing to the hypervolume


class Objectives(NamedTuple):
    """The objectives and constraints of a search."""

    modes: dict[str, str]  # objective → min or max, in order
    limits: list[Constraint]

    @classmethod
    def of(cls, cfg: Search) -> Objectives:
        """Those of a search section."""
        return cls({name: mode for name, mode in cfg.objectives.items()}, cfg.limits())  # noqa: C416

    @property
    def names(self) -> set[str]:
        """All that must be measured."""
        return {*self.modes, *(limit.objective for limit in self.limits)}

    @property
    def cost(self) -> str:
        """The column that an answer as accurate as the dense model is to have least of: the first that is no share."""
        costs = (name for name, mode in self.modes.items() if mode == "min" and name not in SHARES)
        return FIELDS[next(costs, "bytes")]

    @property
    def only_accuracy(self) -> bool:
        """Whether nothing but accuracy is asked for."""
        return set(self.modes) <= set(SHARES)

    def answer(self, rows: Sequence[dict[str, Any]], dense: float) -> dict[str, Any] | None:
        """The model that answers a search: what a run stands for, and its report names.

        The one with the least `cost` of those within 1 point of the dense model's validation accuracy, or the smallest
        where none has that measured; where nothing but accuracy is asked for, the most accurate one.

        Args:
            rows: models, with `val_accuracy` and `bytes`.
            dense: validation accuracy of the dense model.
        """
        if self.only_accuracy:
            return min(rows, key=pareto.by_accuracy, default=None)
        return pareto.smallest_close(rows, dense, self.cost) or pareto.smallest_close(rows, dense)

    def problem(self, row: Mapping[str, Any]) -> str | None:
        """Why a result can't be judged: a measure is missing or not finite; None if it can."""
        for name in sorted(self.names):
            value = row.get(FIELDS[name])
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                return f"its {name} is {value!r}, not a finite number"
            if name not in SHARES and value <= 0:
                return f"its {name} is {value!r}, not above 0"
        return None

    def point(self, row: Mapping[str, Any]) -> tuple[float, ...]:
        """A result as coordinates to minimise: errors as they are, sizes and times as powers of two."""
        return tuple(_coordinate(name, mode, row[FIELDS[name]]) for name, mode in self.modes.items())

    def violation(self, row: Mapping[str, Any]) -> float:
        """How far a result is from the constraints, summed: in accuracy, or in doublings; 0: it meets them."""
        total = 0.0
        for name, at_least, bound in self.limits:
            value = row[FIELDS[name]]
            if (value < bound) if at_least else (value > bound):
                total += abs(_scaled(name, value) - _scaled(name, bound)) or math.ulp(1.0)
        return total

    def better(self, new: Mapping[str, Any], old: Mapping[str, Any] | None) -> bool:
        """Whether a trial's new result takes the place of its old one: nearer to the constraints, or as near and in
        the first objective no worse.
        """
        if old is None:
            return True
        return (self.violation(new), self.point(new)[0]) <= (self.violation(old), self.point(old)[0])

    def reference(self, dense: Mapping[str, Any]) -> tuple[float, ...]:
        """The corner that hypervolume is measured from: LOST below dense accuracy, the dense size, twice its time."""
        out = []
        for name, mode in self.modes.items():
            value = dense[FIELDS[name]]
            if name in SHARES:
                value += -LOST if mode == "max" else LOST
            elif name == "latency":
                value *= SLOWER if mode == "min" else 1 / SLOWER
            out.append(_coordinate(name, mode, value))
        return tuple(out)

    def hypervolume(self, rows: Iterable[Mapping[str, Any]], dense: Mapping[str, Any]) -> float:
        """Of the results that meet the constraints, in points of accuracy × doublings (see `reference`)."""
        scale = math.prod(100.0 if name in SHARES else 1.0 for name in self.modes)
        points = [self.point(row) for row in rows if not self.violation(row)]
        return scale * pareto.hypervolume(points, self.reference(dense))

    def front(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        """Indices of the results that no other beats, of those that meet the constraints, if any does."""
        good = [i for i, row in enumerate(rows) if not self.violation(row)]
        if not good:
            least = min((self.violation(row) for row in rows), default=0.0)
            good = [i for i, row in enumerate(rows) if self.violation(row) == least]
        return [good[k] for k in pareto.non_dominated([self.point(rows[i]) for i in good])]

    def best(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Under each constraint, the index of the result that is best in the objectives it does not bound."""
        out = {}
        for limit in self.limits:
            alone = Objectives(self.modes, [limit])
            good = [i for i, row in enumerate(rows) if not alone.violation(row)]
            free = [k for k, name in enumerate(self.modes) if name != limit.objective] or [0]
            if good:
                best = min(good, key=lambda i: ([self.point(rows[i])[k] for k in free], self.point(rows[i])))
                out[f"{limit.objective} {'>=' if limit.at_least else '<='} {limit.bound:g}"] = best
        return out


def _scaled(name: str, value: float) -> float:
    return value if name in SHARES else math.log2(max(value, 1e-12))


def _coordinate(name: str, mode: str, value: float) -> float:
    return -_scaled(name, value) if mode == "max" else _scaled(name, value)
