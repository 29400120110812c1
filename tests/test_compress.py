"""Quantization, counting, and the plan that puts them together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from raydeep.compress import common, cost, pack, plan, quantize
from raydeep.config import Augment, Job, Quantize, Train
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches
from raydeep.data.resident import Dataset, Pixels
from raydeep.model import artifact, layers, zoo
from raydeep.train import losses
from raydeep.train.loop import fit


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 5))


# quantization


@pytest.mark.parametrize(
    ("edge", "expected"),
    [(8, [(8, 8), (3, 4), (8, 8)]), (None, [(3, 4)] * 3), (2, [(3, 4)] * 3)],
)
def test_first_and_last_layer_get_edge_bits_or_more(edge, expected):
    found = quantize.widths(["a", "b", "c"], Quantize(weight_bits=3, activation_bits=4, edge_bits=edge))
    assert list(found.values()) == expected


def test_edge_bits_quantize_no_float_activations():
    found = quantize.widths(["a", "b"], Quantize(weight_bits=3, edge_bits=8))
    assert found == {"a": (8, None), "b": (8, None)}


def test_what_is_never_negative_is_quantized_unsigned():
    model = zoo.build("seed", {"width": 4}, 5, (8, 8, 1)).eval()
    quantize.prepare(model, Quantize(weight_bits=4, activation_bits=4), [torch.randn(32, 1, 8, 8)])
    found = {n: m.input_quant for n, m in layers.compressible(model)}
    assert [q.low < 0 for q in found.values()] == [True, False, False, False]
    assert [q.bits for q in found.values()] == [8, 4, 4, 8]


def test_one_negative_value_makes_a_layer_signed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(200_000, 2)).eval()
    images = torch.ones(1, 1, 200, 1000)  # more than the sample that steps are searched on
    images[0, 0, 33, 334] = -1.0
    quantize.prepare(model, Quantize(weight_bits=8, activation_bits=8), [images])
    assert model[1].input_quant.low < 0


def test_first_steps_bring_the_network_near_its_float_self():
    torch.manual_seed(0)
    model = zoo.build("seed", {"width": 4}, 5, (8, 8, 1)).eval()
    images = torch.randn(64, 1, 8, 8)
    expected = model(images)
    quantize.prepare(model, Quantize(weight_bits=8, activation_bits=8), [images])
    found = model(images)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_weights_alone_need_no_calibration():
    model = small_net()
    quantize.prepare(model, Quantize(weight_bits=4), [])
    assert layers.part(model[1], layers.WeightQuant).bits == 8
    assert not hasattr(model[1], "input_quant")


def test_float_adds_no_quantizers():
    model = small_net()
    quantize.prepare(model, Quantize(), [torch.randn(4, 16)])
    assert layers.part(model[1], layers.WeightQuant) is None


def test_calibration_leaves_the_mode_of_the_network():
    model = zoo.build("resnet8", {}, 5, (8, 8, 1)).train()
    before = model.bn1.running_mean.clone()
    quantize.prepare(model, Quantize(weight_bits=4, activation_bits=4), [torch.randn(8, 1, 8, 8)])
    assert model.training
    assert torch.equal(model.bn1.running_mean, before)


def test_batchnorm_is_set_to_the_statistics_of_the_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    batches = [torch.randn(16, 3, 6, 6) + 2, 3 * torch.randn(16, 3, 6, 6)]
    quantize.reestimate_batchnorm(model, batches)
    out = [model[0](images).detach().transpose(0, 1).flatten(1) for images in batches]
    close(model[1].running_mean, torch.cat(out, 1).mean(1))
    close(model[1].running_var, torch.stack([o.var(1, unbiased=True) for o in out]).mean(0))
    assert model[1].momentum == 0.1
    assert not model.training


def test_batchnorm_without_running_statistics_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    quantize.reestimate_batchnorm(model, [torch.randn(8, 3, 6, 6)])
    assert model[1].running_mean is None


# cost


def spec_of(name: str, shape: tuple[int, int, int], classes: int = 10, **args: Any) -> dict[str, Any]:
    names = [str(i) for i in range(classes)]
    return artifact.make_spec(name, args, names, shape, [0.5] * shape[2], [0.5] * shape[2])


def test_counts_of_lenet_300_100():
    spec = spec_of("lenet_300_100", (28, 28, 1))
    model = artifact.build(spec)
    model[1].weight.data[:, :100] = 0
    counted = cost.count(artifact.freeze(model, spec)[1])
    assert counted == (266_610, 266_610 - 300 * 100)
    assert counted.sparsity == pytest.approx(30_000 / 266_610)
    assert cost.macs(model, (28, 28, 1)) == 784 * 300 + 300 * 100 + 100 * 10


def test_quantized_weights_are_counted_once_without_their_scales():
    spec = spec_of("lenet_300_100", (28, 28, 1))
    model = artifact.build(spec)
    quantize.prepare(model, Quantize(weight_bits=8), [])
    assert cost.count(artifact.freeze(model, spec)[1]).parameters == 266_610


@pytest.mark.parametrize("fold", [False, True])
def test_statistics_of_batchnorm_are_no_parameters(fold):
    spec = spec_of("resnet8", (8, 8, 1))
    model = artifact.build(spec).eval()
    weights = sum(p.numel() for p in model.parameters())
    gains = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    counted = cost.count(artifact.freeze(model, spec, fold=fold)[1])
    assert counted.parameters == (weights - gains if fold else weights)


def test_multiply_accumulates_of_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.Flatten())
    expected = 8 * 10 * 12 * 3 * 9 + 8 * 4 * 5 * 2 * 9
    assert cost.macs(model.train(), (10, 12, 3)) == expected
    assert model.training


def test_bytes_of_a_file_are_those_of_its_floats_and_a_header():
    size = cost.file_bytes({"w": torch.zeros(1000)})
    assert 4000 < size < 4200


# the plan


@pytest.fixture(scope="module")
def dense(digits: Dataset) -> plan.Dense:
    """A narrow seed network, two epochs old."""
    spec = artifact.make_spec("seed", {"width": 16}, digits.classes, digits.shape, digits.mean, digits.std)
    torch.manual_seed(0)
    model = artifact.build(spec)
    cfg = Train(epochs=2, batch_size=32, lr=0.1)
    batches = Batches(digits.train, Augmenter(Augment(), digits.mean, digits.std), cfg.batch_size, seed=0)
    fit(model, losses.cross_entropy(), batches, cfg)
    return plan.Dense(*artifact.freeze(model.eval(), spec, fold=False))


VALUES = {"prune.sparsity": 0.8, "recover.epochs": 1}
QUANTIZED = {**VALUES, "quantize.weight_bits": 4, "quantize.activation_bits": 8, "distill.enabled": True}


@pytest.fixture(scope="module")
def quantized(dense: plan.Dense, digits: Dataset) -> Iterator[plan.Result]:
    """Pruned, quantized and distilled."""
    return plan.compress(Job(train=Train(batch_size=64)).with_values(QUANTIZED), dense, digits, seed=3)


def test_pruning_gives_the_sparsity_asked_for(job, dense, digits):
    result = plan.compress(job.with_values(VALUES), dense, digits, seed=3)
    assert result.cost.sparsity == pytest.approx(0.8, abs=0.01)
    _, tensors = pack.unpack(result.packed)
    weights = [t for name, t in tensors.items() if name.endswith(".weight")]
    share = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert share == pytest.approx(0.8, abs=1e-3)


def test_pruned_and_quantized_models_are_much_smaller_and_still_right(dense, digits, quantized):
    whole = plan.measure(pack.pack(*dense), digits, 512)
    assert len(quantized.packed) < 0.15 * len(pack.pack(*dense))
    assert quantized.cost.sparsity >= 0.78
    assert whole.test_accuracy > 0.8
    assert quantized.test_accuracy > whole.test_accuracy - 0.1


def test_the_score_is_that_of_the_packed_bytes(digits, quantized):
    model = artifact.thaw(*pack.unpack(quantized.packed))
    for split, found in [(digits.val, quantized.val_predictions), (digits.test, quantized.test_predictions)]:
        assert np.array_equal(plan.predictions(model, digits, split, 97), found)
    assert quantized.test_accuracy == np.mean(quantized.test_predictions == digits.test.labels)
    assert quantized.val_accuracy == np.mean(quantized.val_predictions == digits.val.labels)
    assert quantized.cost == cost.count(pack.unpack(quantized.packed)[1])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(dense, digits, quantized):
    job = Job(train=Train(batch_size=64)).with_values(QUANTIZED)
    assert plan.compress(job, dense, digits, seed=3).packed == quantized.packed
    assert plan.compress(job, dense, digits, seed=4).packed != quantized.packed


def test_compression_leaves_the_dense_network_as_it_was(job, dense, digits):
    before = {key: tensor.clone() for key, tensor in dense.tensors.items()}
    plan.compress(job.with_values(VALUES), dense, digits, seed=0)
    assert all(torch.equal(dense.tensors[key], tensor) for key, tensor in before.items())


def test_recovery_reports_its_epochs(job, dense, digits):
    seen: list[int] = []
    values = {"recover.epochs": 2, "recover.batch_size": 256}
    result = plan.compress(
        job.with_values(values), dense, digits, seed=0, on_epoch=lambda row: seen.append(row["epoch"])
    )
    assert seen == [1, 2]
    assert [row["step"] for row in result.history] == [5, 10]
    assert len(digits.train.labels) // 256 == 5


def test_without_recovery_the_network_is_cut_and_scored(job, dense, digits):
    cut = job.with_values({"prune.sparsity": 0.5, "recover.epochs": 0})
    result = plan.compress(cut, dense, digits, seed=0)
    assert result.history == []
    _, tensors = pack.unpack(result.packed)
    kept = dense.tensors["0.weight"][tensors["0.weight"] != 0]
    assert torch.equal(tensors["0.weight"][tensors["0.weight"] != 0], kept)
    assert result.cost.sparsity == pytest.approx(0.5, abs=0.01)


def test_statistics_of_batchnorm_are_those_of_the_train_split_in_the_end(job, digits):
    spec = artifact.make_spec("resnet8", {"width": 4}, digits.classes, digits.shape, digits.mean, digits.std)
    torch.manual_seed(0)
    model = artifact.build(spec).eval()
    stale = plan.Dense(*artifact.freeze(model, spec, fold=False))
    result = plan.compress(job.with_values({"recover.epochs": 0}), stale, digits, seed=5)
    before = plan.predictions(model, digits, digits.test, 512)
    inputs = plan.training_inputs(digits, job.augment, job.quantize.calibration_rows, seed=5)
    quantize.reestimate_batchnorm(model, inputs)
    expected = plan.predictions(model, digits, digits.test, 512)
    assert np.mean(result.test_predictions == expected) > 0.98
    assert np.mean(before == expected) < 0.9


@pytest.mark.parametrize("rows", [1, 255, 257, 520])
def test_calibration_batches_weigh_every_row_alike(digits, rows):
    # BatchNorm takes the mean over batches, and can't take one row of 1×1 maps: no small batch is left over
    sizes = [len(images) for images, _ in plan.calibration_batches(digits, rows, seed=0)]
    assert sum(sizes) == rows
    assert min(sizes) > 0.95 * max(sizes)
    assert max(sizes) <= common.CALIBRATION_BATCH


def test_calibration_rows_are_a_seeded_choice_of_the_train_split(digits):
    labelled = Dataset(**{**digits._asdict(), "mean": [0.0], "std": [1.0]})
    first, same, other = (
        torch.cat([x for x, _ in plan.calibration_batches(labelled, 100, seed)]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    train = {row.tobytes() for row in digits.train.images}
    pixels = (first * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    assert all(row.tobytes() in train for row in pixels)


def test_more_calibration_rows_than_there_are_take_all(digits):
    small = digits._replace(train=Pixels(digits.train.images[:30], digits.train.labels[:30]))
    assert sum(len(x) for x, _ in plan.calibration_batches(small, 512, seed=0)) == 30
