"""Where the seconds of an epoch go: one clock a stage, and what to do where they go to waiting.

Stages: `read` and `decode` run in other processes when data is streamed (their seconds are summed over those);
`wait` (for the next pictures), `transfer` (to the device), `augment` and `step` are seconds of this worker.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

STAGES = ("read", "decode", "wait", "transfer", "augment", "step")
BOUND = 0.1  # share of an epoch spent waiting from which a run counts as input-bound
HEAVY = 0.35  # share of an epoch spent on augmentation from which a line is spent on it


class _Clock:
    def __init__(self, meter: Meter, stage: str) -> None:
        self.meter, self.stage = meter, stage

    def __enter__(self) -> None:
        self.start: Any = time.perf_counter()
        if self.meter.on_gpu:
            import torch

            self.start = torch.cuda.Event(enable_timing=True)
            self.start.record()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.meter.on_gpu:
            self.meter.add(self.stage, time.perf_counter() - self.start)
            return
        import torch

        end = torch.cuda.Event(enable_timing=True)
        end.record()
        self.meter.events.append((self.stage, self.start, end))


class Meter:
    """Seconds a stage since the last `take`. On a GPU the device's own clock is read, once, when they are taken."""

    def __init__(self, device: str = "cpu") -> None:
        self.on_gpu = device == "cuda"
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.events: list[tuple[str, Any, Any]] = []
        self.start = time.perf_counter()
        self.first_batch_s: float | None = None  # from the making of the meter to the first batch of pictures
        self.start_s: float | None = None  # of it, what was spent waiting for it: no stage's
        self._clocks = {stage: _Clock(self, stage) for stage in STAGES}

    def __call__(self, stage: str) -> _Clock:
        """A context manager that adds its time to a stage; stages do not nest."""
        return self._clocks[stage]

    def add(self, stage: str, seconds: float) -> None:
        """Add seconds measured elsewhere."""
        self.seconds[stage] += seconds

    def arrived(self) -> None:
        """A batch of pictures is there."""
        if self.first_batch_s is None:
            self.first_batch_s = time.perf_counter() - self.start
            self.start_s, self.seconds["wait"] = self.seconds["wait"], 0.0

    def take(self) -> dict[str, float]:
        """The seconds of each stage, as `<stage>_s`; starts anew."""
        if self.events:
            self.events[-1][2].synchronize()
        for stage, begin, end in self.events:
            self.seconds[stage] += begin.elapsed_time(end) / 1e3
        taken = {f"{stage}_s": round(seconds, 4) for stage, seconds in self.seconds.items()}
        self.events, self.seconds = [], dict.fromkeys(STAGES, 0.0)
        return taken


def waiting(row: dict[str, Any]) -> float:
    """Share of an epoch (a line of metrics.jsonl) in which the device had no pictures to work on.

    The wait for the first batch is left out: it is told apart.
    """
    seconds = _seconds(row)
    if row["device"] == "cuda":  # its queue hides waits: what it did not work, it waited
        return max(0.0, 1 - sum(row["meter"][f"{stage}_s"] for stage in ("transfer", "augment", "step")) / seconds)
    return row["meter"]["wait_s"] / seconds


def _seconds(row: dict[str, Any]) -> float:
    return max(row["seconds"] - (row["start_s"] or 0.0), 1e-9)


def verdict(rows: Sequence[dict[str, Any]], cache: str, decoded_bytes: int, memory_bytes: int) -> str:
    """One line: was the run bound by its input, by how much, and which knob helps.

    Args:
        rows: lines of metrics.jsonl of whole epochs.
        cache: resident or stream.
        decoded_bytes: what the splits take decoded.
        memory_bytes: of the machine; 0 if unknown.
    """
    seconds = sum(map(_seconds, rows))
    spent = {stage: sum(row["meter"][f"{stage}_s"] for row in rows) for stage in STAGES}
    idle = sum(waiting(row) * _seconds(row) for row in rows) / seconds
    share = {stage: spent[stage] / seconds for stage in STAGES}
    first = (
        f"first batch after {rows[0]['first_batch_s']:.1f} s, not counted"
        if rows[0].get("first_batch_s") is not None
        else ""
    )
    if idle < BOUND:
        text = f"not input-bound: {idle:.0%} of training was spent waiting for pictures"
        if share["augment"] >= HEAVY:
            text += f", {share['augment']:.0%} on augmenting them (fewer operations in augment, or scaling.use_gpu)"
        return ", ".join(filter(None, (text, first)))
    knobs = []
    if cache == "stream" and decoded_bytes * 2 <= memory_bytes:
        knobs.append(f"keep them in memory (data.memory_bytes {decoded_bytes:,})")
    if cache == "stream":
        smaller = "store them smaller or decoded (raydeep shard --resize N, --store decoded)"
        knobs.append(smaller if spent["decode"] >= spent["read"] else "put the shards on faster storage")
        knobs.append("give Ray more CPUs")
    else:
        knobs.append("raise train.batch_size, so that copies are larger and fewer")
    largest = max(("read", "decode"), key=lambda stage: spent[stage])
    text = f"input-bound: {idle:.0%} of training was spent waiting for pictures, {largest} takes most; what helps: "
    return text + ", or ".join(knobs) + (f"; {first}" if first else "")
