"""Which weights become zero: scores, rates, patterns and schedules, against answers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from raydeep.compress import masks, prune
from raydeep.config import Prune
from raydeep.errors import JobError
from raydeep.model import layers, zoo


def zeros(masks: dict[str, torch.Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def kept(masks: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv": torch.randn(8, 4, 3, 3, generator=generator),
        "fc": 0.3 * torch.randn(20, 30, generator=generator),
    }


def magnitudes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return masks.magnitude(nn.Module(), weights, [])


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 5))


def norm_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(6 * 4, 3)
    )


def labelled(count: int = 2, shape: tuple[int, ...] = (1, 4, 4), classes: int = 5) -> prune.Labelled:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(8, *shape, generator=generator), torch.randint(classes, (8,), generator=generator))
        for _ in range(count)
    ]


def masks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: layers.part(module, layers.Mask) for name, module in layers.compressible(model)}
    return {name: mask.mask.clone() for name, mask in found.items() if mask is not None}


def shake(model: nn.Module) -> None:
    """What a training does to the weights, pruned ones included."""
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))


# scores


def test_lamp_is_the_formula_of_the_paper():
    weights = {"a": torch.tensor([[3.0, -1.0], [2.0, 0.0]]), "b": torch.tensor([[-2.0, 2.0]])}
    found = masks.lamp(nn.Module(), weights, [])
    torch.testing.assert_close(found["a"], torch.tensor([[9 / 9, 1 / 14], [4 / 13, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(found["b"], torch.tensor([[4 / 4, 4 / 8]], dtype=torch.float64))  # ties: by position


def test_lamp_does_not_change_with_the_scale_of_a_layer_and_orders_within_it_as_magnitude_does():
    weights = random_weights()
    found = masks.lamp(nn.Module(), weights, [])
    scaled = masks.lamp(nn.Module(), {"conv": 1e-3 * weights["conv"], "fc": weights["fc"]}, [])
    torch.testing.assert_close(found["conv"], scaled["conv"], rtol=1e-5, atol=0)
    for name, weight in weights.items():
        assert torch.equal(found[name].flatten().argsort(), weight.abs().flatten().argsort())


def test_lamp_of_a_layer_of_zeros_is_zero():
    assert torch.equal(masks.lamp(nn.Module(), {"a": torch.zeros(2, 2)}, [])["a"], torch.zeros(2, 2).double())


def test_taylor_is_weight_times_gradient():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    weight = model[1].weight
    batches = labelled(2, (1, 1, 3), 2)
    found = masks.taylor(model, {"1": weight}, batches)["1"]
    squares = torch.zeros(2, 3)
    for images, labels in batches:  # the gradient of softmax and cross entropy by hand
        x = images.flatten(1)
        error = (x @ weight.T).softmax(1) - F.one_hot(labels, 2)
        squares += (weight * (error.T @ x / len(x))).square()
    torch.testing.assert_close(found, squares.sqrt().detach())


def test_taylor_predicts_what_a_weight_costs():
    model = small_net().double()
    images, labels = labelled(1)[0]
    images = images.double()
    found = masks.taylor(model, {"3": model[3].weight}, [(images, labels)])["3"]
    with torch.no_grad():
        before = F.cross_entropy(model(images), labels)
        model[3].weight[2, 4] *= 0.999
        after = F.cross_entropy(model(images), labels)
    assert float((after - before).abs()) == pytest.approx(1e-3 * float(found[2, 4]), rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_taylor_leaves_the_model_as_it_was(training):
    model = norm_net().train(training)
    model[5].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = masks.taylor(model, {"0": model[0].weight, "5": model[5].weight}, labelled(2, (2, 4, 4), 3))
    assert all(score.min() >= 0 < score.max() for score in found.values())
    assert not any(score.requires_grad for score in found.values())
    assert model.training == model[1].training == training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert (model[0].weight.requires_grad, model[5].weight.requires_grad) == (True, False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_taylor_without_batches_is_refused():
    with pytest.raises(JobError, match=r"prune.score taylor needs labelled batches"):
        prune.prepare(small_net(), Prune(sparsity=0.5, score="taylor", schedule="one_shot"), recovers=False)


# rates


@given(st.floats(0, 0.998), st.integers(0, 5), st.sampled_from(["global", "uniform", "erk"]))
def test_masks_have_the_sparsity_asked_for_to_the_weight(sparsity, seed, rates):
    weights = random_weights(seed)
    chosen = masks.choose(magnitudes(weights), sparsity, rates)
    assert zeros(chosen) == round(sparsity * (8 * 4 * 9 + 20 * 30))
    assert {name: mask.shape for name, mask in chosen.items()} == {n: w.shape for n, w in weights.items()}
    for name, mask in chosen.items():  # and what stays of a layer is its largest
        ranked = weights[name].abs().flatten().sort(descending=True).values
        assert torch.equal(weights[name][mask].abs().sort(descending=True).values, ranked[: int(mask.sum())])


SIZES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=12,
)


@given(SIZES, st.floats(0, 0.9999), st.sampled_from(["uniform", "erk"]))
def test_counts_add_up_to_the_weight_and_no_layer_is_emptied(sizes, sparsity, rates):
    shapes = {str(i): torch.Size(size) for i, size in enumerate(sizes)}
    total = sum(math.prod(size) for size in sizes)
    asked = total - round(sparsity * total)
    if asked < len(shapes):
        with pytest.raises(JobError, match=r"would be emptied"):
            masks.keep_counts(shapes, sparsity, rates)
        return
    counts = masks.keep_counts(shapes, sparsity, rates)
    assert sum(counts.values()) == asked
    floor = masks.least(shapes, asked)
    assert all(1 <= floor[name] <= counts[name] <= shapes[name].numel() for name in shapes)


@given(SIZES, st.integers(0, 1000))
def test_floors_never_ask_for_more_than_there_is(sizes, more):
    shapes = {str(i): torch.Size(size) for i, size in enumerate(sizes)}
    count = min(len(shapes) + more, sum(math.prod(size) for size in sizes))
    assert sum(masks.least(shapes, count).values()) <= count


def test_uniform_rates_are_the_same_in_each_layer():
    shapes = {"a": torch.Size([100, 10]), "b": torch.Size([50, 4, 1, 1]), "c": torch.Size([30, 100])}
    assert masks.keep_counts(shapes, 0.9, "uniform") == {"a": 100, "b": 20, "c": 300}


def test_erk_densities_are_those_of_the_formula():
    shapes = {"a": torch.Size([64, 32, 3, 3]), "b": torch.Size([128, 64, 3, 3]), "c": torch.Size([100, 200])}
    counts = masks.keep_counts(shapes, 0.95, "erk")
    factor = 0.05 * (18432 + 73728 + 20000) / ((64 + 32 + 6) + (128 + 64 + 6) + 300)
    assert counts == pytest.approx({"a": factor * 102, "b": factor * 198, "c": factor * 300}, abs=1)


def test_erk_gives_what_a_full_layer_can_not_take_to_the_others():
    shapes = {"tiny": torch.Size([4, 4]), "a": torch.Size([100, 100]), "b": torch.Size([200, 200])}
    counts = masks.keep_counts(shapes, 0.5, "erk")  # tiny's raw density: 8/16 against 0.02 and 0.01
    rest = 25_008 - 16
    assert counts["tiny"] == 16
    assert counts["a"] == pytest.approx(rest * 200 / 600, abs=1)
    assert counts["b"] == pytest.approx(rest * 400 / 600, abs=1)


def test_the_largest_weights_of_the_whole_network_are_kept():
    weights = random_weights()
    chosen = masks.choose(magnitudes(weights), 0.7)
    stay = torch.cat([weights[n][m].abs() for n, m in chosen.items()])
    gone = torch.cat([weights[n][~m].abs() for n, m in chosen.items()])
    assert stay.min() >= gone.max()
    assert chosen["conv"].float().mean() > chosen["fc"].float().mean()  # its weights are larger


def test_each_layer_keeps_a_hundredth_or_a_fifth_of_the_density():
    weights = {"large": torch.randn(10_000, 1), "low": 1e-6 * torch.randn(1000, 1), "tiny": 1e-9 * torch.randn(3, 1)}
    assert kept(masks.choose(magnitudes(weights), 0.9)) == {"large": 1100 - 11, "low": 10, "tiny": 1}
    chosen = masks.choose(magnitudes(weights), 0.99)
    assert kept(chosen) == {"large": 110 - 3, "low": 2, "tiny": 1}
    for name, mask in chosen.items():  # and what stays of a layer is its largest
        assert weights[name][mask].abs().min() >= weights[name][~mask].abs().max()


@pytest.mark.parametrize("rates", ["global", "uniform", "erk"])
@pytest.mark.parametrize("name", ["lenet_300_100", "lenet5"])
def test_lenets_reach_the_sparsities_of_the_literature(name, rates):
    torch.manual_seed(0)
    model = zoo.build(name, {}, 10, (28, 28, 1))
    prune.prepare(model, Prune(sparsity=0.995, rates=rates, schedule="one_shot"), recovers=False)
    masks = masks_of(model)
    assert zeros(masks) == round(0.995 * sum(mask.numel() for mask in masks.values()))
    assert min(kept(masks).values()) >= 1


@pytest.mark.parametrize("rates", ["global", "uniform", "erk"])
def test_a_sparsity_that_empties_a_layer_is_refused_and_the_value_it_names_is_not(rates):
    model = small_net()
    with pytest.raises(JobError) as found:
        prune.prepare(model, Prune(sparsity=0.999, rates=rates), recovers=True)
    assert str(found.value) == (
        "prune.sparsity: found 0.999, which leaves 0 of 420 weights for 2 layers: layer 3 of 100 weights would be "
        "emptied; expected at most 0.9952"
    )
    assert masks_of(model) == {}
    prune.prepare(model, Prune(sparsity=0.9952, rates=rates, schedule="one_shot"), recovers=True)
    assert kept(masks_of(model)) == {"1": 1, "3": 1}


def test_ties_are_broken_to_the_weight_and_the_same_each_time():
    weights = {"a": torch.ones(100, 1), "b": -torch.ones(100, 1)}
    chosen = masks.choose(magnitudes(weights), 0.5)
    assert zeros(chosen) == 100
    again = masks.choose(magnitudes(weights), 0.5)
    assert all(torch.equal(chosen[n], again[n]) for n in chosen)


# N of M


def test_two_of_four_neighbours_stay():
    score = torch.tensor([[1.0, 4, 3, 2, 9, 9, 9, 9], [8, 7, 6, 5, 0, 0, 1, 0]])
    expected = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0, 1, 0]], dtype=torch.bool)
    assert torch.equal(masks.n_m_mask(score, 2, 4), expected)


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (2, 2), (3, 3)])
def test_the_last_incomplete_group_keeps_its_share_rounded_up(n, expected):
    score = torch.arange(11.0).repeat(5, 1)  # 4 + 4 + 3
    mask = masks.n_m_mask(score, n, 4)
    assert mask[:, :4].sum(1).tolist() == mask[:, 4:8].sum(1).tolist() == [n] * 5
    assert mask[:, 8:].sum(1).tolist() == [expected] * 5  # ceil(3n / 4)
    assert mask[0].nonzero().flatten().tolist() == [i for end in (4, 8) for i in range(end - n, end)] + [
        *range(11 - expected, 11)
    ]


@given(st.integers(1, 7), st.integers(1, 7), st.integers(4, 20), st.integers(1, 3))
def test_groups_run_along_the_input_channels_at_each_place_of_the_kernel(n, m, channels, side):
    n, m = min(n, m, channels), min(m, channels)
    score = torch.rand(3, channels, side, side)
    mask = masks.n_m_mask(score, n, m)
    for start in range(0, channels, m):
        stop = min(channels, start + m)
        count = math.ceil(n * (stop - start) / m)
        assert (mask[:, start:stop].sum(1) == count).all()
        lowest_kept = score[:, start:stop].masked_fill(~mask[:, start:stop], 2).amin(1)
        assert (lowest_kept >= score[:, start:stop].masked_fill(mask[:, start:stop], -1).amax(1)).all()


def test_layers_with_fewer_input_channels_than_a_group_stay_dense_and_are_listed():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1)
    )
    found = prune.prepare(model, Prune(kind="2:4", schedule="one_shot"), recovers=False)
    assert found.left_dense == ("0", "1")
    assert {name: int(mask.sum()) / mask.numel() for name, mask in masks_of(model).items()} == {"2": 0.5, "3": 0.5}


def test_a_pattern_that_fits_no_layer_is_refused():
    with pytest.raises(JobError, match=r"prune.kind 2:32: none of the 2 layers has 32 input channels or more"):
        prune.prepare(small_net(), Prune(kind="2:32"), recovers=True)


@pytest.mark.parametrize("kind", ["2:4", "1:4", "4:8", "1:16"])
def test_patterns_need_no_sparsity(kind):
    model = small_net()
    prune.prepare(model, Prune(kind=kind, schedule="one_shot"), recovers=False)
    n, m = map(int, kind.split(":"))
    masks = masks_of(model)
    assert (masks["1"].unflatten(1, (-1, m)).sum(2) == n).all()
    assert int(masks["3"].sum()) == 5 * sum(math.ceil(n * min(m, 20 - i) / m) for i in range(0, 20, m))


# schedules


def test_cubic_schedule_is_that_of_the_paper():
    assert prune.cubic(0.0, 0.8) == 0.0
    assert prune.cubic(0.5, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))
    assert prune.cubic(1.0, 0.8) == 0.8
    assert prune.cubic(7.0, 0.8) == 0.8


@pytest.mark.parametrize(
    ("schedule", "recovers"), [("one_shot", True), ("one_shot", False), ("cubic", False), ("iterative", False)]
)
def test_one_shot_and_whatever_is_not_recovered_is_pruned_at_once(schedule, recovers):
    model = small_net()
    found = prune.prepare(model, Prune(sparsity=0.75, schedule=schedule), recovers=recovers)
    assert (found.rounds, found.on_step) == (1, None)
    assert zeros(masks_of(model)) == 0.75 * 420
    before = masks_of(model)
    found.start(0)  # once more changes nothing
    assert all(torch.equal(mask, before[name]) for name, mask in masks_of(model).items())


@pytest.mark.parametrize("cfg", [Prune(sparsity=0.0, schedule="iterative"), Prune(kind="channels", sparsity=0.5)])
def test_nothing_to_do_adds_no_masks(cfg):
    model = small_net()
    found = prune.prepare(model, cfg, recovers=True)
    found.start(0)
    assert (found.rounds, found.on_step, masks_of(model)) == (1, None, {})


SCORES = ["magnitude", "lamp", "taylor"]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("total", [1, 2, 3, 7, 50])
def test_cubic_tightens_to_the_target_by_half_of_recovery_and_then_holds(total, score):
    model = small_net()
    found = prune.prepare(model, Prune(sparsity=0.75, score=score, schedule="cubic"), True, labelled())
    tighten = found.on_step
    assert tighten is not None
    found.start(0)
    assert zeros(masks_of(model)) == 0
    seen, held = [], []
    for step in range(total):
        tighten(step, total)
        seen.append(zeros(masks_of(model)))
        if step >= total // 2:
            held.append(masks_of(model))
        shake(model)
    assert seen == sorted(seen)
    assert seen[total // 2 :] == [315] * len(held)
    assert all(torch.equal(later[n], held[0][n]) for later in held for n in later)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("rates", ["global", "uniform", "erk"])
def test_cubic_tightens_in_steps_on_the_way(score, rates):
    model = small_net()
    found = prune.prepare(model, Prune(sparsity=0.75, score=score, rates=rates), True, labelled())
    assert found.on_step is not None
    found.on_step(20, 80)
    assert zeros(masks_of(model)) == round(0.75 * (1 - 0.5**3) * 420)


def test_cubic_patterns_lose_one_neighbour_after_the_other():
    model = small_net()
    found = prune.prepare(model, Prune(kind="1:4"), recovers=True)
    assert found.on_step is not None
    left = []
    for step in range(40):
        found.on_step(step, 80)
        left.append(int(masks_of(model)["1"].sum()) // 80)
    assert left[0] == 4
    assert sorted(set(left)) == [1, 2, 3, 4]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("score", SCORES)
def test_iterative_takes_the_same_share_each_round_and_what_is_gone_stays_gone(score):
    model = small_net()
    cfg = Prune(sparsity=0.9, score=score, schedule="iterative", rounds=4)
    found = prune.prepare(model, cfg, True, labelled())
    assert (found.rounds, found.on_step) == (4, None)
    before = {name: torch.ones_like(mask) for name, mask in masks_of(model).items()}
    for k in range(4):
        if k:
            found.start(k)
        now = masks_of(model)
        assert zeros(now) == round((1 - 0.1 ** ((k + 1) / 4)) * 420)
        assert not any((now[name] & ~before[name]).any() for name in now)
        before = now
        shake(model)
    assert zeros(before) == 378


def test_iterative_patterns_end_at_the_pattern():
    model = small_net()
    found = prune.prepare(model, Prune(kind="1:8", schedule="iterative", rounds=3), recovers=True)
    left = [int(masks_of(model)["1"].sum()) // 40]
    for k in (1, 2):
        shake(model)
        found.start(k)
        left.append(int(masks_of(model)["1"].sum()) // 40)
    assert left == [4, 2, 1]


def test_rewinding_gives_the_dense_weights_back_under_masks_of_the_trained_ones():
    model = norm_net()
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    found = prune.prepare(model, Prune(sparsity=0.75, schedule="iterative", rounds=2, rewind="weights"), recovers=True)
    first = masks_of(model)
    layers.add_weight_quant(model[5], 4)  # what is added later does not stand in the way, and stays
    shake(model)
    model[1].running_mean.add_(1)
    step = layers.part(model[5], layers.WeightQuant).step.clone()
    trained = {name: layers.raw_weight(module).detach().clone() for name, module in layers.compressible(model)}
    found.start(1)
    scores = {name: weight.abs().masked_fill(~first[name], -1) for name, weight in trained.items()}
    expected = masks.choose(scores, 0.75)
    assert all(torch.equal(mask, expected[name]) for name, mask in masks_of(model).items())
    for name, module in layers.compressible(model):
        assert torch.equal(layers.raw_weight(module), dense[f"{name}.weight"])
        assert torch.equal(module.bias, dense[f"{name}.bias"])
    assert torch.equal(model[0].weight == 0, ~masks_of(model)["0"])
    assert torch.equal(model[1].running_mean, dense["1.running_mean"])
    assert torch.equal(layers.part(model[5], layers.WeightQuant).step, step)


def test_rounds_without_rewinding_go_on_from_the_trained_weights():
    model = small_net()
    found = prune.prepare(model, Prune(sparsity=0.75, schedule="iterative", rounds=2), recovers=True)
    shake(model)
    trained = layers.raw_weight(model[1]).clone()
    found.start(1)
    assert torch.equal(layers.raw_weight(model[1]), trained)
