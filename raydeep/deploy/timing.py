"""Latency: models and baselines called in turn, warmed, batch by batch and thread by thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Call = Callable[[np.ndarray], Any]  # uint8 NHWC pictures → logits

ROUND_S = 0.01  # seconds of calls a contender and round
LIMIT_S = 15.0  # seconds of all rounds of one batch size and thread count: large networks get fewer rounds


class Timed(NamedTuple):
    """Seconds of one contender."""

    rounds: np.ndarray  # float64 of shape [rounds]: median of the calls of a round
    calls: np.ndarray  # float64 of shape [calls]: every call

    def facts(self) -> dict[str, Any]:
        """Median and 95th percentile over all calls, in milliseconds."""
        return {
            "median_ms": float(np.median(self.calls) * 1e3), "p95_ms": float(np.percentile(self.calls, 95) * 1e3),
            "rounds": len(self.rounds), "calls": len(self.calls),
        }  # fmt: skip


def interleaved(calls: list[Call], example: np.ndarray, rounds: int, limit_s: float = LIMIT_S) -> list[Timed]:
    """Time calls in turn, so that what else the machine does hits all alike.

    Args:
        calls: the contenders.
        example: uint8 NHWC.
        rounds: in each, every contender is called for ROUND_S, once at least.
        limit_s: no further round begins after so many seconds.

    Returns:
        One a contender. Two warm-up calls each are left out.
    """
    for call in calls:
        call(example)
        call(example)
    seen: list[list[np.ndarray]] = [[] for _ in calls]
    begun = time.perf_counter()
    for r in range(rounds):
        if r and time.perf_counter() - begun > limit_s:
            break
        for call, found in zip(calls, seen, strict=True):
            ends = [time.perf_counter()]
            while len(ends) == 1 or ends[-1] - ends[0] < ROUND_S:
                call(example)
                ends.append(time.perf_counter())
            found.append(np.diff(ends))
    return [Timed(np.array([np.median(r) for r in found]), np.concatenate(found)) for found in seen]


def ratio(base: Timed, other: Timed) -> tuple[float, float]:
    """How many times as fast as the base: median over rounds of the paired ratios, and half their middle spread."""
    ratios = base.rounds / other.rounds
    low, high = np.percentile(ratios, [25, 75])
    return float(np.median(ratios)), float((high - low) / 2)
