"""Population-based training (Jaderberg et al., arXiv 1711.09846), pure: who copies whom, and what is tried next.

Ray's own PopulationBasedTraining keeps the population in a pickle; here it is a function of what the ledger holds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from raydeep.search import pareto
from raydeep.search.space import Config, Space, counts
from raydeep.tuning import Range, choices

QUANTILE = 0.25  # so many of the worst copy so many of the best
FACTORS = (0.8, 1.2)
RESAMPLE = 0.25  # chance that a key is drawn anew


def exploit(
    points: Sequence[tuple[float, ...]], violations: Sequence[float], me: int, chance: random.Random
) -> int | None:
    """Whom a member copies: one of the best quarter if it is of the worst quarter, else None.

    Args:
        points: of all members at the same rung, to be minimised.
        violations: of constraints.
        me: index of the member.
        chance: draws.
    """
    count = int(len(points) * QUANTILE)
    order = pareto.ranked(points, violations)
    if count == 0 or order.index(me) < len(order) - count:
        return None
    return order[chance.randrange(count)]


def explore(space: Space, config: Config, chance: random.Random) -> Config:
    """A configuration near another: numbers of ranges × 0.8 or 1.2, listed ones a place further, some drawn anew."""
    out: Config = {}
    for name, dimension in space.items():
        if not counts(dimension, out):
            continue
        anew = chance.random() < RESAMPLE or name not in config
        listed = choices(dimension)
        if isinstance(dimension, Range) and not listed:
            out[name] = _draw(dimension, chance) if anew else _near(dimension, config[name], chance)
        elif anew or config[name] not in listed:
            out[name] = chance.choice(listed)
        else:
            place = listed.index(config[name]) + chance.choice((-1, 0, 1))
            out[name] = listed[min(max(place, 0), len(listed) - 1)]
    return out


def _draw(dimension: Range, chance: random.Random) -> Any:
    low, high = dimension.low, dimension.high
    value = low * (high / low) ** chance.random() if dimension.log else chance.uniform(low, high)
    return round(value) if dimension.whole else float(f"{value:.6g}")


def _near(dimension: Range, value: Any, chance: random.Random) -> Any:
    moved = min(max(value * chance.choice(FACTORS), dimension.low), dimension.high)
    return round(moved) if dimension.whole else float(f"{moved:.6g}")
