"""The soak's bookkeeping, from made records: what was lost, what was done twice, and the time that kills have cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import soak_count as count
from soak_count import Kill, Record

from raydeep.search.ledger import Ledger

END = 1000.0


def rung(trial: int, rung: int = 0) -> dict[str, Any]:
    return {"trial": trial, "event": "rung", "rung": rung}


def end(trial: int, status: str = "done") -> dict[str, Any]:
    return {"trial": trial, "event": "end", "status": status}


def trained(*marks: tuple[float, int], attempts: tuple[float, ...] = (1.0,), kills: tuple[Kill, ...] = ()) -> Record:
    """A training that nothing follows."""
    return Record(0.0, END, [0.0], list(kills), list(marks), [{"time": at} for at in attempts])


def lost(record: Record, slots: int = 2) -> list[tuple[str, float]]:
    return [(loss.phase, pytest.approx(loss.seconds)) for loss in count.losses(record, slots)]


def test_a_ledger_with_every_trial_once_has_lost_none(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", {})
    ledger.add(rung(0), rung(1), rung(0, 1), end(0), end(1))
    assert count.trials(ledger.lines, 2) == ([], [])
    assert count.trials(ledger.lines, 3) == ([2], [])


def test_failed_trials_are_lost_and_second_lines_are_seen() -> None:
    assert count.trials([rung(0), end(0, "failed"), rung(1), end(1)], 2) == ([0], [])
    assert count.trials([rung(0), rung(0), end(0), end(1), end(1)], 2) == ([], [0, 1])
    assert count.trials([rung(0), rung(0, 1), end(0)], 1) == ([], [])
    assert count.trials([], 2) == ([0, 1], [])


def test_steps_done_again() -> None:
    attempts = [(0, 0), (20, 23), (60, 60), (70, 65)]
    assert count.again([{"from_step": step, "reached_before": before} for step, before in attempts]) == 3


def test_a_gap_of_the_high_water_is_lost_and_nothing_else() -> None:
    marks = ((10.0, 1), (20.0, 50), (21.0, 52), (60.0, 53), (100.0, 99))
    assert lost(trained(*marks, attempts=(1.0, 50.0), kills=(Kill(20.5, "worker"),))) == [("training", 39)]
    assert lost(trained(*marks)) == []  # slow, but not done again


def test_an_attempt_that_got_nowhere_is_not_counted_twice() -> None:
    kills = (Kill(20.5, "worker"), Kill(40.0, "driver"))
    record = trained((10.0, 1), (21.0, 52), (60.0, 53), attempts=(1.0, 35.0, 50.0), kills=kills)
    assert lost(record) == [("training", 39)]
    assert count.losses(record, 2)[0].kill == kills[0]


def test_a_gap_that_nobody_has_made_is_lost_too() -> None:
    [loss] = count.losses(trained((10.0, 1), (21.0, 52), (60.0, 53), attempts=(1.0, 50.0)), 2)
    assert (loss.seconds, loss.kill) == (39, None)


def test_before_the_first_step_and_after_the_last_trial_all_from_the_kill_on_is_lost() -> None:
    assert lost(trained((30.0, 1), kills=(Kill(12.0, "worker"),))) == [("start", 18)]
    record = trained((30.0, 1))
    record.begins, record.lines = [(0, 40.0)], [(50.0, rung(0)), (50.0, end(0))]
    record.kills = [Kill(900.0, "worker"), Kill(990.0, "driver")]  # Ray has no part in what was left to do
    assert lost(record) == [("end", 10)]


def test_drivers_that_never_came_to_a_step_are_lost_whole_and_the_next_one_starts_as_any_does() -> None:
    kills = (Kill(12.0, "driver"), Kill(20.0, "driver"))
    record = trained((60.0, 1), kills=kills)
    record.starts += [14.0, 22.0]
    assert lost(record) == [("start", 22)]
    assert count.losses(record, 2)[0].kill == kills[0]
    record.kills.append(Kill(40.0, "node"))
    assert lost(record) == [("start", 22), ("start", 20)]


def test_between_training_and_trials() -> None:
    record = trained((30.0, 1), kills=(Kill(35.0, "node"),))
    record.begins, record.lines = [(0, 40.0)], [(50.0, rung(0)), (50.0, end(0))]
    assert lost(record) == [("between", 5)]


def searched(begins: list[tuple[int, float]], lines: list[tuple[float, dict[str, Any]]], *kills: Kill) -> Record:
    return Record(0.0, END, [0.0], list(kills), [(1.0, 1)], [{"time": 0.5}], begins, lines)


def test_a_killed_trial_costs_its_share_of_the_trials_at_once() -> None:
    # Trial 0 runs from 10, is cut at 14, begins again at 20 and is done at 30; trial 1 runs all the time.
    record = searched(
        [(0, 10.0), (1, 10.0), (0, 20.0)], [(30.0, rung(0)), (30.0, rung(1)), (30.0, end(0))], Kill(14.0, "worker")
    )
    assert [piece[1:] for piece in count.pieces(record)] == [(10, 14, True), (10, 30, False), (20, 30, False)]
    assert lost(record) == [("trials", 4 / 2), ("trials", 6 / 2)]
    assert lost(record, slots=4) == [("trials", 1), ("trials", 1.5)]


def test_a_killed_driver_costs_all_of_them() -> None:
    begins = [(0, 10.0), (1, 12.0), (0, 25.0), (1, 26.0)]
    record = searched(begins, [(40.0, rung(0)), (40.0, rung(1))], Kill(14.0, "driver"))
    redone, idle = (4 + 2) / 2, (11 * 2 + 1 * 1) / 2
    assert sum(loss.seconds for loss in count.losses(record, 2)) == pytest.approx(redone + idle)
    assert {loss.kill for loss in count.losses(record, 2)} == {Kill(14.0, "driver")}
    assert count.effective([record], 2) == pytest.approx(1 - (redone + idle) / END)


def test_a_kill_that_hits_no_trial_costs_nothing() -> None:
    record = searched([(0, 10.0), (0, 30.0)], [(30.0, rung(0)), (40.0, rung(0, 1))], Kill(30.0, "node"))
    assert lost(record) == []


def test_a_second_kill_before_the_first_is_mended_adds_up() -> None:
    begins = [(0, 10.0), (1, 10.0), (0, 20.0), (1, 24.0), (0, 24.0)]
    lines = [(30.0, rung(0)), (30.0, rung(1))]
    record = searched(begins, lines, Kill(14.0, "driver"), Kill(22.0, "worker"))
    redone = 4 + 4 + 2
    idle = 6 * 2 + 2 * 1 + 2 * 2  # none run from 14, one from 20, none from 22, both from 24
    assert sum(loss.seconds for loss in count.losses(record, 2)) == pytest.approx((redone + idle) / 2)


def test_a_rung_that_vanished_is_an_error_but_not_one_that_failed() -> None:
    with pytest.raises(ValueError, match="trial 7 began a rung"):
        count.pieces(searched([(7, 10.0)], [(30.0, rung(0))]))
    assert count.pieces(searched([(7, 10.0)], [(30.0, end(7, "failed"))])) == []


def test_effective_time_is_of_all_searches_together() -> None:
    calm = trained((30.0, 1))
    hit = trained((30.0, 1), (40.0, 2), (140.0, 3), attempts=(1.0, 130.0), kills=(Kill(40.5, "worker"),))
    assert count.effective([calm], 4) == 1
    assert count.effective([calm, hit], 4) == pytest.approx(1 - 100 / (2 * END))
