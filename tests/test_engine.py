"""The search driven by hand, with a made-up objective: what comes next, what is written, stopped at every line."""

from __future__ import annotations

import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydeep.config import Job, Recover, Search, Train
from raydeep.errors import JobError
from raydeep.search import pareto, population, space
from raydeep.search.engine import THROUGH, Engine
from raydeep.search.ledger import Ledger
from raydeep.search.objectives import Objectives
from raydeep.search.work import Work, label, trial_seed

Row = dict[str, Any]
Measure = Callable[[Work], Row]

S, K, W, A, D, LR = (
    "prune.sparsity", "prune.kind", "quantize.weight_bits", "quantize.activation_bits", "distill.enabled", "train.lr",
)  # fmt: skip
SPACE: dict[str, Any] = {S: [0.0, 0.25, 0.5, 0.75, 0.9], W: [None, 2, 4, 8], A: [None, 8], D: [False, True]}
TRAINED: dict[str, Any] = {LR: {"low": 0.001, "high": 1.0, "log": True}, "augment.rotation": [0, 5, 10, 20]}
DENSE = {"val_accuracy": 0.97, "worst_class_accuracy": 0.9, "bytes": 10_100, "macs": 1000, "latency_ms": 1.0}
TIMES = ("seconds", "cpu_seconds", "overhead_seconds", "at")


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


