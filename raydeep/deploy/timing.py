"""Latency: models and baselines called in turn, warmed, batch by batch and thread by thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Call = Callable[[np.ndarray], Any]  # uint8 NHWC pictures → logits

ROUND_S = 0.02  # seconds of calls a contender and round
SETTING_S = 15.0  # seconds of all rounds of one batch size and thread count, about: large networks get fewer rounds
LEAST_ROUNDS = 3


class Timed(NamedTuple):
    """Seconds of one contender."""

    rounds: np.ndarray  # float64 of shape [rounds]: mean of the calls of a round
    calls: np.ndarray  # float64 of shape [calls]: every call

    def facts(self) -> dict[str, Any]:
        """Median and 95th percentile over all calls, in milliseconds."""
        return {
            "median_ms": float(np.median(self.calls) * 1e3), "p95_ms": float(np.percentile(self.calls, 95) * 1e3),
            "rounds": len(self.rounds), "calls": len(self.calls),
        }  # fmt: skip


def interleaved(calls: list[Call], example: np.ndarray, rounds: int) -> list[Timed]:
    """Time calls in turn, so that what else the machine does hits all alike.

    Args:
        calls: the contenders.
        example: uint8 NHWC.
        rounds: in each, every contender runs for ROUND_S, once at least. Fewer, LEAST_ROUNDS at least, where they
            would take more than SETTING_S.

    Returns:
        One a contender. Two warm-up calls each are left out.
    """
    counts, a_round = [], 0.0
    for call in calls:
        call(example)
        start = time.perf_counter()
        call(example)
        seconds = max(1e-6, time.perf_counter() - start)
        counts.append(max(1, int(ROUND_S / seconds)))
        a_round += counts[-1] * seconds
    rounds = max(LEAST_ROUNDS, min(rounds, int(SETTING_S / a_round)))
    seen: list[list[np.ndarray]] = [[] for _ in calls]
    for _ in range(rounds):
        for i, call in enumerate(calls):
            ends = [time.perf_counter()]
            for _ in range(counts[i]):
                call(example)
                ends.append(time.perf_counter())
            seen[i].append(np.diff(ends))
    return [Timed(np.array([r.mean() for r in found]), np.concatenate(found)) for found in seen]


def ratio(base: Timed, other: Timed) -> tuple[float, float]:
    """How many times as fast as the base: median over rounds of the paired ratios, and half their middle spread."""
    ratios = base.rounds / other.rounds
    low, high = np.percentile(ratios, [25, 75])
    return float(np.median(ratios)), float((high - low) / 2)
