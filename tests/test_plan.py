"""The plan's further ways: narrow networks, patterns, rounds, allocated bits, no training at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raydeep.compress import cost, pack, plan
from raydeep.config import Augment, Job, Train, parse_job
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches
from raydeep.data.resident import Dataset
from raydeep.errors import JobError, ModelError
from raydeep.model import artifact
from raydeep.train import losses
from raydeep.train.loop import fit


@pytest.fixture(scope="module")
def dense(digits: Dataset) -> plan.Dense:
    """A residual network, four epochs old."""
    spec = artifact.make_spec("resnet8", {"width": 8}, digits.classes, digits.shape, digits.mean, digits.std)
    torch.manual_seed(0)
    model = artifact.build(spec)
    cfg = Train(epochs=4, batch_size=64, lr=0.1)
    batches = Batches(digits.train, Augmenter(Augment(), digits.mean, digits.std), cfg.batch_size, seed=0)
    fit(model, losses.cross_entropy(), batches, cfg)
    return plan.Dense(*artifact.freeze(model.eval(), spec, fold=False))


@pytest.fixture(scope="module")
def whole(dense: plan.Dense, digits: Dataset) -> plan.Result:
    return plan.measure(pack.pack(*dense), digits, 512)


def job_with(values: dict) -> Job:
    return Job(train=Train(batch_size=64)).with_values({"recover.epochs": 1, "recover.lr": 0.02, **values})


def compressed(values: dict, dense: plan.Dense, digits: Dataset) -> plan.Result:
    return plan.compress(job_with(values), dense, digits, seed=1)


def test_channels_that_go_make_a_narrower_network_that_still_knows(dense, digits, whole):
    result = compressed({"prune.kind": "channels", "prune.sparsity": 0.5}, dense, digits)
    spec, tensors = pack.unpack(result.packed)
    model = artifact.thaw(spec, tensors)
    share = cost.macs(model, digits.shape) / cost.macs(artifact.build(dense.spec), digits.shape)
    assert share == pytest.approx(0.5, abs=0.05)
    assert spec["widths"]
    assert result.weights.nonzeros == result.weights.parameters < 0.8 * whole.weights.parameters
    assert result.test_accuracy > whole.test_accuracy - 0.05 > 0.8


def test_channels_may_go_in_rounds(dense, digits):
    values = {
        "prune.kind": "channels", "prune.sparsity": 0.5, "prune.schedule": "iterative", "prune.rounds": 2,
        "recover.epochs": 3,
    }  # fmt: skip
    result = compressed(values, dense, digits)
    assert len(result.history) == 3
    model = artifact.thaw(*pack.unpack(result.packed))
    share = cost.macs(model, digits.shape) / cost.macs(artifact.build(dense.spec), digits.shape)
    assert share == pytest.approx(0.5, abs=0.06)


def test_two_of_four_is_exact_in_the_file_and_the_file_shows_it(dense, digits):
    eight = {"quantize.weight_bits": 8, "quantize.edge_bits": None}
    result = compressed({"prune.kind": "2:4", **eight}, dense, digits)
    full = compressed(eight, dense, digits)
    checked = 0
    for name, tensor in pack.unpack(result.packed)[1].items():
        if name.endswith(".weight.q") and tensor.dim() == 4 and tensor.shape[1] % 4 == 0:
            groups = tensor.permute(0, 2, 3, 1).reshape(-1, 4).numpy()
            assert np.count_nonzero(groups, axis=1).max() <= 2
            checked += len(groups)
    assert checked > 1000
    assert len(result.packed) < 0.75 * len(full.packed)


def test_quantization_after_recovery_trains_its_own_epochs(dense, digits):
    seen: list[int] = []
    values = {"prune.sparsity": 0.5, "quantize.weight_bits": 4, "quantize.epochs": 2, "quantize.lr_factor": 0.5}
    result = plan.compress(
        job_with(values), dense, digits, seed=1, on_epoch=lambda row: seen.append(row["epoch"])
    )  # fmt: skip
    assert seen == [1, 2, 3]
    assert len(result.history) == 3
    spec, _ = pack.unpack(result.packed)
    assert {entry["weight_bits"] for entry in spec["layers"].values()} == {4, 8}


def test_bits_are_allocated_within_their_average(dense, digits, whole):
    result = compressed({"quantize.weight_bits": {"average": 3.5}, "quantize.activation_bits": 8}, dense, digits)
    rows = cost.per_layer(result.packed)
    average = sum(row["weight_bits"] * row["parameters"] for row in rows) / sum(row["parameters"] for row in rows)
    assert 3.0 < average <= 3.5
    assert len({row["weight_bits"] for row in rows}) > 1
    assert result.sensitivity.keys() == {row["layer"] for row in rows}
    assert all(losses[2] >= losses[8] >= 0 for losses in result.sensitivity.values())
    assert result.test_accuracy > whole.test_accuracy - 0.05


def test_without_training_calibration_alone_keeps_eight_bits(dense, digits, whole):
    values = {"quantize.weight_bits": 8, "quantize.activation_bits": 8, "recover.epochs": 0}
    result = compressed(values, dense, digits)
    assert result.history == []
    assert result.test_accuracy > whole.test_accuracy - 0.01


@pytest.mark.parametrize(("target", "largest"), [("avx2", 64), ("vnni", 127)])
def test_weights_of_eight_bits_have_the_range_that_the_target_can_add(dense, digits, target, largest):
    job = job_with({"quantize.weight_bits": 8, "quantize.activation_bits": 8, "recover.epochs": 0})
    job = job.model_copy(update={"export": job.export.model_copy(update={"target": target})})
    _, tensors = pack.unpack(plan.compress(job, dense, digits, seed=1).packed)
    found = max(int(t.abs().max()) for name, t in tensors.items() if name.endswith(".q"))
    assert 0.9 * largest < found <= largest


def test_adaptive_rounding_loses_less_than_rounding_to_the_nearest(dense, digits):
    base = {"quantize.weight_bits": 2, "quantize.edge_bits": None, "recover.epochs": 0}
    nearest = compressed(base, dense, digits)
    adaptive = compressed({**base, "quantize.rounding": "adaptive"}, dense, digits)
    assert adaptive.val_accuracy > nearest.val_accuracy + 0.05


def test_rows_of_layers_add_up_to_the_file(dense, digits):
    packed = compressed({"prune.sparsity": 0.9, "quantize.weight_bits": 4, "recover.epochs": 0}, dense, digits).packed
    rows = cost.per_layer(packed)
    assert sum(row["parameters"] for row in rows) == cost.weights(dense.tensors).parameters
    assert sum(row["macs"] for row in rows) == cost.macs(artifact.build(dense.spec), digits.shape)
    layers_bytes, header = sum(row["bytes"] for row in rows), pack.overhead(packed)
    assert layers_bytes + header == len(packed)  # every tensor belongs to a layer: BatchNorm is folded


def test_labels_of_calibration_are_those_of_its_pictures(digits):
    known = {image.tobytes(): label for image, label in zip(digits.train.images, digits.train.labels, strict=True)}
    raw = digits._replace(mean=[0.0], std=[1.0])
    for images, labels in plan.calibration_batches(raw, 100, seed=4):
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        assert [known[image.tobytes()] for image in pixels] == labels.tolist()


def test_statistics_are_estimated_on_pictures_as_training_sees_them(dense, digits):
    plain = plan.training_inputs(digits, Augment(), 64, seed=4)
    assert [x.shape[0] for x in plain] == [256]
    assert len(plan.training_inputs(digits, Augment(), 512, seed=4)) == len(digits.train.labels) // 256
    shifted = plan.training_inputs(digits, Augment(translate=0.4), 64, seed=4)
    assert shifted[0].mean() < plain[0].mean() - 0.05  # black comes in at the edges
    values = {"prune.sparsity": 0.3, "recover.epochs": 0}
    job = job_with(values)
    moved = job.model_copy(update={"augment": Augment(translate=0.4)})
    one, other = (pack.unpack(plan.compress(j, dense, digits, seed=1).packed)[1] for j in (job, moved))
    assert torch.equal(one["fc.weight"], other["fc.weight"])  # masks do not depend on it
    assert not torch.equal(one["conv1.bias"], other["conv1.bias"])  # BatchNorm is folded in


@pytest.mark.parametrize("tree", [
    {"prune": {"kind": "channels", "sparsity": 0.5}},
    {"search": {"space": {"prune.kind": ["weights", "channels"], "prune.sparsity": [0.0, 0.5]}}},
])  # fmt: skip
def test_networks_whose_channels_stay_are_refused_before_any_time_is_spent(tree):
    spec = artifact.make_spec("shufflenet_v2_x0_5", {}, ["a", "b"], (32, 32, 3), [0.5] * 3, [0.5] * 3)
    with pytest.raises(ModelError, match="shufflenet_v2_x0_5"):
        plan.check(parse_job(tree, "job"), spec)
    plan.check(parse_job({"prune": {"kind": "2:4"}}, "job"), spec)  # masks work for every network


def test_a_sparsity_that_would_empty_a_layer_is_refused(dense, digits):
    with pytest.raises(JobError, match=r"prune\.sparsity"):
        compressed({"prune.sparsity": 0.9999}, dense, digits)


def test_every_network_of_a_space_must_exist(dense):
    spec = dense.spec
    plan.check(parse_job({"search": {"space": {"model.name": ["seed", "resnet8"]}}}, "job"), spec)
    with pytest.raises(ModelError, match="resnet9"):
        plan.check(parse_job({"search": {"space": {"model.name": ["seed", "resnet9"]}}}, "job"), spec)
