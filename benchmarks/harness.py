"""What the benchmarks share: arguments, interleaved timing, results with targets, one JSON line at the end.

A benchmark is a script, run as `python benchmarks/NAME.py [--quick] [--data FOLDER] [--save]`. It times its peers side
by side in one process, prints readable lines, and prints as its last line one JSON object:

    {"benchmark": ..., "results": [{"name", "value", "unit", "target", "met", ...}], "provenance": {...}}
"""

from __future__ import annotations

import argparse
import gc
import json
import operator
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def arguments(about: str | None, **extra: dict[str, Any]) -> argparse.Namespace:
    """Parse the command line.

    Args:
        about: the script's docstring; its first line is the help.
        extra: further options: name → keywords of `add_argument`.
    """
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under five minutes")
    parser.add_argument("--data", metavar="FOLDER", help="the data sets (else the environment's RAYDEEP_DATA)")
    parser.add_argument("--save", action="store_true", help="write the JSON to benchmarks/results/")
    for name, keywords in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **keywords)
    return parser.parse_args()


def data_folder(args: argparse.Namespace, *needed: str) -> Path:
    """The folder of the data sets; ends the script with a message if it or a set in it is absent."""
    given = args.data or os.environ.get("RAYDEEP_DATA")
    if not given:
        sys.exit("no data: give --data FOLDER or set RAYDEEP_DATA to the folder that holds the data sets")
    folder = Path(given).expanduser()
    for path in [folder, *(folder / name for name in needed)]:
        if not path.exists():
            sys.exit(f"no data: {path} is not there; give --data FOLDER with {', '.join(needed) or 'the data sets'}")
    return folder


class Timing(NamedTuple):
    """Seconds of one peer over all rounds."""

    seconds: list[float]

    @property
    def median_s(self) -> float:
        """The middle round."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles, as a share of the median: about the error of one round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median_s


def interleaved(peers: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Time the peers in turn, round after round, so that a slow spell of the machine hits all of them.

    Args:
        peers: name → what is timed.
        rounds: that count.
        warmup: rounds before them that do not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(warmup + rounds):
            names = list(peers) if turn % 2 else list(peers)[::-1]  # no peer always follows the same other
            for name in names:
                start = time.perf_counter()
                peers[name]()
                taken = time.perf_counter() - start
                if turn >= warmup:
                    seconds[name].append(taken)
            gc.collect()
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(found) for name, found in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> tuple[float, float]:
    """How many times faster `fast` is: the median over the rounds of each round's ratio, and its spread."""
    rounds = Timing([s / f for s, f in zip(slow.seconds, fast.seconds, strict=True)])
    return rounds.median_s, rounds.spread


def result(name: str, value: float, unit: str, target: str | None = None, **facts: Any) -> dict[str, Any]:
    """One line of the results, printed too.

    Args:
        name: what was measured.
        value: of it.
        unit: ratio, images/s, points, …
        target: such as ">= 5.0", or None if the value is only for information.
        facts: n, spread, what else belongs to it.
    """
    row: dict[str, Any] = {"name": name, "value": float(f"{value:.6g}"), "unit": unit}
    if target is not None:
        sign, bound = target.split()
        row |= {"target": target, "met": COMPARE[sign](value, float(bound))}
    row |= facts
    wanted = f"   target {target}: {'met' if row['met'] else 'MISSED'}" if target else ""
    spread = f" ±{row['spread']:.1%}" if "spread" in row else ""
    print(f"  {name:<58} {value:>12,.4g} {unit}{spread}{wanted}", flush=True)
    return row


def finish(
    benchmark: str, results: list[dict[str, Any]], args: argparse.Namespace, seed: int = 0, **facts: Any
) -> None:
    """Print the JSON line, and write it to `benchmarks/results/<benchmark>.json` if asked to.

    Args:
        benchmark: its name.
        results: from `result`.
        args: from `arguments`.
        seed: of the data and the draws.
        facts: further fields of the provenance (threads, data, …).
    """
    from raydeep.disk import write_json
    from raydeep.machine import provenance

    whole = {
        "benchmark": benchmark,
        "results": results,
        "provenance": {**provenance(seed), "quick": args.quick, **facts},
    }
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        write_json(RESULTS / f"{benchmark}.json", whole)
    print(json.dumps(whole))
