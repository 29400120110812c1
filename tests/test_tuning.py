"""The search section of a job: what loads, what each refusal says, the ladder of rungs, room for trials."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from raydeep.config import Job, Search, load_job, parse_job
from raydeep.errors import JobError
from raydeep.tuning import Choices, Constraint, Range

S, K, B, LR = "prune.sparsity", "prune.kind", "train.batch_size", "train.lr"


def searching(search: dict[str, Any], **rest: Any) -> Job:
    return parse_job({"search": search, **rest}, "job.yaml")


def refusal(search: dict[str, Any], **rest: Any) -> str:
    with pytest.raises(JobError) as caught:
        searching(search, **rest)
    message = str(caught.value)
    assert message.startswith("job.yaml: ")
    assert "\n" not in message  # one clear message, not one of each kind that a dimension could be
    return message.removeprefix("job.yaml: ")


def refused_in_space(dimension: Any, key: str = S) -> str:
    message = refusal({"space": {key: dimension}})
    assert message.startswith(f"search.space.{key}: ")
    return message.removeprefix(f"search.space.{key}: ")


# the space: what loads


def test_a_dimension_is_a_list_choices_or_a_range():
    space = searching({
        "space": {
            K: ["weights", "2:4"],
            S: {"choices": [0.5, 0.9], "when": {K: ["weights"]}},
            LR: {"low": 1e-4, "high": 0.1, "log": True, "when": {S: [0.5]}},
            B: {"low": 16, "high": 256, "step": 16},
            "quantize.weight_bits": ["none", 4],
        }
    }).search.space  # fmt: skip
    assert space == {
        K: ["weights", "2:4"],
        S: Choices(choices=[0.5, 0.9], when={K: ["weights"]}),
        LR: Range(low=1e-4, high=0.1, log=True, when={S: [0.5]}),
        B: Range(low=16, high=256, step=16),
        "quantize.weight_bits": [None, 4],
    }


def test_none_is_a_choice_and_may_stand_in_when():
    bits = {"quantize.weight_bits": {"choices": ["none", 4]}}
    space = searching({"space": {**bits, S: {"choices": [0.5], "when": {"quantize.weight_bits": ["none"]}}}}).search
    assert space.space["quantize.weight_bits"].choices == [None, 4]  # type: ignore[union-attr]
    assert space.space[S].when == {"quantize.weight_bits": [None]}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("found", "whole", "grid"),
    [
        (Range(low=2, high=5), True, [2, 3, 4, 5]),
        (Range(low=2, high=9, step=3), True, [2, 5, 8]),
        (Range(low=2, high=8.0, step=3), False, [2.0, 5.0, 8.0]),
        (Range(low=0, high=1, step=0.25), False, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (Range(low=0.1, high=0.4, step=0.1), False, [0.1, 0.2, 0.3, 0.4]),  # no 0.30000000000000004
        (Range(low=0.0, high=1.0), False, None),
        (Range(low=0.0, high=1.0, points=3), False, [0.0, 0.5, 1.0]),
        (Range(low=0.01, high=100.0, points=5, log=True), False, [0.01, 0.1, 1.0, 10.0, 100.0]),
        (Range(low=8, high=128, points=5, log=True), True, [8, 16, 32, 64, 128]),
        (Range(low=1, high=3, points=9), True, [1, 2, 3]),  # each once
        (Range(low=1, high=8, log=True), True, None),
        (Range(low=0, high=10**9), True, None),
    ],
    ids=str,
)
def test_the_numbers_of_a_range(found, whole, grid):
    assert (found.whole, found.grid()) == (whole, grid)
    assert grid is None or {type(v) for v in found.grid()} == {int if whole else float}


@given(
    st.tuples(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6)).map(sorted).filter(lambda p: p[0] < p[1] * 0.99),
    st.integers(2, 40), st.booleans(),
)  # fmt: skip
def test_points_are_even_and_end_where_the_range_does(ends, points, log):
    low, high = ends
    grid = Range(low=low, high=high, points=points, log=log).grid()
    assert grid is not None
    assert grid[-1] == pytest.approx(high, rel=1e-5)
    assert grid[0] == pytest.approx(low, rel=1e-5)
    places = [math.log(v) if log else v for v in grid]
    gaps = [b - a for a, b in pairwise(places)]
    assert min(gaps) > 0
    assert max(gaps) - min(gaps) < 1e-4 * max(1.0, *map(abs, places))


# the space: what is refused


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({"low": 0.9, "high": 0.1}, "an empty range, from 0.9 to 0.1: low must be less than high"),
        ({"low": 0.5, "high": 0.5}, "an empty range, from 0.5 to 0.5: low must be less than high"),
        ({"low": 0.1, "high": math.inf}, "an empty range, from 0.1 to inf"),
        ({"low": math.nan, "high": 0.5}, "an empty range, from nan to 0.5"),
        ({"low": 0, "high": 0.9, "log": True}, "log needs low above 0, found 0"),
        ({"low": -1.0, "high": 0.9, "log": True}, "log needs low above 0, found -1.0"),
        ({"low": 0, "high": 0.9, "lag": True}, "lag is no key of it; expected low, high, log, step, points, when"),
        ({"choices": [0.5], "log": True}, "log is no key of it; expected choices, when"),
        ({"choices": []}, "choices: List should have at least 1 item"),
        ([], "found [], it has no choices"),
        ({"low": 0}, "high: Field required"),
        ({"high": 0.9}, "low: Field required"),
        ({"low": "a", "high": 0.9}, "low: expected a number, found 'a'"),
        ({"low": False, "high": 0.9}, "low: expected a number, found False"),
        ({"low": 0, "high": 0.9, "step": 0}, "step: Input should be greater than 0"),
        ({"low": 0, "high": 0.9, "step": 1}, "step 1 is wider than the range from 0 to 0.9"),
        ({"low": 0, "high": 0.9, "step": 0.1, "points": 3}, "step goes with neither log nor points"),
        ({"low": 0.1, "high": 0.9, "step": 0.1, "log": True}, "step goes with neither log nor points"),
        ({"low": 0, "high": 0.9, "points": 1}, "points: Input should be greater than or equal to 2"),
        ({"low": 0, "high": 0.9, "points": 1001}, "points: Input should be less than or equal to 1000"),
        ({"low": 0, "high": 0.9, "when": {K: "weights"}}, f"when.{K}: Input should be a valid list"),
        ({}, "expected a list of choices, {choices: [...]} or {low: …, high: …}, each perhaps with when"),
        ({"when": {}}, "expected a list of choices, "),
        (0.5, "found 0.5, expected a list of choices, "),
        (None, "found None, expected a list of choices, "),
        # the values are those of the key
        ([0.5, 1.5], "prune.sparsity: found 1.5, expected less than 1"),
        ({"choices": [0.5, -1]}, "prune.sparsity: found -1, expected greater than or equal to 0"),
        ({"low": 0, "high": 1}, "prune.sparsity: found 1, expected less than 1"),  # 1 is no sparsity
        ({"low": -0.5, "high": 0.5}, "prune.sparsity: found -0.5, expected greater than or equal to 0"),
    ],
    ids=str,
)
def test_a_wrong_dimension_is_named_with_what_was_expected(dimension, message):
    assert refused_in_space(dimension).startswith(message)


@pytest.mark.parametrize(
    "dimension",
    [
        {"low": 16.0, "high": 64.0},  # its ends are whole, what is between is not
        {"low": 16, "high": 64.5},
        {"low": 16.0, "high": 64.0, "log": True},
        {"low": 16, "high": 64, "step": 2.5},
        {"low": 16.0, "high": 64.0, "points": 6},
        [16, 20.5],
    ],
    ids=str,
)
def test_a_key_of_whole_numbers_refuses_a_range_of_others(dimension):
    message = refused_in_space(dimension, B)
    assert message.startswith(f"{B}: found ")
    assert "expected a valid integer" in message


@pytest.mark.parametrize(
    "dimension",
    [{"low": 16, "high": 64}, {"low": 16, "high": 64, "log": True}, {"low": 16.0, "high": 64.0, "points": 4}],
)
def test_a_key_of_whole_numbers_takes_a_range_of_them(dimension):
    assert searching({"space": {B: dimension}}).search.space[B] == Range(**dimension)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({S: {"choices": [0.5], "when": {K: ["weights"]}}}, f"when names {K}, which is no key of the space before it"),
        (
            {S: {"choices": [0.5], "when": {K: ["weights"]}}, K: ["weights"]},
            f"when names {K}, which is no key of the space before it",
        ),
        ({S: {"low": 0, "high": 0.5, "when": {S: [0.5]}}}, f"when names {S}, which is no key of the space before it"),
        (
            {K: ["weights", "2:4"], S: {"low": 0, "high": 0.5, "when": {K: ["channels"]}}},
            f"when {K} is ['channels'], which none of its choices is",
        ),
    ],
)
def test_a_condition_is_about_an_earlier_key_and_one_of_its_values(space, message):
    assert refusal({"space": space}) == f"search: space.{S}: {message}"


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"objectives": ["accuracy", "speed"]},
            "search.objectives: found ['accuracy', 'speed'], speed is no objective; expected accuracy, worst_class, "
            "bytes, latency, macs",
        ),
        ({"objectives": {"speed": "max"}}, "search.objectives: speed is no objective; expected accuracy, "),
        ({"objectives": {"accuracy": "up"}}, "search.objectives.accuracy: found 'up', expected 'min' or 'max'"),
        ({"objectives": []}, "search.objectives: found [], expected 1 to 4 of them, as a list or as NAME: min or max"),
        ({"objectives": "accuracy"}, "search.objectives: found 'accuracy', expected 1 to 4 of them"),
        (
            {"constraints": ["accuracy >= 0.9", "speed >= 3"]},
            "search.constraints.1: found 'speed >= 3', speed is no objective; expected one of accuracy, worst_class, ",
        ),
        *(
            (
                {"constraints": [text]},
                f"search.constraints.0: found {text!r}, expected OBJECTIVE >= NUMBER or OBJECTIVE <= NUMBER, such as "
                f"accuracy >= 0.97",
            )
            for text in ("accuracy > 0.9", "accuracy >= high", "accuracy", "0.9 <= accuracy", "accuracy >= 9 or", 3)
        ),
        ({"constraints": "accuracy >= 0.9"}, "search.constraints: found 'accuracy >= 0.9', expected a valid tuple"),
        ({"target": {"constraints": True}}, "search: target.constraints needs constraints"),
        *(
            ({"rungs": rungs}, f"search.rungs: found {rungs}, expected epochs in rising order, such as [0, 1, 3, 9]")
            for rungs in ([0, 3, 3], [3, 1], [-1, 2])
        ),
        *(
            ({"rungs": rungs}, f"search.rungs: found {rungs!r}, expected auto, or epochs in rising order such as [0, ")
            for rungs in ([], "all", [0, 1.5], [False, 3], 3, None)
        ),
        (
            {"rungs": [0, 3], "space": {LR: [0.1, 0.2]}},
            "search: rungs: a network that trains from scratch needs an epoch: begin with 1 or more",
        ),
        (
            {"sampler": "grid", "space": {S: {"low": 0.0, "high": 0.9}}},
            f"search: sampler grid: space.{S} is a range without end; give it points or step",
        ),
        (
            {"scheduler": "pbt", "space": {S: [0.0, 0.5]}},
            "search: scheduler pbt needs keys of train or augment in the space",
        ),
        *(
            (
                {"scheduler": "pbt", "space": {LR: [0.1, 0.2], key: values}},
                f"search: scheduler pbt can't change {key} on the way; it can: train.lr, train.momentum, ",
            )
            for key, values in [("model.name", ["seed"]), (S, [0.0, 0.5]), (B, [32, 64])]
        ),
        *(
            (
                {"scheduler": scheduler, "space": {key: [1, 2]}},
                f"search: space.{key}: rungs set the epochs; use scheduler none, or another key",
            )
            for scheduler in ("halving", "asha")
            for key in ("recover.epochs", "quantize.epochs", "train.epochs")
        ),
        ({"reduction": 1}, "search.reduction: found 1, expected greater than or equal to 2"),
        ({"trials": 0}, "search.trials: found 0, expected greater than or equal to 1"),
        ({"minutes": 0}, "search.minutes: found 0, expected greater than 0"),
        ({"target": {"stal": 3}}, "search.target.stal is not a key of a job"),
    ],
    ids=str,
)
def test_a_wrong_search_is_named_with_what_was_expected(search, message):
    assert refusal(search).startswith(message)


def test_recover_epochs_may_be_searched_without_rungs():
    assert searching({"scheduler": "none", "space": {"recover.epochs": [1, 2]}}).search.space


def test_rounds_of_pruning_must_fit_the_first_rung_that_trains():
    message = (
        "prune.schedule iterative: 5 rounds do not fit the 1 epochs of the first rung that trains; set search.rungs to "
        "begin with 0 and 5 or more, or search.scheduler none"
    )
    iterative = {"schedule": "iterative", "rounds": 5}
    recover = {"epochs": 9}
    assert refusal({}, prune=iterative, recover=recover) == message
    space = {"prune.schedule": ["cubic", "iterative"], "prune.rounds": [2, 5], S: [0.5]}
    assert refusal({"space": space}, recover=recover) == message
    assert refusal({"rungs": [0, 4, 9]}, prune=iterative, recover=recover) == message.replace("1 epochs", "4 epochs")
    assert searching({"rungs": [0, 5, 9]}, prune=iterative, recover=recover)
    assert searching({"scheduler": "none"}, prune=iterative, recover=recover)
    assert searching({"space": {}}, prune=iterative, recover=recover)
    assert searching({"space": {LR: [0.1, 0.2]}}, prune=iterative, recover=recover)  # trained, then compressed whole


def test_a_batch_must_reach_all_workers_of_a_trial():
    space = {LR: [0.1, 0.2]}
    message = refusal({"workers_per_trial": 4, "space": space}, train={"batch_size": 3})
    assert message == "train.batch_size 3 is less than search.workers_per_trial 4 × train.accumulate 1: raise it"
    message = refusal({"workers_per_trial": 4}, recover={"batch_size": 6}, train={"accumulate": 2})
    assert message == "recover.batch_size 6 is less than search.workers_per_trial 4 × train.accumulate 2: raise it"


@pytest.mark.parametrize("dimension", ["[0.5, 1.5]", "{low: 0, high: 1}", "{low: 3, high: 1}"])
def test_a_file_and_a_set_are_refused_alike(tmp_path: Path, dimension):
    path = tmp_path / "job.yaml"
    path.write_text(f"search: {{space: {{{S}: {dimension}}}}}")
    with pytest.raises(JobError) as in_file:
        load_job(path)
    path.write_text("")
    with pytest.raises(JobError) as in_set:
        load_job(path, [f"search.space.{S}={dimension}"])
    assert str(in_file.value) == str(in_set.value)
    assert str(in_file.value).startswith(f"{path}: search.space.{S}: ")


# what is read of it


def test_constraints_are_read():
    search = Search(constraints=("accuracy>=0.97", " bytes <= 50_000 ", "latency <= 1.5e-1"))  # type: ignore[arg-type]
    assert search.constraints == ("accuracy >= 0.97", "bytes <= 50000", "latency <= 1.5e-1")
    assert search.limits() == [
        Constraint("accuracy", True, 0.97), Constraint("bytes", False, 50_000.0), Constraint("latency", False, 0.15),
    ]  # fmt: skip


def test_a_list_of_objectives_has_the_usual_directions():
    found = searching({"objectives": ["worst_class", "bytes", "macs"]}).search.objectives
    assert list(found.items()) == [("worst_class", "max"), ("bytes", "min"), ("macs", "min")]
    assert searching({"objectives": {"accuracy": "min"}}).search.objectives == {"accuracy": "min"}


def test_values_to_check_are_all_choices_or_the_ends():
    space = {K: ["weights"], S: {"choices": [0.1, 0.2]}, LR: {"low": 0.1, "high": 0.5}, B: {"low": 1, "high": 9}}
    search = searching({"space": space}).search
    found = [search.values(key) for key in (K, S, LR, B, "train.ema")]
    assert found == [["weights"], [0.1, 0.2], [0.1, 0.5], [1, 9], []]


@pytest.mark.parametrize(
    ("key", "trains"), [(S, False), ("recover.lr", False), (LR, True), ("model.name", True), ("augment.crop", True)]
)
def test_keys_of_model_train_and_augment_make_trials_train(key, trains):
    value = {S: 0.5, "recover.lr": 0.1, LR: 0.1, "model.name": "seed", "augment.crop": 0.1}[key]
    assert searching({"space": {key: [value]}}).search.trains is trains


# the ladder


@pytest.mark.parametrize(
    ("epochs", "compressed", "trained"),
    [
        (0, [0], None),
        (1, [0, 1], [1]),
        (2, [0, 1, 2], [1, 2]),
        (4, [0, 1, 4], [1, 4]),
        (10, [0, 1, 3, 10], [1, 3, 10]),
        (27, [0, 1, 3, 9, 27], [1, 3, 9, 27]),
    ],
)
def test_the_ladder_that_rungs_auto_makes(epochs, compressed, trained):
    assert Search().ladder(epochs) == compressed
    if trained:
        assert Search(space={LR: [0.1]}).ladder(epochs) == trained


@given(st.integers(1, 300), st.integers(2, 16), st.booleans())
def test_a_ladder_rises_by_the_reduction_to_its_end(epochs, reduction, trains):
    found = Search(reduction=reduction, space={LR: [0.1]} if trains else {S: [0.5]}).ladder(epochs)
    assert found[-1] == epochs
    assert found[0] == (1 if trains else 0)
    assert found == sorted(set(found))
    ratios = [b / a for a, b in pairwise(found) if a]
    assert all(ratio == reduction for ratio in ratios[:-1])
    assert not ratios or 1.5 <= ratios[-1] < 1.5 * reduction + 1e-9


def test_other_ladders():
    assert Search(scheduler="none").ladder(27) == [27]
    assert Search(scheduler="none", rungs=(0, 5)).ladder(27) == [27]
    assert Search(rungs=(0, 2, 5)).ladder(27) == [0, 2, 5]
    assert Search(reduction=2).ladder(16) == [0, 1, 2, 4, 8, 16]
    pbt = Search(scheduler="pbt", space={LR: [0.1, 0.2]})
    assert pbt.ladder(16) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert pbt.ladder(3) == [1, 2, 3]
    assert pbt.ladder(1) == [1]
    assert pbt.model_copy(update={"rungs": (5, 9)}).ladder(16) == [5, 9]


# room


@pytest.mark.parametrize(
    ("search", "there", "room"),
    [
        ({}, (4, 0, 1, False), 4),
        ({"cpus_per_trial": 1.5}, (4, 0, 1, False), 2),
        ({"cpus_per_trial": 0.1}, (0.3, 0, 1, False), 3),  # 0.3 / 0.1 is 2.9999999999999996
        ({"cpus_per_trial": 8}, (4, 0, 1, False), 0),
        ({"concurrent": 3}, (4, 0, 1, False), 3),
        ({"concurrent": 9}, (4, 0, 1, False), 4),
        ({}, (16, 2, 1, True), 2),
        ({}, (1, 2, 1, True), 1),
        ({"gpus_per_trial": 0.25}, (16, 2, 1, True), 8),
        ({"gpus_per_trial": 0.25}, (16, 2, 1, False), 16),
        ({"workers_per_trial": 2, "cpus_per_trial": 9}, (16, 0, 3, False), 2),
        ({"workers_per_trial": 2, "gpus_per_trial": 0.25}, (16, 5, 1, True), 2),  # a worker has a whole GPU
    ],
)
def test_room_for_trials(search, there, room):
    assert Search(**search).room(*there) == room


# and back


def test_a_job_with_ranges_conditions_and_targets_comes_back_from_its_file(tmp_path: Path):
    job = parse_job({
        "search": {
            "space": {
                K: ["weights", "2:4"],
                S: {"low": 0.3, "high": 0.9, "step": 0.1, "when": {K: ["weights"]}},
                "quantize.weight_bits": {"choices": [None, 4, {"average": 3.5}]},
                "quantize.activation_bits": {"choices": [None, 8], "when": {"quantize.weight_bits": [None, 4]}},
                "recover.lr": {"low": 1e-5, "high": 0.1, "log": True},
                "quantize.calibration_rows": {"low": 64, "high": 512, "log": True, "points": 4},
                "distill.enabled": [False, True],
            },
            "objectives": {"bytes": "min", "worst_class": "max"},
            "constraints": ["accuracy >= 0.97", "bytes <= 50_000"],
            "rungs": [0, 2, 8], "target": {"constraints": True, "stall": 8}, "minutes": 1.5,
        }
    }, "job.yaml")  # fmt: skip
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False))
    again = load_job(path)
    assert again == job
    assert list(again.search.space) == list(job.search.space)
    assert list(again.search.objectives) == ["bytes", "worst_class"]
    kinds = {key: type(dimension) for key, dimension in again.search.space.items()}
    assert kinds[S] is Range
    assert kinds["quantize.activation_bits"] is Choices
    assert {type(v) for v in again.search.space["distill.enabled"]} == {bool}  # type: ignore[union-attr]
    low = again.search.space["quantize.calibration_rows"]
    assert isinstance(low, Range)
    assert type(low.low) is int  # a range of whole numbers stays one


def test_a_trial_has_no_space_of_its_own_and_no_rungs_that_would_not_fit_it():
    job = searching({"rungs": [1, 3], "scheduler": "pbt", "space": {LR: [0.1, 0.2], "augment.crop": [0.0, 0.1]}})
    trial = job.with_values({LR: 0.2})
    assert trial.train.lr == 0.2
    assert (trial.search.space, trial.search.scheduler) == ({}, "none")
