"""The space and who proposes configurations of it: each once, conditions heeded, types kept, and better than chance."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raydeep.config import Search
from raydeep.search import space
from raydeep.search.sampler import Result, Sampler

Config = dict[str, Any]

S, K, W, A = "prune.sparsity", "prune.kind", "quantize.weight_bits", "quantize.activation_bits"
D, LR, E, B = "distill.enabled", "recover.lr", "recover.epochs", "train.batch_size"
SAMPLERS = ("tpe", "nsga2", "random", "grid")

SPACE: dict[str, Any] = {S: [0.0, 0.5, 0.9], W: [None, 4, 8], A: [None, 8], D: [False, True]}
SIZE = 3 * (1 + 2 + 2) * 2  # float weights leave one choice of activations


def sampler(
    dimensions: dict[str, Any], name: str = "tpe", seed: int = 0, objectives: int = 2, **search: Any
) -> Sampler:
    search = {"startup_trials": 4, "population": 4, "scheduler": "none", **search}
    return Sampler(Search(space=dimensions, sampler=name, **search), objectives, seed)  # type: ignore[arg-type]


def drawn(
    found: Sampler, most: int, judge: Callable[[Config], tuple[float, ...]] | None = None, rung: int = 0
) -> list[Config]:
    """So many proposals at most, each judged before the next."""
    out = []
    for _ in range(most):
        config = found.ask()
        if config is None:
            break
        out.append(config)
        point = judge(config) if judge else (float(len(out) % 5), float(len(out) % 3))
        found.tell(rung, Result(config, point, 0.0))
    return out


def keys(configs: Iterable[Config]) -> list[str]:
    return [space.key(config) for config in configs]


# the space


def test_activation_bits_mean_nothing_beside_float_weights():
    assert space.canonical({W: None, A: 8, S: 0.5}) == {W: None, A: None, S: 0.5}
    assert space.canonical({W: 4, A: 8}) == {W: 4, A: 8}
    assert space.canonical({A: 8}) == {A: 8}


def test_the_pattern_of_n_m_is_its_sparsity():
    assert space.canonical({K: "2:4", S: 0.9}) == {K: "2:4", S: 0.0}
    assert space.canonical({K: "weights", S: 0.9}) == {K: "weights", S: 0.9}
    assert space.canonical({K: "2:4"}) == {K: "2:4"}


def test_canonical_leaves_its_argument_alone():
    config = {W: None, A: 8, K: "2:4", S: 0.5}
    space.canonical(config)
    assert config == {W: None, A: 8, K: "2:4", S: 0.5}


def test_keys_of_configurations_that_give_one_model_are_equal():
    assert space.key({W: None, A: 8}) == space.key({A: None, W: None})
    assert space.key({W: 4, A: 8}) != space.key({W: 4, A: None})
    assert space.key({S: 0}) != space.key({S: False})


def test_everything_is_each_distinct_configuration_once():
    assert space.everything({W: [None, 4], A: [None, 4, 8]}) == [
        {W: None, A: None},
        {W: 4, A: None},
        {W: 4, A: 4},
        {W: 4, A: 8},
    ]


def test_everything_heeds_conditions_even_on_what_canonical_changed():
    dimensions = Search(space={
        W: [None, 4], A: [None, 8], LR: {"choices": [0.1, 0.2], "when": {A: [8]}},
        S: {"low": 0, "high": 0.5, "points": 2, "when": {LR: [0.2]}},
    }).space  # fmt: skip
    assert space.everything(dimensions) == [
        {W: None, A: None},
        {W: 4, A: None},
        {W: 4, A: 8, LR: 0.1},
        {W: 4, A: 8, LR: 0.2, S: 0.0},
        {W: 4, A: 8, LR: 0.2, S: 0.5},
    ]


def test_an_empty_space_has_one_configuration():
    assert space.everything({}) == [{}]
    assert drawn(sampler({}), 3) == [{}]


def test_endless_and_huge_spaces_are_not_counted_out():
    assert space.everything(Search(space={LR: {"low": 0.1, "high": 0.2}}).space) is None
    ten = {"choices": [i / 10 for i in range(10)]}
    names = ["prune.sparsity", "distill.weight", "augment.erasing", "augment.blur"]
    assert len(space.everything(Search(space=dict.fromkeys(names, ten)).space) or []) == 10**4
    huge = Search(space=dict.fromkeys([*names, "augment.contrast"], ten))
    assert space.everything(huge.space) is None
    first = drawn(sampler(dict(huge.space), "grid"), 12)  # the grid goes through it all the same
    assert [config["augment.contrast"] for config in first] == [*(i / 10 for i in range(10)), 0.0, 0.1]
    assert [config["augment.blur"] for config in first] == [0.0] * 10 + [0.1] * 2


# distance


def dimensions_and_configs() -> st.SearchStrategy[tuple[dict[str, Any], list[Config]]]:
    dimensions = Search(scheduler="none", space={
        K: ["weights", "channels", "2:4"], S: {"low": 0.2, "high": 0.8, "when": {K: ["weights"]}}, W: [None, 2, 4, 8],
        A: [None, 8], D: [False, True], E: {"low": 0, "high": 10}, "augment.scale": [[1, 1], [0.9, 1.1]],
    }).space  # fmt: skip
    one = st.fixed_dictionaries({
        K: st.sampled_from(["weights", "channels", "2:4"]), S: st.floats(0.2, 0.8), W: st.sampled_from([None, 2, 4, 8]),
        A: st.sampled_from([None, 8]), D: st.booleans(), E: st.integers(0, 10),
        "augment.scale": st.sampled_from([[1, 1], [0.9, 1.1]]),
    })  # fmt: skip

    def settled(config: Config) -> Config:
        config = space.canonical(config)
        return {key: value for key, value in config.items() if space.counts(dimensions[key], config)}

    return st.tuples(st.just(dict(dimensions)), st.lists(one.map(settled), min_size=3, max_size=3))


@given(dimensions_and_configs())
def test_distance_is_a_metric(drawn_configs):
    dimensions, (a, b, c) = drawn_configs
    ab, bc, ac = (space.distance(dimensions, x, y) for x, y in [(a, b), (b, c), (a, c)])
    assert 0 <= ab <= len(dimensions)
    assert (ab == 0) == (a == b)
    assert ab == space.distance(dimensions, b, a)
    assert ac <= ab + bc + 1e-12
    assert space.distance(dimensions, a, a) == 0


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ({W: 2}, {W: 8}, 1.0),
        ({W: 2}, {W: 4}, 0.5),  # a place further of three numbers
        ({W: None}, {W: 2}, 1.0),  # not a number
        ({W: 2, D: False}, {W: 4, D: True}, 1.5),
        ({E: 2}, {E: 7}, 0.5),
        ({S: 0.3}, {}, 1.0),
        ({}, {}, 0.0),
        ({K: "weights"}, {K: "2:4"}, 1.0),
        ({"augment.scale": [1, 1]}, {"augment.scale": [1, 1]}, 0.0),
    ],
)
def test_distances(a, b, distance):
    dimensions = {
        W: [None, 2, 4, 8], D: [False, True], S: [0.3, 0.5], K: ["weights", "2:4"], "augment.scale": [[1, 1], [1, 2]],
        **Search(scheduler="none", space={E: {"low": 0, "high": 10}}).space,
    }  # fmt: skip
    assert space.distance(dimensions, a, b) == pytest.approx(distance)


# each once, and all


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_proposed_twice_and_all_is_in_the_end(name):
    found = sampler(SPACE, name)
    assert found.size == SIZE
    proposals = drawn(found, 99)
    assert found.ask() is None
    assert sorted(keys(proposals)) == sorted(keys(space.everything(SPACE) or []))
    assert len(proposals) == SIZE == len(set(keys(proposals)))
    if name == "grid":
        assert proposals == space.everything(SPACE)


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_tried_already_is_not_proposed(name):
    found = sampler(SPACE, name)
    every = space.everything(SPACE) or []
    for config in every[::2]:
        found.took(config)
    assert sorted(keys(drawn(found, 99))) == sorted(keys(every[1::2]))


@pytest.mark.parametrize("name", SAMPLERS)
def test_duplicates_that_give_one_model_are_one(name):
    found = sampler({K: ["2:4", "weights"], S: [0.5, 0.9], W: [4, 4, None], A: [4, 8]}, name)
    proposals = drawn(found, 99)
    assert len(proposals) == 3 * 3  # 2:4, two sparsities; 4 bits with two kinds of activations, or float
    assert len(set(keys(proposals))) == len(proposals)
    assert {config[S] for config in proposals if config[K] == "2:4"} == {0.0}


@pytest.mark.parametrize("name", ["tpe", "nsga2", "random"])
def test_a_small_range_that_is_not_counted_out_is_gone_through_too(name):
    found = sampler({W: {"low": 2, "high": 8, "log": True}}, name, startup_trials=1)
    proposals = drawn(found, 99, lambda config: (float(config[W]), 0.0))  # 2 is best: a sampler comes back to it
    assert sorted(config[W] for config in proposals) == [2, 3, 4, 5, 6, 7, 8]


# conditions, bounds and types

MIXED: dict[str, Any] = {
    K: ["weights", "2:4"],
    S: {"low": 0.5, "high": 0.9, "when": {K: ["weights"]}},
    W: [None, 4, 8],
    A: {"choices": [None, 8], "when": {W: [4]}},
    D: [False, True],
    "distill.weight": {"low": 0.1, "high": 0.9, "when": {D: [True]}},
    LR: {"low": 1e-5, "high": 0.1, "log": True},
    E: {"low": 1, "high": 9, "log": True},
    "recover.batch_size": {"low": 16, "high": 65, "step": 16},
    "augment.scale": [[1.0, 1.0], [0.9, 1.1]],
    "augment.mixup": {"low": 0.0, "high": 0.001, "step": 1e-7},  # too many for a grid
}


@pytest.mark.parametrize("name", ["tpe", "nsga2", "random"])
def test_conditions_bounds_steps_and_types_are_kept(name):
    found = sampler(MIXED, name)
    proposals = drawn(found, 60)
    assert len(set(keys(proposals))) == 60
    for config in proposals:
        assert (S in config) == (config[K] == "weights")
        assert (A in config) == (config[W] == 4)
        assert ("distill.weight" in config) == config[D]
        assert 0.5 <= config.get(S, 0.5) <= 0.9
        assert 0.1 <= config.get("distill.weight", 0.5) <= 0.9
        assert 1e-5 <= config[LR] <= 0.1
        assert config[LR] == float(f"{config[LR]:.6g}")
        assert type(config[D]) is bool
        assert type(config[E]) is int
        assert 1 <= config[E] <= 9
        assert config["recover.batch_size"] in (16, 32, 48, 64)
        assert type(config["recover.batch_size"]) is int
        assert config["augment.scale"] in ([1.0, 1.0], [0.9, 1.1])
        steps = config["augment.mixup"] / 1e-7
        assert steps == pytest.approx(round(steps), abs=1e-3)
        assert config == json.loads(json.dumps(config))  # as the ledger gives it back
    for key, seen in {K: 2, W: 3, A: 2, D: 2, "recover.batch_size": 4, "augment.scale": 2}.items():
        assert len({json.dumps(config[key]) for config in proposals if key in config}) == seen, key
    rates = {config[LR] for config in proposals}
    assert len(rates) > (9 if name == "nsga2" else 50)  # its children have those of their parents
    assert 0.2 < sum(rate < 1e-3 for rate in rates) / len(rates) < 0.8  # half of the logarithm


@pytest.mark.parametrize("name", ["tpe", "nsga2", "random"])
def test_true_is_not_1(name):
    found = sampler({D: [0, True, 1, False], W: [4, 8]}, name)
    proposals = drawn(found, 99)
    assert Counter((type(config[D]), config[D]) for config in proposals) == {
        (int, 0): 2, (bool, True): 2, (int, 1): 2, (bool, False): 2,
    }  # fmt: skip
    endless = drawn(sampler({D: [0, True, 1, False], LR: {"low": 0.1, "high": 0.2}}, name, population=30), 30)
    assert {(type(config[D]), config[D]) for config in endless} == {(int, 0), (bool, True), (int, 1), (bool, False)}


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_canonical_values_outside_a_range_or_list_are_learned_from(name):
    found = sampler({K: ["weights", "2:4"], S: {"low": 0.5, "high": 0.9}, W: [None, 4], A: [4, 8]}, name)
    proposals = drawn(found, 30)
    outside = [config for config in proposals if config[K] == "2:4"]
    assert outside
    assert {config[S] for config in outside} == {0.0}
    assert {config[A] for config in proposals if config[W] is None} == {None}
    assert len(proposals) == 30


# learning


TENS: dict[str, Any] = {S: [i / 10 for i in range(10)], E: list(range(10))}


@pytest.mark.parametrize(
    "point",
    [lambda good: (0.1 if good else 0.5, 1.0), lambda good: (0.5, 1.0 if good else 8.0)],
    ids=["first objective", "second objective"],
)
def test_the_objectives_guide_tpe(point):
    proposals = drawn(sampler(TENS, startup_trials=8), 50, lambda config: point(config[E] == 7))
    assert sum(config[E] == 7 for config in proposals) >= 9  # of 10; by chance 5


@pytest.mark.parametrize(("name", "least"), [("tpe", 4 * 22), ("nsga2", 58), ("random", 0)])
def test_proposals_get_better_than_chance(name, least):
    def miss(config: Config) -> float:
        return abs(config[E] - 7) + abs(config[S] * 10 - 4)

    near = sum(miss(c) < 3.5 for c in space.everything(TENS) or [])
    assert near == 24
    found = 0
    for seed in range(4):
        proposals = drawn(
            sampler(TENS, name, seed, population=8, startup_trials=8), 50, lambda config: (miss(config), 1.0)
        )
        found += sum(miss(config) < 3.5 for config in proposals)
    assert found >= least  # of 4 × 24; by chance 4 × 12
    assert name != "random" or found < 56


def test_of_what_a_sampler_insists_on_the_most_alike_is_taken(monkeypatch: pytest.MonkeyPatch):
    found, wanted = sampler(TENS), {S: 0.5, E: 5}
    found.took(wanted)
    monkeypatch.setattr(Sampler, "_proposed", lambda self, study, tries: (wanted, False))
    near = [found.ask() or {} for _ in range(12)]
    assert sorted(abs(c[E] - 5) + abs(round(10 * c[S]) - 5) for c in near) == [1] * 4 + [2] * 8
    assert near != sorted(near, key=lambda c: (c[S], c[E]))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tpe_comes_near_the_best_of_a_range(seed):
    found = sampler({LR: {"low": 1e-5, "high": 0.1, "log": True}}, seed=seed, objectives=1)
    proposals = drawn(found, 50, lambda config: (abs(config[LR] / 1e-3 - 1),))
    near = [config for config in proposals[25:] if 5e-4 < config[LR] < 2e-3]
    assert len(near) >= 10  # of 25; by chance 25 × 0.15 = 4


@pytest.mark.parametrize("name", ["random", "grid"])
def test_chance_and_the_grid_do_not_learn(name):
    one = drawn(sampler(TENS, name), 50, lambda config: (float(config[E] != 7), 0.0))
    other = drawn(sampler(TENS, name), 50, lambda config: (float(config[E] != 2), 0.0))
    assert one == other


def held(found: Sampler) -> list[optuna.trial.FrozenTrial]:
    return [t for t in found.study.trials if t.state == optuna.trial.TrialState.COMPLETE]


def test_one_rung_alone_teaches_and_a_higher_one_takes_over_with_enough_results():
    found = sampler({S: [i / 100 for i in range(90)], W: [4, 8]}, startup_trials=3)
    configs = [found.ask() for _ in range(12)]
    for k, config in enumerate(configs[:8]):
        found.tell(0, Result(config or {}, (float(k), 1.0), 0.0))
    for k, config in enumerate(configs[:2]):
        found.tell(1, Result(config or {}, (10.0 + k, 1.0), 0.0))
    found.ask()
    assert [t.values[0] for t in held(found)] == [0, 1, 2, 3, 4, 5, 6, 7]  # two results are not enough
    found.tell(1, Result(configs[2] or {}, (12.0, 1.0), 0.0))
    found.tell(0, Result(configs[8] or {}, (8.0, 1.0), 0.0))
    found.ask()
    assert [t.values[0] for t in held(found)] == [10, 11, 12]
    assert [t.params[S] for t in held(found)] == [(c or {})[S] for c in configs[:3]]
    for k in range(3, 6):
        found.tell(1, Result(configs[k] or {}, (10.0 + k, 1.0), 0.0))
    found.ask()
    assert [t.values[0] for t in held(found)] == [10, 11, 12, 13, 14, 15]


def test_a_higher_rung_is_believed():
    """At rung 0 one half looks better, at rung 1 the other: from the moment that rung 1 has enough, it counts."""
    dimensions = {"recover.lr": {"low": 0.001, "high": 1.0}}
    found = sampler(dimensions, startup_trials=5, objectives=1)
    for k in range(10):
        config = {"recover.lr": (k + 0.5) / 10}
        found.tell(0, Result(config, (config["recover.lr"],), 0.0))
        found.tell(1, Result(config, (-config["recover.lr"],), 0.0))
    high = [found.ask() for _ in range(20)]
    assert sum((config or {})["recover.lr"] > 0.7 for config in high) >= 12  # by chance 6


@pytest.mark.parametrize("name", ["tpe", "nsga2"])
def test_violations_of_constraints_are_told(name):
    found = sampler(SPACE, name, constraints=("accuracy >= 0.9",))
    for k, config in enumerate((space.everything(SPACE) or [])[:6]):
        found.tell(0, Result(config, (0.5, 1.0), k / 10))
    found.ask()
    told = [sum(t.constraints.values()) for t in held(found)]
    assert told == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(("name", "least", "most"), [("tpe", 36, 10), ("nsga2", 28, 26)])
def test_what_meets_the_constraints_is_sought(name, least, most):
    """What the objective praises violates them."""

    def good(seed: int, **search: Any) -> int:
        found = sampler(TENS, name, seed, population=8, startup_trials=8, **search)
        count = 0
        for _ in range(50):
            config = found.ask() or {}
            count += config[E] >= 8
            found.tell(0, Result(config, (config[E] / 10, 1.0), max(0.0, (8 - config[E]) / 10)))
        return count

    assert sum(good(seed, constraints=("accuracy >= 0.9",)) for seed in range(2)) >= least  # of 40; by chance 20
    assert sum(good(seed) for seed in range(2)) <= most


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_seed_proposes_the_same_and_another_seed_otherwise(name):
    first, same, other = (drawn(sampler(MIXED if name != "grid" else SPACE, name, seed), 15) for seed in (0, 0, 1))
    assert first == same
    assert (first == other) == (name == "grid")
