"""What kills have cost a search, from what it wrote and when: the bookkeeping of soak.py. Pure.

Time is lost where a run does work again or does none. In training that is each gap of its high water, the steps that
were ever reached: from its last rise before an attempt to its first rise after it, so both the way back and the steps
done again. Among trials it is the share of the trials at once that a kill has cut: what they had done, and for how long
fewer trials run than before it. Before the first step, between training and trials, and after the last trial there is
nothing to see progress by: there, all from the kill to the next sign of progress is lost, which is more than was. Of a
driver that dies before the first step it is its life and the wait for the next one, which then starts as any does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SEEN_S, LATE_S = 0.3, 2.0  # a line of the ledger is seen so much later than the trial's next begin: as a rule, at most


class Kill(NamedTuple):
    """A kill."""

    at: float
    kind: str  # worker, node or driver


class Loss(NamedTuple):
    """Time that was lost."""

    at: float
    seconds: float
    phase: str  # start, training, between, trials or end
    kill: Kill | None  # that it began with; None: nobody killed anything


class Piece(NamedTuple):
    """A rung of a trial under way."""

    trial: int
    begin: float
    end: float
    cut: bool  # by a kill


@dataclass
class Record:
    """What was seen of one search; times in seconds since the epoch."""

    begin: float
    end: float = 0.0
    starts: list[float] = field(default_factory=list)  # of drivers
    kills: list[Kill] = field(default_factory=list)
    marks: list[tuple[float, int]] = field(default_factory=list)  # each rise of the training's high water: time, step
    attempts: list[dict[str, Any]] = field(default_factory=list)  # attempts.jsonl
    begins: list[tuple[int, float]] = field(default_factory=list)  # a trial begins a rung
    lines: list[tuple[float, dict[str, Any]]] = field(default_factory=list)  # ledger.jsonl, with when each was seen


def trials(lines: Sequence[dict[str, Any]], total: int) -> tuple[list[int], list[int]]:
    """Trials of a ledger that were lost (not finished, or failed), and those that have a rung or an end twice."""
    done = {row["trial"] for row in lines if row.get("event") == "end" and row["status"] == "done"}
    told = Counter((row["trial"], row["event"], row.get("rung")) for row in lines if row.get("event") == "rung")
    told += Counter((row["trial"], "end", None) for row in lines if row.get("event") == "end")
    return sorted(set(range(total)) - done), sorted({trial for (trial, *_), count in told.items() if count > 1})


def again(attempts: Sequence[dict[str, Any]]) -> int:
    """Steps of a training that were done more than once."""
    return sum(max(0, a["reached_before"] - a["from_step"]) for a in attempts)


def pieces(record: Record) -> list[Piece]:
    """The rungs that were begun: those that came into the ledger, and those that a kill has cut.

    Raises:
        ValueError: a rung that was begun is in neither.
    """
    found: list[Piece] = []
    came, begins = defaultdict(deque), defaultdict(list)
    for at, row in record.lines:
        if row["event"] == "rung":
            came[row["trial"]].append(at)
    failed = {row["trial"] for _, row in record.lines if row["event"] == "end" and row["status"] == "failed"}
    for trial, at in sorted(record.begins, key=lambda begun: begun[1]):
        begins[trial].append(at)
    kills = sorted(kill.at for kill in record.kills)
    for trial, times in begins.items():
        for at, after in zip(times, [*times[1:], record.end], strict=True):
            killed = [kill for kill in kills if at - LATE_S < kill <= after]  # a begin may be seen after its kill
            ends = came[trial]
            if ends and at < ends[0] <= after + (SEEN_S if killed else LATE_S):
                found.append(Piece(trial, at, min(ends.popleft(), after), cut=False))
            elif killed:
                found.append(Piece(trial, at, max(at, killed[-1]), cut=True))
            elif trial not in failed:
                raise ValueError(f"trial {trial} began a rung that neither came back nor was killed")
    return sorted(found, key=lambda piece: piece.begin)


def _among_trials(work: Sequence[Piece], kills: Sequence[Kill], slots: int) -> Iterator[Loss]:
    """Losses while trials run."""
    over = max(piece.end for piece in work)
    for piece in work:
        if piece.cut:
            kill = next(kill for kill in reversed(kills) if kill.at <= piece.end)
            yield Loss(piece.begin, (piece.end - piece.begin) / slots, "trials", kill)
    times = sorted({piece.begin for piece in work} | {piece.end for piece in work} | {kill.at for kill in kills})
    level, cause = 0, None
    for at, after in zip(times, [*times[1:], over], strict=True):
        killed = next((kill for kill in kills if kill.at == at), None)
        if killed is not None:
            before = sum(piece.begin < at <= piece.end for piece in work)
            if before > level:
                level, cause = before, killed
        running = sum(piece.begin <= at < piece.end for piece in work)
        if running >= level:
            level, cause = 0, None
        elif after > at:
            yield Loss(at, (level - running) * (after - at) / slots, "trials", cause)


def losses(record: Record, slots: int) -> list[Loss]:
    """Where a search lost time to kills.

    Args:
        record: of the search.
        slots: trials at once.
    """
    work, kills = pieces(record), sorted(record.kills)
    rises = [at for at, _ in record.marks]
    first = rises[0] if rises else record.end
    begun = work[0].begin if work else record.end
    over = max((at for at, _ in record.lines), default=record.end)
    spans: list[tuple[float, float, str]] = []
    for attempt in record.attempts[1:]:
        k = bisect_right(rises, attempt["time"])
        if 0 < k < len(rises):
            spans.append((rises[k - 1], rises[k], "training"))
        elif k:
            spans.append((rises[k - 1], begun, "training"))
    for phase, start, end, kinds in (
        ("start", record.begin, first, ("worker", "node")),
        ("between", rises[-1] if rises else record.end, begun, ("node", "driver")),
        ("end", over, record.end, ("driver",)),  # Ray has nothing to do there
    ):
        hit = [kill.at for kill in kills if start <= kill.at < end and kill.kind in kinds]
        spans += [(hit[0], end, phase)] if hit else []
    if started := [at for at in record.starts[1:] if at < first]:
        spans.append((record.begin, started[-1], "start"))
    found, done = [], 0.0
    for start, end, phase in sorted(spans):
        cause = next((kill for kill in kills if start - 1 <= kill.at <= end), None)  # a step may be done after a kill
        if end > max(start, done):
            found.append(Loss(max(start, done), end - max(start, done), phase, cause))
            done = end
    return [*found, *(_among_trials(work, kills, slots) if work else [])]


def effective(records: Sequence[Record], slots: int) -> float:
    """Share of the wall time of searches in which work was done that counts."""
    wall = sum(record.end - record.begin for record in records)
    return 1 - sum(loss.seconds for record in records for loss in losses(record, slots)) / wall
