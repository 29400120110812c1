"""Fronts, the space, the ledger, and the proposer driven by hand: no Ray is started."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.search import Searcher

from raydeep.config import Job, Search
from raydeep.errors import JobError
from raydeep.search import pareto, space, tune
from raydeep.search.ledger import Ledger

Row = dict[str, Any]

# fronts


def brute_force(points: list[tuple[int, ...]]) -> set[int]:
    def beats(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return {i for i, p in enumerate(points) if not any(beats(q, p) for q in points) and p not in points[:i]}


def points_of(width: int) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.tuples(*[st.integers(0, 6)] * width), max_size=25)


@given(st.integers(1, 3).flatmap(points_of))
def test_the_front_is_that_of_brute_force_in_the_order_of_its_points(points):
    front = pareto.non_dominated(points)
    assert set(front) == brute_force(points)
    assert [points[i] for i in front] == sorted(points[i] for i in front)
    assert len(front) == len(set(front))


def test_of_equal_points_the_first_stays():
    assert pareto.non_dominated([(2, 2), (1, 3), (2, 2), (1, 3)]) == [1, 0]


@given(st.integers(0, 40), st.integers(1, 12))
def test_spread_keeps_both_ends_and_the_order(count, most):
    indices = list(range(100, 100 + count))
    found = pareto.spread(indices, most)
    assert len(found) == min(count, most)
    assert found == sorted(set(found))
    if count and most > 1:
        assert (found[0], found[-1]) == (indices[0], indices[-1])


def test_spread_is_even():
    assert pareto.spread(range(9), 3) == [0, 4, 8]


def test_the_smallest_close_model_is_chosen_on_validation():
    rows = [
        {"val_accuracy": 0.99, "bytes": 900},
        {"val_accuracy": 0.97, "bytes": 300},  # exactly a point below
        {"val_accuracy": 0.969, "bytes": 100},
    ]
    assert pareto.smallest_close(rows, 0.98) is rows[1]
    assert pareto.smallest_close(rows, 1.1) is None
    assert pareto.smallest_close([], 0.5) is None


# the space

W, A, S = "quantize.weight_bits", "quantize.activation_bits", "prune.sparsity"


def test_activation_bits_mean_nothing_beside_float_weights():
    assert space.canonical({W: None, A: 8, S: 0.5}) == {W: None, A: None, S: 0.5}
    assert space.canonical({W: 4, A: 8}) == {W: 4, A: 8}
    assert space.canonical({A: 8}) == {A: 8}


def test_canonical_leaves_its_argument_alone():
    config = {W: None, A: 8}
    space.canonical(config)
    assert config == {W: None, A: 8}


def test_keys_of_configurations_that_give_one_model_are_equal():
    assert space.key({W: None, A: 8}) == space.key({A: None, W: None})
    assert space.key({W: 4, A: 8}) != space.key({W: 4, A: None})
    assert space.key({S: 0}) != space.key({S: False})


def test_everything_is_each_distinct_configuration_once():
    found = space.everything({W: [None, 4], A: [None, 4, 8]})
    assert found == [
        {W: None, A: None},
        {W: 4, A: None},
        {W: 4, A: 4},
        {W: 4, A: 8},
    ]


def test_an_empty_space_has_one_configuration():
    assert space.everything({}) == [{}]


# the ledger

FACTS = {"space": {S: [0.0, 0.5]}, "seed": 0}


def test_a_ledger_comes_back_with_its_rows_by_number(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", FACTS)
    ledger.add({"trial": 2, "status": "done"})
    ledger.add({"trial": 0, "status": "failed"})
    ledger.add({"trial": 1, "status": "done"})
    again = Ledger(tmp_path / "ledger.jsonl", FACTS)
    assert again.rows == ledger.rows
    assert [row["trial"] for row in again.done()] == [1, 2]
    assert [row["trial"] for row in again.failed()] == [0]


def test_a_torn_last_line_is_lost_and_the_next_is_whole(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, FACTS).add({"trial": 0, "status": "done"})
    with path.open("a") as file:
        file.write('{"trial": 1, "status": "do')
    ledger = Ledger(path, FACTS)
    assert list(ledger.rows) == [0]
    ledger.add({"trial": 1, "status": "failed"})
    assert Ledger(path, FACTS).rows == {
        0: {"trial": 0, "status": "done"},
        1: {"trial": 1, "status": "failed"},
    }


def test_a_ledger_torn_in_its_first_line_starts_anew(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text('{"schema": 1, "spa')
    Ledger(path, FACTS).add({"trial": 0, "status": "done"})
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


def test_a_trial_is_written_once(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", FACTS)
    ledger.add({"trial": 0, "status": "done"})
    with pytest.raises(AssertionError, match="trial 0 is in the ledger already"):
        ledger.add({"trial": 0, "status": "done"})
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 2


# the proposer

SPACE: dict[str, list[Any]] = {
    S: [0.0, 0.5, 0.9],
    W: [None, 4, 8],
    A: [None, 8],
    "distill.enabled": [False, True],
}
SIZE = 3 * (1 + 2 + 2) * 2  # float weights leave one choice of activations


def searching(trials: int, choices: dict[str, list[Any]] = SPACE, seed: int = 0) -> Job:
    return Job(seed=seed, search=Search(trials=trials, space=choices, startup_trials=3))


def objective(config: Row) -> Row:
    bits = config[W] or 32
    return {
        "status": "done", "error": None, "val_accuracy": 0.9 - 0.2 * config[S] + 0.001 * bits,
        "bytes": int(1000 * (1 - config[S]) * bits), "seconds": 1.0, "not_a_column": 7,
    }  # fmt: skip


def failed(config: Row) -> Row:
    return {"status": "failed", "error": "ValueError: no"}


@pytest.fixture
def open_proposer(tmp_path: Path) -> Callable[..., tune.Proposer]:
    """Opens (or opens again) the search whose ledger is in tmp_path."""

    def make(job: Job, name: str = "ledger.jsonl", on_trial: Any = None) -> tune.Proposer:
        return tune.Proposer(job, Ledger(tmp_path / name, {"seed": job.seed}), on_trial)

    return make


def drive(
    proposer: tune.Proposer, result: Callable[[Row], Row] = objective, at_once: int = 1, most: int = 10**6
) -> list[Row]:
    """Asks and answers, `at_once` trials in flight, until `most` are answered or the proposer ends."""
    proposals: list[Row] = []
    flying: list[tuple[str, Row]] = []
    ids = (f"id{i}" for i in itertools.count())
    while True:
        while len(flying) < at_once and len(proposals) < most:
            name = next(ids)
            found = proposer.suggest(name)
            if found == Searcher.FINISHED:
                break
            proposals.append(found)
            flying.append((name, found))
        if not flying:
            return proposals
        name, found = flying.pop(0)
        proposer.on_trial_complete(name, result(found["values"]))


@pytest.mark.parametrize("at_once", [1, 4])
def test_no_configuration_is_proposed_twice_and_all_are_in_the_end(open_proposer, at_once):
    proposer = open_proposer(searching(trials=99))
    found = drive(proposer, at_once=at_once)
    assert len(found) == SIZE
    keys = {space.key(p["values"]) for p in found}
    assert keys == {space.key(c) for c in space.everything(SPACE)}
    assert sorted(proposer.ledger.rows) == list(range(SIZE))


def test_the_search_stops_after_its_trials(open_proposer):
    found = drive(open_proposer(searching(trials=7)))
    assert [p["trial"] for p in found] == list(range(7))


def test_an_empty_space_is_one_trial(open_proposer):
    found = drive(open_proposer(searching(trials=5, choices={})), lambda _: failed({}))
    assert found == [{"trial": 0, "values": {}, "seed": tune.trial_seed(0, 0)}]


def test_a_row_of_the_ledger_holds_configuration_seed_and_result(open_proposer):
    told: list[Row] = []
    proposer = open_proposer(searching(trials=1), on_trial=told.append)
    (proposal,) = drive(proposer)
    expected = objective(proposal["values"])
    del expected["not_a_column"]
    row = {"trial": 0, "config": proposal["values"], "seed": proposal["seed"], **expected}
    assert proposer.ledger.rows == {0: row}
    assert told == [row]
    assert proposal["seed"] == tune.trial_seed(0, 0)


def test_the_same_seed_proposes_the_same_and_another_seed_otherwise(open_proposer):
    def search(name: str, seed: int) -> list[Row]:
        return drive(open_proposer(searching(trials=12, seed=seed), name))

    first, same, other = search("a", 0), search("b", 0), search("c", 1)
    assert first == same
    assert [p["values"] for p in first] != [p["values"] for p in other]


def test_a_search_opened_again_goes_on_with_what_is_missing(open_proposer):
    first = drive(open_proposer(searching(trials=SIZE)), most=SIZE // 2)
    assert [p["trial"] for p in first] == list(range(SIZE // 2))
    second = drive(open_proposer(searching(trials=SIZE)))
    assert [p["trial"] for p in second] == list(range(SIZE // 2, SIZE))
    assert len({space.key(p["values"]) for p in first + second}) == SIZE
    assert drive(open_proposer(searching(trials=SIZE))) == []


def test_trials_that_were_cut_off_get_their_numbers_again(open_proposer):
    proposer = open_proposer(searching(trials=8))
    asked = {f"id{i}": proposer.suggest(f"id{i}") for i in range(5)}
    for name in ("id4", "id1"):
        proposer.on_trial_complete(name, objective(asked[name]["values"]))
    again = drive(open_proposer(searching(trials=8)))
    assert [p["trial"] for p in again] == [0, 2, 3, 5, 6, 7]
    finished = {space.key(asked[name]["values"]) for name in ("id4", "id1")}
    assert finished.isdisjoint(space.key(p["values"]) for p in again)


@pytest.mark.parametrize("result", [failed({}), None, {}, {"done": True}])
def test_a_failed_trial_is_written_counted_and_not_tried_again(open_proposer, result):
    proposer = open_proposer(searching(trials=3))
    proposal = proposer.suggest("id0")
    proposer.on_trial_complete("id0", result, error=not result)
    (row,) = proposer.ledger.failed()
    assert (row["trial"], row["config"], row["status"]) == (0, proposal["values"], "failed")
    assert row["error"]
    rest = drive(proposer)
    assert [p["trial"] for p in rest] == [1, 2]
    assert drive(open_proposer(searching(trials=99)), most=1)[0]["trial"] == 3
    assert len(proposer.ledger.done()) == 2


def test_a_search_goes_on_where_all_trials_fail(open_proposer):
    found = drive(open_proposer(searching(trials=99)), failed)
    assert len({space.key(p["values"]) for p in found}) == SIZE


def test_configurations_outside_the_choices_are_found_again(open_proposer):
    # float weights take float activations with them, though the space has no such choice
    job = searching(trials=99, choices={W: [None, 4], A: [4, 8], S: [0.0, 0.5]})
    drive(open_proposer(job), most=4)
    drive(open_proposer(job))
    assert len(Ledger(open_proposer(job).ledger.path, {"seed": 0}).done()) == 2 * 3


def test_results_of_trials_that_were_not_asked_for_are_left_out(open_proposer):
    proposer = open_proposer(searching(trials=3))
    proposer.on_trial_complete("stranger", objective({W: 4, S: 0.5}))
    assert proposer.ledger.rows == {}


@pytest.mark.parametrize(
    "result",
    [
        lambda good: {"val_accuracy": 0.9 if good else 0.5, "bytes": 100},
        lambda good: {"val_accuracy": 0.5, "bytes": 10 if good else 100},
    ],
    ids=["accuracy up", "bytes down"],
)
def test_the_objectives_guide_the_search(open_proposer, result):
    choices = {S: [i / 10 for i in range(10)], "recover.epochs": list(range(10))}
    proposer = open_proposer(searching(trials=50, choices=choices))
    found = drive(proposer, lambda config: {"status": "done", **result(config["recover.epochs"] == 7)})
    assert sum(p["values"]["recover.epochs"] == 7 for p in found) >= 9  # of 10; by chance 5


def test_seeds_of_trials_never_change():
    found = [tune.trial_seed(seed, trial) for seed, trial in [(0, 0), (0, 1), (1, 0), (7, 31)]]
    assert found == [821328062, 1817441348, 1835504127, 137354753]


def test_predictions_come_back(tmp_path):
    import numpy as np

    tune.save_predictions(tune.trial_folder(tmp_path, 3), np.arange(4), np.arange(3) * 2)
    found = tune.load_predictions(tmp_path / "trials" / "t003")
    assert found["val"].tolist() == [0, 1, 2, 3]
    assert found["test"].tolist() == [0, 2, 4]
    assert found["val"].dtype == np.int64