class Clock:
    """Seconds that pass when it is told so."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def searching(trials: int = 27, seed: int = 0, epochs: int = 9, **search: Any) -> Job:
    search = {"space": SPACE, "sampler": "random", "startup_trials": 5, "max_failed": 1000, **search}
    return Job(seed=seed, recover=Recover(epochs=epochs), train=Train(epochs=8), search=Search(trials=trials, **search))


def measure(work: Work) -> Row:
    """Better with epochs and bits, worse with sparsity, and some noise."""
    values = work.values
    chance = random.Random(f"{space.key(values)} {work.epochs}")
    sparsity, bits = values.get(S, 0.5), values.get(W) or 32
    accuracy = 0.97 - 0.3 * sparsity**3 - 0.3 / bits - 0.1 / (1 + work.epochs) + chance.uniform(-0.02, 0.02)
    accuracy -= 0.05 * abs(math.log10(values.get(LR, 0.1)) + 1)
    return {
        "status": "done", "error": None, "start": work.neighbour or work.start, "val_accuracy": accuracy,
        "worst_class_accuracy": accuracy - 0.1, "bytes": int(10_000 * (1 - sparsity) * bits / 32) + 100,
        "macs": int(1000 * (1 - sparsity)) + 1, "seconds": 1.5, "cpu_seconds": 2.0, "not_a_column": 7,
    }  # fmt: skip


def scored(accuracy: Any, size: Any, **more: Any) -> Row:
    return {"status": "done", "start": "dense", "val_accuracy": accuracy, "bytes": size, **more}


def ranks(work: Work) -> Row:
    """The first trial is the best, the second the next."""
    return scored(0.9 - work.trial / 1000, 100 + work.trial, seconds=1.0)


@pytest.fixture
def open_engine(tmp_path: Path) -> Callable[..., Engine]:
    """Opens (or opens again) the search whose ledger is in tmp_path."""

    def make(job: Job, name: str = "ledger.jsonl", clock: Clock | None = None, on_row: Any = None) -> Engine:
        ledger = Ledger(tmp_path / name, {"seed": job.seed})
        return Engine(job, ledger, DENSE, on_row, clock or Clock())

    return make


def drive(
    engine: Engine, result: Measure = measure, at_once: int = 1, most: int = 10**6, last_first: bool = False
) -> list[Work]:
    """Works everything through, `at_once` pieces in flight, or until so many results are told."""
    works: list[Work] = []
    flying: list[Work] = []
    for _ in range(most):
        while len(flying) < at_once and (work := engine.peek()) is not None:
            assert work == engine.peek()
            engine.begin(work)
            flying.append(work)
            works.append(work)
        assert engine.running == len(flying)
        if not flying:
            assert engine.finished
            engine.finish()
            break
        work = flying.pop(-1 if last_first else 0)
        engine.take(work, result(work))
    return works


def lines(engine: Engine) -> list[Row]:
    """The ledger as it is on disk, without its head."""
    found = [json.loads(line) for line in engine.ledger.path.read_text().splitlines()]
    assert found[1:] == engine.ledger.lines
    return found[1:]


def ends(engine: Engine) -> dict[int, Row]:
    return {row["trial"]: row for row in lines(engine) if row["event"] == "end"}


def rungs(engine: Engine) -> Counter[int]:
    return Counter(row["rung"] for row in lines(engine) if row["event"] == "rung")


def check(engine: Engine, total: int) -> None:
    """What holds of every search that has come to its end."""
    rows = engine.ledger.lines
    assert sorted(row["trial"] for row in rows if row["event"] == "end") == list(range(total))  # each end once
    done = Counter((row["trial"], row["rung"]) for row in rows if row["event"] == "rung")
    assert set(done.values()) <= {1}
    ladder, best = engine.ladder, {}
    objectives = Objectives.of(engine.cfg)
    for trial in range(total):
        mine = [row for row in rows if row["trial"] == trial]
        assert [row["event"] for row in mine] == ["rung"] * (len(mine) - 1) + ["end"]
        assert [row["rung"] for row in mine[:-1]] == list(range(len(mine) - 1))
        assert [row["epochs"] for row in mine[:-1]] == ladder[: len(mine) - 1]
        assert (mine[-1]["stopped"] == THROUGH) == (len(mine) - 1 == len(ladder)) or mine[-1]["status"] == "failed"
        assert mine[-1]["rungs"] == len(mine) - 1
    for row in rows:
        if row["event"] == "rung" and objectives.better(row, best.get(row["trial"])):
            best[row["trial"]] = row
        volume = objectives.hypervolume(best.values(), DENSE)
        assert row["hypervolume"] == pytest.approx(volume, rel=1e-5, abs=1e-12)
    assert [row["at"] for row in rows] == sorted(row["at"] for row in rows)
    if engine.cfg.scheduler != "pbt":
        configs = {row["trial"]: space.key(row["config"]) for row in rows}
        assert len(set(configs.values())) == total
        assert all(space.key(row["config"]) == configs[row["trial"]] for row in rows)


# rungs


@pytest.mark.parametrize(
    ("trials", "reduction", "epochs", "counts"),
    [
        (27, 3, 27, [27, 9, 3, 1]),
        (27, 3, 9, [27, 9, 3, 1]),
        (29, 3, 9, [29, 9, 3, 1]),
        (16, 2, 4, [16, 8, 4, 2]),
        (2, 3, 9, [2]),
        (9, 3, 0, [9]),
    ],
)
@pytest.mark.parametrize("at_once", [1, 4])
def test_halving_lets_one_of_so_many_go_on(open_engine, trials, reduction, epochs, counts, at_once):
    engine = open_engine(searching(trials, epochs=epochs, reduction=reduction))
    drive(engine, ranks, at_once)
    found = rungs(engine)
    assert [found[k] for k in range(len(counts))] == counts
    check(engine, trials)
    assert all(row["status"] == "done" for row in ends(engine).values())
    best = {row["trial"] for row in lines(engine) if row["event"] == "rung" and row["rung"] == 1}
    assert best == set(range(len(best)))


def test_who_does_not_go_on_ends_with_the_reason(open_engine):
    engine = open_engine(searching(9, epochs=3))
    drive(engine, ranks)
    assert engine.ladder == [0, 1, 3]
    told = Counter(row["stopped"] for row in ends(engine).values())
    assert told == {
        "not promoted from rung 0, 0 epochs": 6,
        "not promoted from rung 1, 1 epochs": 2,
        THROUGH: 1,
    }


def test_a_higher_rung_comes_before_a_new_trial(open_engine):
    works = drive(open_engine(searching(9, epochs=3)), ranks)
    order = [(w.trial, w.rung) for w in works]
    assert order[:4] == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert order.index((1, 1)) == order.index((5, 0)) + 1
    assert order[-2:] == [(2, 1), (0, 2)]


@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize("last_first", [False, True])
def test_a_search_of_noisy_results(open_engine, at_once, last_first):
    engine = open_engine(searching(27))
    drive(engine, at_once=at_once, last_first=last_first)
    check(engine, 27)
    found = rungs(engine)
    assert all(found[k + 1] >= found[k] // 3 for k in range(len(engine.ladder) - 1))
    assert found[0] == 27 > found[1] > found[2]


def test_scheduler_none_is_each_trial_once(open_engine):
    engine = open_engine(searching(12, scheduler="none"))
    works = drive(engine, at_once=3)
    assert engine.ladder == [9]
    assert [(w.trial, w.rung, w.epochs, w.before, w.neighbour) for w in works] == [
        (n, 0, 9, 0, None) for n in range(12)
    ]
    check(engine, 12)


@pytest.mark.parametrize(("key", "extra"), [("recover.epochs", {S: [0.0, 0.5]}), ("train.epochs", TRAINED)])
def test_without_rungs_a_trial_has_the_epochs_that_it_draws(open_engine, key, extra):
    works = drive(open_engine(searching(8, scheduler="none", space={**extra, key: [1, 2, 3, 5]})))
    assert {w.epochs for w in works} == {1, 2, 3, 5}
    assert all(w.epochs == w.values[key] for w in works)


def test_asha_ranks_by_the_first_objective_alone(open_engine):
    def opposed(work: Work) -> Row:  # every trial is on the front of both; the last is best in the first objective
        return scored(0.5 + work.trial / 100, 100 + work.trial)

    def went_on(scheduler: str) -> set[int]:
        engine = open_engine(searching(9, epochs=1, scheduler=scheduler), scheduler)
        first = [engine.peek() or pytest.fail("no work")]
        while first[-1].rung == 0:  # all nine first, so that nobody goes on before
            engine.begin(first[-1])
            if (nxt := engine.peek()) is None:
                break
            first.append(nxt)
        for work in first:
            engine.take(work, opposed(work))
        return {w.trial for w in drive(engine, opposed) if w.rung == 1}

    assert went_on("asha") == {6, 7, 8}
    assert went_on("halving") != {6, 7, 8}


# numbers, seeds, sameness


def test_seeds_of_trials_never_change():
    found = [trial_seed(seed, trial) for seed, trial in [(0, 0), (0, 1), (1, 0), (7, 31)]]
    assert found == [821328062, 1817441348, 1835504127, 137354753]


def without_times(path: Path) -> str:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return "\n".join(json.dumps({k: v for k, v in row.items() if k not in TIMES}) for row in rows)


@pytest.mark.parametrize(
    "search",
    [
        {},
        {"sampler": "tpe", "trials": 18},
        {"sampler": "nsga2"},
        {"sampler": "grid"},
        {"scheduler": "asha"},
        {"scheduler": "none"},
        {"promote": "epsilon_net", "constraints": ("accuracy >= 0.9",)},
        {"scheduler": "pbt", "space": TRAINED, "population": 8},
    ],
    ids=str,
)
def test_the_same_seed_and_one_piece_at_a_time_is_the_same_ledger(open_engine, search):
    clock = Clock()

    def slow(work: Work) -> Row:
        clock.now += 3.7
        return {**measure(work), "seconds": 9.0, "cpu_seconds": 7.0, "overhead_seconds": 1.0}

    one, other = open_engine(searching(**search), "a"), open_engine(searching(**search), "b", clock)
    drive(one)
    drive(other, slow)
    assert one.ledger.path.read_bytes() != other.ledger.path.read_bytes()
    assert without_times(one.ledger.path) == without_times(other.ledger.path)
    if search.get("sampler") != "grid":
        drive(third := open_engine(searching(seed=1, **search), "c"))
        assert without_times(third.ledger.path) != without_times(one.ledger.path)


def test_a_search_has_no_more_trials_than_configurations(open_engine):
    engine = open_engine(searching(99, space={S: [0.0, 0.5], W: [None, 4], A: [None, 8]}))
    drive(engine)
    check(engine, 2 * 3)


def test_a_small_endless_space_ends_too(open_engine):
    engine = open_engine(searching(99, space={W: {"low": 2, "high": 8, "log": True}}))
    drive(engine, at_once=2)
    check(engine, 7)


def test_an_empty_space_is_one_trial(open_engine):
    engine = open_engine(searching(5, space={}))
    works = drive(engine)
    assert [(w.trial, w.values, w.seed) for w in works] == [(0, {}, trial_seed(0, 0))]
    check(engine, 1)


def test_rows_hold_configuration_seed_and_result_and_are_told(open_engine):
    told: list[Row] = []
    engine = open_engine(searching(1, scheduler="none"), on_row=lambda _, row: told.append(row))
    (work,) = drive(engine)
    rung, end = lines(engine)
    assert told == [rung, end]
    measured = {k: v for k, v in measure(work).items() if k not in ("status", "error", "not_a_column")}
    both = {"trial": 0, "rung": 0, "epochs": 9, "config": work.values, "seed": trial_seed(0, 0), "at": 0.0, **measured}
    both["hypervolume"] = rung["hypervolume"]
    assert rung == {**both, "event": "rung"}
    assert end == {**both, "event": "end", "status": "done", "stopped": THROUGH, "error": None, "rungs": 1}


# stopping


def cut(text: str) -> Iterator[str]:
    """The file after each of its lines, and torn in the middle of the next."""
    whole = text.splitlines(keepends=True)
    for k in range(len(whole) + 1):
        yield "".join(whole[:k])
        if k < len(whole):
            yield "".join(whole[:k]) + whole[k][: len(whole[k]) // 2]
            yield "".join(whole[:k]) + whole[k][:-1]  # all but the end of the line


@pytest.mark.parametrize(
    "search",
    [
        {"trials": 12},
        {"trials": 5, "sampler": "tpe", "startup_trials": 2},
        {"trials": 12, "scheduler": "asha", "constraints": ("accuracy >= 0.93",)},
        {"trials": 8, "scheduler": "none", "sampler": "grid"},
        {"trials": 8, "scheduler": "pbt", "space": TRAINED, "population": 8, "rungs": (1, 2, 3)},
        {"trials": 12, "target": {"stall": 4}},
    ],
    ids=str,
)
@pytest.mark.parametrize("at_once", [1, 3])
def test_stopped_at_every_line_a_search_ends_with_every_trial_once(open_engine, tmp_path, search, at_once):
    def fails_at_times(work: Work) -> Row:
        return {"status": "failed", "error": "no"} if (work.trial, work.rung) in ((1, 0), (4, 1)) else measure(work)

    job = searching(**search)
    engine = open_engine(job)
    drive(engine, fails_at_times, at_once)
    text = (tmp_path / "ledger.jsonl").read_text()
    for k, part in enumerate(cut(text)):
        path = tmp_path / f"cut{k}"
        path.write_text(part)
        before = list(Ledger(path, {"seed": job.seed}).lines)
        again = open_engine(job, path.name)
        works = drive(again, fails_at_times, at_once)
        rows = again.ledger.lines
        assert rows[: len(before)] == before
        known = {(row["trial"], row["rung"]) for row in before if row["event"] == "rung"}
        gone = {row["trial"] for row in before if row["event"] == "end"}
        assert not known & {(w.trial, w.rung) for w in works}  # nothing is done twice
        assert not gone & {w.trial for w in works}
        total = again.total if again.stopped is None else len({row["trial"] for row in rows})
        check(again, total)
        assert again.stopped is not None or total == job.search.trials
        last = open_engine(job, path.name)  # and once more: there is nothing left
        assert drive(last, fails_at_times) == []
        assert last.ledger.lines == rows


def test_a_search_of_one_piece_at_a_time_goes_on_as_if_it_had_not_been_stopped(open_engine, tmp_path):
    """Of a grid, whose next configuration does not depend on draws."""
    job = searching(14, sampler="grid")
    drive(whole := open_engine(job))
    for k, part in enumerate(cut((tmp_path / "ledger.jsonl").read_text())):
        (tmp_path / f"cut{k}").write_text(part)
        drive(again := open_engine(job, f"cut{k}"))
        assert Ledger(again.ledger.path, {"seed": job.seed}).lines == whole.ledger.lines


def test_trials_that_were_cut_off_get_their_numbers_again(open_engine):
    engine = open_engine(searching(8, scheduler="none"))
    begun = []
    for _ in range(5):
        work = engine.peek()
        engine.begin(work)
        begun.append(work)
    for k in (4, 1):
        engine.take(begun[k], measure(begun[k]))
    again = open_engine(searching(8, scheduler="none"))
    works = drive(again)
    assert [w.trial for w in works] == [0, 2, 3, 5, 6, 7]
    assert [w.seed for w in works] == [trial_seed(0, n) for n in (0, 2, 3, 5, 6, 7)]
    check(again, 8)


def test_a_search_with_more_trials_than_before_goes_on(open_engine):
    drive(open_engine(searching(6, scheduler="none")))
    engine = open_engine(searching(9, scheduler="none"))
    assert [w.trial for w in drive(engine)] == [6, 7, 8]
    check(engine, 9)


def test_a_search_that_goes_on_does_not_draw_again_what_it_has(open_engine):
    endless = {LR: {"low": 0.001, "high": 1.0}}
    drive(open_engine(searching(30, scheduler="none", space=endless)))
    engine = open_engine(searching(40, scheduler="none", space=endless))
    assert engine.peek() is not None
    assert len(engine.sampler.study.trials) == 30 + 1  # results, and one draw


def test_work_that_was_not_offered_is_a_mistake(open_engine):
    engine = open_engine(searching(8))
    work = engine.peek()
    with pytest.raises(AssertionError, match="not offered"):
        engine.begin(work._replace(values={S: 0.123}))


# failures


@pytest.mark.parametrize(
    ("result", "error"),
    [
        ({"status": "failed", "error": "Traceback: ValueError: no"}, "Traceback: ValueError: no"),
        ({"status": "failed"}, "it does not say why"),
        ({"status": "done", "val_accuracy": math.nan, "bytes": 100}, "its accuracy is nan, not a finite number"),
        ({"status": "done", "val_accuracy": 0.9, "bytes": math.inf}, "its bytes is inf, not a finite number"),
        ({"status": "done", "val_accuracy": 0.9}, "its bytes is None, not a finite number"),
        ({"status": "done", "val_accuracy": 0.9, "bytes": 0}, "its bytes is 0, not above 0"),
        ({"status": "done", "val_accuracy": "0.9", "bytes": 1}, "its accuracy is '0.9', not a finite number"),
        ({"done": True}, "its accuracy is None, not a finite number"),
        ({}, "its accuracy is None, not a finite number"),
        (None, "its process died"),
    ],
    ids=str,
)
def test_a_failed_trial_is_written_counted_and_not_tried_again(open_engine, result, error):
    engine = open_engine(searching(6, scheduler="none"))
    work = engine.peek()
    engine.begin(work)
    if result is None:
        engine.lose(work, "its process died")
    else:
        assert engine.take(work, {**result, "seconds": 3.0})
    (row,) = engine.ledger.failed()
    assert (row["trial"], row["config"], row["status"], row["event"]) == (0, work.values, "failed", "end")
    assert (row["error"], row["stopped"], row["rungs"]) == (error, "failed at rung 0", 0)
    assert row.get("seconds") == (None if result is None else 3.0)
    assert "val_accuracy" not in row
    rest = drive(engine)
    assert [w.trial for w in rest] == [1, 2, 3, 4, 5]
    check(engine, 6)
    assert len(engine.ledger.done()) == 5


def test_who_fails_later_keeps_what_it_had_and_says_what_it_took(open_engine):
    def fails(work: Work) -> Row:
        lost = {"status": "failed", "error": "no", "seconds": 10.0, "cpu_seconds": 20.0}
        return lost if work.rung == 2 else ranks(work)

    engine = open_engine(searching(9))
    drive(engine, fails)
    row = ends(engine)[0]
    assert (row["status"], row["stopped"], row["rungs"], row["rung"]) == ("failed", "failed at rung 2", 2, 1)
    assert row["val_accuracy"] == 0.9
    assert (row["seconds"], row["cpu_seconds"]) == (12.0, 20.0)
    check(engine, 9)


@pytest.mark.parametrize("most", [0, 2])
def test_after_too_many_failures_nothing_more_begins(open_engine, most):
    engine = open_engine(searching(27, max_failed=most))
    works = drive(engine, lambda work: ranks(work) if work.trial < 4 else {"status": "failed", "error": "no"})
    assert len(engine.ledger.failed()) == most + 1
    assert engine.stopped == f"more than search.max_failed {most} trials failed"
    assert len({w.trial for w in works}) == 4 + most + 1
    assert {row["stopped"] for row in engine.ledger.done()} == {engine.stopped}
    assert drive(open_engine(searching(27, max_failed=most))) == []
    more = open_engine(searching(27, max_failed=most + 1))
    assert len(drive(more, ranks)) > 10
    check(more, 27)


def test_all_may_fail(open_engine):
    engine = open_engine(searching(10))
    drive(engine, lambda work: {"status": "failed", "error": "no"}, at_once=3)
    check(engine, 10)
    assert len(engine.ledger.failed()) == 10


def test_lost_processes_are_counted(open_engine):
    engine = open_engine(searching(1, scheduler="none"))
    work = engine.peek()
    engine.begin(work)
    engine.take(work, measure(work), retries=2)
    assert [row["retries"] for row in lines(engine)] == [2, 2]


# constraints, targets, time


def test_a_trial_that_violates_a_constraint_never_goes_before_one_that_meets_it(open_engine):
    job = searching(27, constraints=("accuracy >= 0.8",), sampler="random")
    engine = open_engine(job)
    results: dict[int, dict[int, Row]] = {k: {} for k in range(len(engine.ladder))}
    seen = 0
    while (work := engine.peek()) is not None:
        if work.rung:
            waiting = [n for n in results[work.rung - 1] if n not in results[work.rung]]
            meets = {n for n in waiting if results[work.rung - 1][n]["val_accuracy"] >= 0.8}
            assert work.trial in meets or not meets
            seen += bool(meets)
        engine.begin(work)
        results[work.rung][work.trial] = measure(work)
        engine.take(work, results[work.rung][work.trial])
    engine.finish()
    check(engine, 27)
    assert seen > 5
    for row in lines(engine):
        if row["event"] == "rung":
            violation = max(0.0, 0.8 - row["val_accuracy"])
            assert row.get("violation", 0.0) == pytest.approx(violation)
            assert ("violation" in row) == (violation > 0)
    assert 0 < sum("violation" in row for row in lines(engine)) < len(lines(engine))


def test_target_stall_counts_trials_that_did_not_raise_the_hypervolume(open_engine):
    def result(work: Work) -> Row:  # the fourth and the eighth are better than all before
        accuracy = 0.93 + 0.01 * (work.trial >= 3) + 0.01 * (work.trial >= 7)
        return scored(accuracy, 5000)

    engine = open_engine(searching(27, scheduler="none", target={"stall": 5}))
    works = drive(engine, result)
    assert len(works) == 8 + 5
    assert engine.stopped == "search.target.stall: 5 trials did not raise the hypervolume"
    assert drive(open_engine(searching(27, scheduler="none", target={"stall": 5}))) == []
    assert len(drive(open_engine(searching(27, scheduler="none", target={"stall": 20})), result)) == 14


def test_target_stall_counts_trials_not_rungs(open_engine):
    engine = open_engine(searching(27, target={"stall": 9}))
    drive(engine, lambda work: scored(0.93, 5000))
    assert rungs(engine)[0] == 10
    assert rungs(engine)[1] >= 3


def test_target_constraints_waits_for_a_trial_that_is_through(open_engine):
    job = searching(60, constraints=("accuracy >= 0.9", "bytes <= 10_000"), target={"constraints": True})
    engine = open_engine(job)
    drive(engine, at_once=2)
    assert engine.stopped == "search.target.constraints: a trained model meets all constraints"
    through = [row for row in ends(engine).values() if row["stopped"] == THROUGH and "violation" not in row]
    assert len(through) == 1
    assert through[0]["val_accuracy"] >= 0.9
    assert len(ends(engine)) < 60
    rung0 = [row for row in lines(engine) if row["event"] == "rung" and "violation" not in row]
    assert rung0[0]["rung"] < 3  # earlier ones met them too, but were not through
    assert drive(open_engine(job)) == []


def test_minutes_go_on_over_sessions(open_engine):
    job = searching(27, minutes=1)

    def run(clock: Clock, most: int) -> Engine:
        engine = open_engine(job, clock=clock)

        def result(work: Work) -> Row:
            clock.now += 7
            return measure(work)

        drive(engine, result, most=most)
        return engine

    first = run(Clock(1000.0), most=5)  # stopped from without
    assert first.stopped is None
    assert lines(first)[-1]["at"] == 35.0
    second = run(Clock(77.0), most=100)  # another machine, another clock
    rows = [row for row in lines(second) if row["event"] == "rung"]
    assert [row["at"] for row in rows] == [7.0 * k for k in range(1, 10)]  # the ninth began at 56 s
    assert second.stopped == "search.minutes 1 are over"
    assert {row["stopped"] for row in second.ledger.done()} <= {second.stopped, THROUGH}
    check(second, len({row["trial"] for row in rows}))
    assert drive(open_engine(job, clock=Clock(5.0))) == []


# what is kept


def test_an_end_has_the_measures_of_the_best_rung_and_the_sum_of_times(open_engine):
    accuracies = {0: 0.5, 1: 0.8, 2: 0.7, 3: 0.75}

    def result(work: Work) -> Row:
        accuracy, size = accuracies[work.rung] - work.trial / 1000, 100 + 10 * work.rung
        return scored(
            accuracy, size, artifact_sha256=f"{work.trial} {work.rung}", seconds=2.0, overhead_seconds=0.5
        )  # fmt: skip

    engine = open_engine(searching(27))
    drive(engine, result)
    row = ends(engine)[0]
    assert (row["rungs"], row["rung"], row["epochs"], row["stopped"]) == (4, 1, 1, THROUGH)
    assert (row["val_accuracy"], row["bytes"], row["artifact_sha256"]) == (0.8, 110, "0 1")
    assert (row["seconds"], row["overhead_seconds"]) == (8.0, 2.0)
    assert "cpu_seconds" not in row


def test_nearer_to_the_constraints_is_better_than_more_accurate(open_engine):
    def result(work: Work) -> Row:  # larger with each rung
        return scored(0.8 + 0.01 * work.rung, 90 + 20 * work.rung)

    engine = open_engine(searching(9, epochs=3, constraints=("bytes <= 100",)))
    drive(engine, result)
    assert {row["rung"] for row in ends(engine).values()} == {0}


# warm starts

KINDS: dict[str, Any] = {K: ["weights", "channels"], S: [0.0, 0.25, 0.5, 0.75, 0.9], W: [None, 2, 4, 8]}


def test_a_neighbour_is_the_nearest_trained_trial_and_never_of_channels(open_engine):
    engine = open_engine(searching(27, space=KINDS))
    ladder = engine.ladder
    trained: dict[int, Row] = {}  # number → configuration, of those whose last rung had epochs
    starts: dict[int, str] = {}
    seen = Counter()  # type: ignore[var-annotated]
    while (work := engine.peek()) is not None:
        others = {n: c for n, c in trained.items() if n != work.trial and c[K] != "channels"}
        nearest = min(others, key=lambda n: (space.distance(KINDS, work.values, others[n]), n), default=None)
        if work.values[K] == "channels" or work.before or nearest is None:
            assert work.neighbour is None
        elif label(nearest) == starts.get(work.trial):
            assert work.neighbour is None  # it begins there anyway
            seen["own start"] += 1
        else:
            assert work.neighbour == label(nearest)
            seen[work.rung] += 1
        assert work.start == starts.get(work.trial, "dense")
        engine.begin(work)
        result = measure(work) | {"start": work.neighbour if work.neighbour and work.trial % 2 else work.start}
        engine.take(work, result)
        starts[work.trial] = result["start"]
        if ladder[work.rung]:
            trained[work.trial] = work.values
    engine.finish()
    check(engine, 27)
    assert seen[0] > 3
    assert seen[1] > 1
    assert seen["own start"] > 0


def test_a_piece_of_work_knows_the_score_from_its_start(open_engine):
    scores: dict[int, float] = {}
    for work in drive(open_engine(searching(9))):
        assert work.score == scores.get(work.trial)
        scores[work.trial] = measure(work)["val_accuracy"]


@pytest.mark.parametrize("search", [{"warm_starts": False}, {"scheduler": "none"}, {"space": TRAINED}])
def test_there_are_no_neighbours_without_warm_starts_rungs_or_a_dense_model(open_engine, search):
    works = drive(open_engine(searching(12, **search)))
    assert {w.neighbour for w in works} == {None}
    assert len(works) >= 12


# population-based training


def breeding(trials: int = 8, **search: Any) -> Job:
    return searching(trials, **{"scheduler": "pbt", "space": TRAINED, "population": 8, **search})


def test_a_population_goes_on_together_and_the_worst_quarter_copies_the_best(open_engine):
    engine = open_engine(breeding())
    works = drive(engine)
    assert engine.ladder == list(range(1, 9))
    assert [w.rung for w in works] == [k for k in range(8) for _ in range(8)]  # nobody before all are as far
    check(engine, 8)
    rows = {(row["trial"], row["rung"]): row for row in lines(engine) if row["event"] == "rung"}
    copied = 0
    for work in works:
        if work.rung == 0:
            assert work.donor is None
            continue
        before = {n: rows[n, work.rung - 1] for n in range(8)}
        points = [engine.objectives.point(before[n]) for n in range(8)]
        order = pareto.ranked(points)
        worst, best = order[-2:], order[:2]
        assert (work.donor is not None) == (work.trial in worst)
        if work.donor is None:
            assert work.values == before[work.trial]["config"]
            continue
        assert work.donor in [label(n) for n in best]
        copied += 1
        theirs = before[int(work.donor[1:])]["config"]
        ratio = work.values[LR] / theirs[LR]
        assert 0.001 <= work.values[LR] <= 1.0
        assert work.values["augment.rotation"] in TRAINED["augment.rotation"]
        if work.values[LR] not in (0.001, 1.0) and not (ratio == pytest.approx(0.8) or ratio == pytest.approx(1.2)):
            copied -= 1  # drawn anew
    assert 3 < copied < 14  # 3 of 4 are changed, the others drawn anew


@pytest.mark.parametrize("at_once", [2, 4, 8])
def test_in_a_population_nobody_goes_on_before_half_of_the_others_are_as_far(open_engine, at_once):
    engine = open_engine(breeding())
    done = Counter()  # type: ignore[var-annotated]
    flying: list[Work] = []
    while True:
        while len(flying) < at_once and (work := engine.peek()) is not None:
            if work.rung:
                going = [n for n in range(8) if done[n] < len(engine.ladder)]
                assert 2 * sum(done[n] >= work.rung for n in going) >= len(going)
                assert (
                    done[work.trial] == work.rung == min(done[n] for n in going if n not in [w.trial for w in flying])
                )
            engine.begin(work)
            flying.append(work)
        if not flying:
            break
        work = flying.pop()
        engine.take(work, measure(work))
        done[work.trial] += 1
    engine.finish()
    check(engine, 8)


def test_a_population_is_no_larger_than_its_trials(open_engine):
    engine = open_engine(breeding(trials=5))
    drive(engine)
    check(engine, 5)
    engine = open_engine(breeding(trials=50, population=6), "other")
    drive(engine)
    check(engine, 6)


def test_a_population_lives_on_without_those_that_fail(open_engine):
    def fails(work: Work) -> Row:
        return {"status": "failed", "error": "no"} if (work.trial, work.rung) in ((0, 0), (3, 4)) else measure(work)

    engine = open_engine(breeding())
    drive(engine, fails, at_once=3)
    check(engine, 8)
    assert len(engine.ledger.done()) == 6


def test_exploit_is_of_the_worst_quarter_by_the_best_quarter():
    points = [(float(n),) for n in range(8)]
    found = {me: {population.exploit(points, [0.0] * 8, me, random.Random(k)) for k in range(40)} for me in range(8)}
    assert found == {**{me: {None} for me in range(6)}, 6: {0, 1}, 7: {0, 1}}
    violating = [1.0, 1.0, *[0.0] * 6]
    assert {population.exploit(points, violating, 0, random.Random(k)) for k in range(40)} == {2, 3}
    assert population.exploit(points[:3], [0.0] * 3, 2, random.Random(0)) is None  # no quarter of three


def test_explore_stays_in_the_space():
    dimensions = Search(scheduler="none", space={
        LR: {"low": 0.001, "high": 1.0, "log": True}, "augment.rotation": [0, 5, 10, 20],
        "train.batch_size": {"low": 16, "high": 10**6, "log": True}, "augment.policy": [None, "trivialaugment"],
    }).space  # fmt: skip
    config: Row = {LR: 0.9, "augment.rotation": 5, "train.batch_size": 100, "augment.policy": None}
    seen: dict[str, set[Any]] = {key: set() for key in config}
    for k in range(200):
        found = population.explore(dimensions, config, random.Random(k))
        assert list(found) == list(config)
        assert 0.001 <= found[LR] <= 1.0
        assert type(found["train.batch_size"]) is int
        for key, value in found.items():
            seen[key].add(value)
    assert {0.72, 1.0} < seen[LR]
    assert {80, 120} < seen["train.batch_size"]
    assert seen["augment.rotation"] == {0, 5, 10, 20}
    assert seen["augment.policy"] == {None, "trivialaugment"}
    assert population.explore(dimensions, config, random.Random(3)) == population.explore(
        dimensions, config, random.Random(3)
    )


# the ledger

FACTS = {"space": {S: [0.0, 0.5]}, "seed": 0}


def end(trial: int, status: str = "done") -> Row:
    return {"trial": trial, "event": "end", "status": status}


def test_a_ledger_comes_back_with_its_ends_by_number(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", FACTS)
    ledger.add({"trial": 2, "event": "rung", "rung": 0})
    for row in (end(2), end(0, "failed"), end(1)):
        ledger.add(row)
    again = Ledger(tmp_path / "ledger.jsonl", FACTS)
    assert (again.rows, again.lines, again.rungs) == (ledger.rows, ledger.lines, {(2, 0)})
    assert [row["trial"] for row in again.done()] == [1, 2]
    assert [row["trial"] for row in again.failed()] == [0]


def test_a_torn_last_line_is_lost_and_the_next_is_whole(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, FACTS).add(end(0))
    with path.open("a") as file:
        file.write('{"trial": 1, "event": "end", "status": "do')
    ledger = Ledger(path, FACTS)
    assert list(ledger.rows) == [0]
    ledger.add(end(1, "failed"))
    assert Ledger(path, FACTS).rows == {0: end(0), 1: end(1, "failed")}


def test_a_ledger_torn_in_its_first_line_starts_anew(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"schema": 2, "spa')
    Ledger(path, FACTS).add(end(0))
    assert list(Ledger(path, FACTS).rows) == [0]


@pytest.mark.parametrize(
    ("facts", "names"),
    [
        ({**FACTS, "seed": 1}, "seed"),
        ({"seed": 1, "space": {S: [0.0]}}, "seed, space"),
        ({**FACTS, "dataset": "x"}, "dataset"),
        ({"seed": 0}, "space"),
    ],
)
def test_a_ledger_of_another_search_is_refused(tmp_path, facts, names):
    Ledger(tmp_path / "ledger.jsonl", FACTS)
    with pytest.raises(JobError, match=rf"made by another search \(differs in {names}\)"):
        Ledger(tmp_path / "ledger.jsonl", facts)


def test_a_ledger_of_an_older_kind_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps({"schema": 1, **FACTS}) + "\n")
    with pytest.raises(JobError, match=r"made by another search \(differs in schema\)"):
        Ledger(path, FACTS)


def test_a_trial_ends_once_and_has_a_rung_once(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", FACTS)
    rung = {"trial": 0, "event": "rung", "rung": 0}
    ledger.add(rung)
    with pytest.raises(AssertionError, match="trial 0 has rung 0 already"):
        ledger.add(rung)
    ledger.add(end(0))
    for row in (end(0), {**rung, "rung": 1}):
        with pytest.raises(AssertionError, match="trial 0 is in the ledger already"):
            ledger.add(row)
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 3
