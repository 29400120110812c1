"""The dataset commands as a terminal shows them: shard, info, verify, preview."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raydeep.errors import DataError
from raydeep.ops.console import Stage, Ui

if TYPE_CHECKING:
    from raydeep.data.inspection import Report

SHOWN = 10  # problems or pairs that are printed


def rate(stage: Stage, what: str = "pictures") -> Callable[[int, int], None]:
    """A progress function that shows rows a second and how long it will take yet."""
    start = time.monotonic()
    first: list[int] = []  # done already when it began (a continued command)

    def tell(done: int, total: int) -> None:
        first.append(done)
        speed = (done - first[0]) / max(1e-9, time.monotonic() - start)
        left = f", {(total - done) / speed:,.0f} s left" if speed and done < total else ""
        stage.update(done, total, f"{what}, {speed:,.0f}/s{left}")

    return tell


def show_info(facts: dict[str, Any], ui: Ui) -> None:
    """Print what inspection.info gives."""
    heights, widths = ("–".join(map(str, sorted(set(facts[key])))) for key in ("height", "width"))
    ui.say(f"dataset    {facts['path']}")
    ui.say(f"hash       {facts['hash']}")
    ui.say(f"pictures   {facts['rows']:,}, {heights}×{widths} pixels, {facts['mode']}, stored {facts['store']}")
    if facts["decoded_bytes"] is not None:
        ui.say(f"decoded    {facts['decoded_bytes']:,} bytes")
    ui.say(f"quarantine {facts['quarantined']:,}" + (" (quarantine.jsonl)" if facts["quarantined"] else ""))
    for name, split in facts["splits"].items():
        ui.say(f"{name:<10} {split['rows']:,} pictures, {split['shards']} shards, {split['bytes']:,} bytes")
    ui.say("")
    names = list(facts["splits"])
    width = max(5, *(len(label) for label in facts["splits"]["train"]["class_counts"]))
    ui.say(f"{'class':<{width}} " + " ".join(f"{name:>8}" for name in names) + "   share of train")
    train = facts["splits"]["train"]["class_counts"]
    for label, count in train.items():
        bar = "█" * max(1, round(24 * count / max(train.values())))
        counts = " ".join(f"{facts['splits'][name]['class_counts'][label]:>8,}" for name in names)
        ui.say(f"{label:<{width}} {counts}   {count / max(1, sum(train.values())):>6.1%} {bar}")
    if (ratio := facts["splits"]["train"]["imbalance"]) and ratio > 1.5:
        ui.say(f"the largest class of train has {ratio:.1f} times the pictures of the smallest")


def show_report(report: Report, ui: Ui) -> None:
    """Print what inspection.verify found.

    Raises:
        DataError: there are problems; pictures in two splits are reported, not refused.
    """
    for split, count in report.repeated.items():
        if count:
            ui.say(f"{split}: {count:,} pictures stand in it more than once, pixel for pixel")
    for same, words in ((True, "are the same, pixel for pixel"), (False, "look alike (difference hash)")):
        pairs = [pair for pair in report.pairs if pair.same is same]
        if pairs:
            ui.say(f"{len(pairs):,} pairs of pictures in two splits {words}; the score on them is no test:")
            for pair in pairs[:SHOWN]:
                ui.say(f"  {pair.first}  =  {pair.second}")
    if not report.pairs:
        ui.say("no picture of one split found in another")
    if report.problems:
        more = f"; and {len(report.problems) - SHOWN:,} more" if len(report.problems) > SHOWN else ""
        raise DataError("\n  ".join([f"{len(report.problems):,} problems:", *report.problems[:SHOWN]]) + more)
