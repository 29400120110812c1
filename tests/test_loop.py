"""The training loop: golden losses, and that workers, micro-batches and interruptions change nothing."""

from __future__ import annotations

import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn

from raydeep import mirror, remote
from raydeep.config import Augment, Train
from raydeep.data.augment import Augmenter
from raydeep.data.batches import Batches, Micro, eval_batches
from raydeep.data.resident import Dataset, Pixels
from raydeep.errors import TrainError
from raydeep.model import zoo
from raydeep.train import checkpoint, losses, parallel
from raydeep.train import saver as saver_module
from raydeep.train.control import Control, Wish
from raydeep.train.loop import fit
from raydeep.train.metrics import Score, confusion, evaluate
from raydeep.train.optim import lr_factor, make_optimizer
from raydeep.train.saver import Saver

ROWS, BATCH = 320, 64  # five steps an epoch
CFG = Train(epochs=2, batch_size=BATCH, lr=0.05, precision="float32")
CROSS_ENTROPY = losses.cross_entropy()


@pytest.fixture
def pixels(digits: Dataset) -> Pixels:
    return Pixels(digits.train.images[:ROWS], digits.train.labels[:ROWS])


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return zoo.build("seed", {"width": 8}, 10, (8, 8, 1))


def noisy_network() -> nn.Module:
    """With state beyond its weights: BatchNorm's buffers and dropout's random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 10)
    )


def batches(pixels: Pixels, augment: Augment | None = None, **parts: Any) -> Batches:
    return Batches(pixels, Augmenter(augment or Augment(), [0.3], [0.4]), parts.pop("batch_size", BATCH), 7, **parts)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


# what a training computes


def test_golden_losses(pixels):
    """Ten steps, pinned: a change of the order, the augmentation, the loss or the optimizer shows here."""
    seen: list[float] = []

    def loss(logits: torch.Tensor, micro: Micro) -> torch.Tensor:
        rows = CROSS_ENTROPY(logits, micro)
        seen.append(rows.mean().item())
        return rows

    moves = Augment(rotation=10, scale=(0.9, 1.1), crop=0.1)
    history = fit(network(), loss, batches(pixels, moves), CFG, lr=0.4)
    golden = [2.31746, 2.30183, 2.28392, 2.32693, 2.29524, 2.29012, 2.30228, 2.26460, 2.27119, 2.22400]
    assert seen == pytest.approx(golden, abs=1e-4)
    assert [row["train_loss"] for row in history] == pytest.approx([np.mean(seen[:5]), np.mean(seen[5:])], abs=1e-6)


def test_the_metrics_of_an_epoch(pixels):
    source = batches(pixels)
    first, last = fit(network(), CROSS_ENTROPY, source, CFG, evaluate=lambda model: Score(0.5, 0.7, 3))
    assert (first["epoch"], last["epoch"], last["epochs"], first["step"], last["step"]) == (1, 2, 2, 5, 10)
    assert (last["val_accuracy"], last["val_loss"], last["val_rows"]) == (0.5, 0.7, 3)
    assert [first["order_hash"], last["order_hash"]] == [source.order_hash(0), source.order_hash(1)]
    assert last["images_per_s"] == pytest.approx(ROWS / last["seconds"])


def test_training_learns_the_digits(digits):
    model = network()
    fit(model, CROSS_ENTROPY, batches(digits.train), CFG, epochs=4)
    score = evaluate(model, eval_batches(digits.val, [0.3], [0.4], 64), len(digits.val.labels))
    assert score.accuracy > 0.85


class Doubled(Augmenter):
    """In float64, so that only the arithmetic of the loop is compared."""

    def __call__(self, images: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
        return super().__call__(images, *numbers).double()


def test_the_number_of_micro_batches_changes_nothing(pixels):
    def run(accumulate: int) -> dict[str, torch.Tensor]:
        model, source = network().double(), batches(pixels, accumulate=accumulate)
        source.augmenter = Doubled(Augment(), [0.3], [0.4])
        sizes: set[int] = set()

        def loss(logits: torch.Tensor, micro: Micro) -> torch.Tensor:
            sizes.add(len(logits))
            return F.cross_entropy(logits, micro.labels, reduction="none")

        fit(model, loss, source, CFG)
        assert max(sizes) <= math.ceil(BATCH / accumulate)
        return state(model)

    whole = run(1)
    assert furthest(run(4), whole) < 1e-10
    assert furthest(run(3), whole) < 1e-10  # micro-batches of 22, 21 and 21


def test_label_smoothing_is_that_of_the_paper():
    logits, labels = torch.randn(6, 10, generator=torch.manual_seed(0)), torch.arange(6)
    found = losses.cross_entropy(0.2)(logits, Micro(logits, labels, 6))
    target = F.one_hot(labels, 10) * 0.8 + 0.2 / 10
    assert torch.allclose(found, -(target * logits.log_softmax(1)).sum(1), atol=1e-6)


def test_a_mixed_picture_is_learned_as_both_its_classes():
    logits = torch.randn(3, 10, generator=torch.manual_seed(0))
    own, other, weight = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]), torch.tensor([1.0, 0.25, 0.0])
    found = CROSS_ENTROPY(logits, Micro(logits, own, 3, other, weight))
    each = [F.cross_entropy(logits, labels, reduction="none") for labels in (own, other)]
    assert torch.allclose(found, weight * each[0] + (1 - weight) * each[1])


def test_mixed_pairs_give_the_same_gradients_in_any_number_of_micro_batches(pixels):
    def run(accumulate: int) -> dict[str, torch.Tensor]:
        model, source = network().double(), batches(pixels, Augment(mixup=0.4, cutmix=1.0), accumulate=accumulate)
        source.augmenter = Doubled(Augment(mixup=0.4, cutmix=1.0), [0.3], [0.4])
        fit(model, mixed, source, CFG, epochs=1)
        return state(model)

    def mixed(logits: torch.Tensor, micro: Micro) -> torch.Tensor:
        assert micro.weight is not None
        assert micro.other_labels is not None
        return CROSS_ENTROPY(logits, micro).double()

    assert furthest(run(3), run(1)) < 1e-6


def test_a_last_batch_that_is_kept_weighs_by_its_rows(pixels):
    """320 rows in batches of 128: two whole steps and one of 64 rows, whose gradient is a mean over 64."""
    sizes: list[int] = []

    def loss(logits: torch.Tensor, micro: Micro) -> torch.Tensor:
        sizes.append(micro.valid)
        return CROSS_ENTROPY(logits, micro)

    source = batches(pixels, batch_size=128, drop_last=False)
    [row] = fit(network(), loss, source, CFG.model_copy(update={"epochs": 1}))
    assert sizes == [128, 128, 64]
    assert row["step"] == 3
    assert row["train_loss"] == pytest.approx(math.log(10), abs=0.1)  # a sum over 128 would give two thirds of it
    assert row["images_per_s"] == pytest.approx(ROWS / row["seconds"])


# learning rate, clipping, weight decay


def test_the_learning_rate_warms_up_then_falls_as_a_cosine(pixels):
    cfg = CFG.model_copy(update={"epochs": 10, "warmup_epochs": 3.0})
    history = fit(network(), CROSS_ENTROPY, batches(pixels, batch_size=ROWS), cfg)  # one step an epoch
    wanted = [1 / 3, 2 / 3, 1, *(0.5 * (1 + math.cos(math.pi * i / 7)) for i in range(7))]
    assert [row["lr"] for row in history] == pytest.approx([0.05 * w for w in wanted])


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (100, 0), (100, 50)])
def test_the_schedule_reaches_its_peak_and_ends_near_zero(total, warmup):
    factors = [lr_factor(step, total, warmup) for step in range(total)]
    assert max(factors) == pytest.approx(1)
    assert all(0 < factor <= 1 for factor in factors)
    assert lr_factor(total, total, warmup) == pytest.approx(0)


def test_the_clipped_norm_bounds_the_step(pixels):
    steps = {}
    for clip in (None, 0.001):
        model = network()
        before = state(model)
        cfg = Train(batch_size=ROWS, lr=1.0, momentum=0, weight_decay=0, warmup_epochs=0, clip_norm=clip)
        fit(model, CROSS_ENTROPY, batches(pixels, batch_size=ROWS), cfg, epochs=1)
        steps[clip] = math.hypot(*(float((after - before[key]).norm()) for key, after in state(model).items()))
    assert steps[None] > 0.1
    assert steps[0.001] == pytest.approx(0.001, rel=0.01)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weights_decay_but_biases_do_not(optimizer):
    model = network()
    groups = make_optimizer(model, CFG.model_copy(update={"optimizer": optimizer}), 0.1).param_groups
    assert [group["weight_decay"] for group in groups] == [CFG.weight_decay, 0.0]
    assert {p.dim() > 1 for p in groups[0]["params"]} == {True}
    assert {p.dim() for p in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# a loss that is not finite


def poisoned(after: int) -> losses.Loss:
    """Cross entropy that is NaN from one call on."""
    calls = 0

    def loss(logits: torch.Tensor, micro: Micro) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return CROSS_ENTROPY(logits, micro) * (math.nan if calls > after else 1.0)

    return loss


def test_a_loss_that_is_not_finite_names_the_step_and_the_keys_that_mend_it(pixels):
    with pytest.raises(TrainError) as caught:
        fit(network(), poisoned(after=7), batches(pixels), CFG)
    message = str(caught.value)
    assert message.startswith("the loss is not finite at epoch 2, step 8: lower the learning rate (now 0.05: train.lr")
    for key in ("recover.lr", "train.clip_norm (now None)", "train.warmup_epochs (now 1)", "train.precision float32"):
        assert key in message


def test_a_learning_rate_that_explodes_is_noticed(pixels):
    with pytest.raises(TrainError, match=r"epoch 1, step \d: .*\(now 1e\+30"):
        fit(network(), CROSS_ENTROPY, batches(pixels), CFG, lr=1e30)


# checkpoints


class Keeper(Saver):
    """Writes each checkpoint at once, to a folder of its own."""

    moments: list[checkpoint.Moment]

    def save(self, moment: checkpoint.Moment, state: checkpoint.State) -> None:
        self.moments = [*getattr(self, "moments", []), moment]
        whole = self.folder
        self.folder = whole / str(moment.global_step)
        super().save(moment, state)
        self.wait()
        self.folder = whole


def save_now(folder: Path, moment: checkpoint.Moment, model: nn.Module, **parts: Any) -> Saver:
    saver = Saver(folder, **parts)
    saver.save(moment, checkpoint.State(model, make_optimizer(model, CFG, 0.1)))
    saver.wait()
    return saver


KINDS = [
    {"optimizer": "sgd"}, {"optimizer": "adamw"}, {"optimizer": "muon"}, {"optimizer": "sgd", "ema": 0.9},
    {"optimizer": "sgd", "schedule": "one_cycle"},
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_resumed_training_ends_bit_identical(tmp_path, pixels, kind):
    """At every checkpoint: the ends of the epochs of five steps, and each third step."""
    keys = {"epochs": 3, "lr": 0.01, "clip_norm": 1.0, "checkpoint_steps": 3}
    cfg = CFG.model_copy(update=keys | kind)

    def moving() -> Batches:
        return batches(pixels, Augment(rotation=10, crop=0.1))

    def score(strategy: parallel.Strategy) -> Score:
        return evaluate(strategy, eval_batches(pixels, [0.3], [0.4], 64), len(pixels.labels))

    whole, keeper = noisy_network(), Keeper(tmp_path)
    undisturbed = fit(whole, CROSS_ENTROPY, moving(), cfg, saver=keeper, evaluate=score)
    assert keeper.error is None
    assert [moment.global_step for moment in keeper.moments] == [3, 5, 6, 9, 10, 12, 15]
    final = checkpoint.latest(tmp_path / "15")
    assert final is not None
    assert furthest(final.weights(), state(whole)) == 0
    for moment in keeper.moments[:-1]:
        resumed = noisy_network()
        nn.init.zeros_(resumed[1].weight)  # nothing may depend on what it starts with
        found = checkpoint.latest(tmp_path / str(moment.global_step))
        again = Keeper(tmp_path / "again" / str(moment.global_step))
        history = fit(resumed, CROSS_ENTROPY, moving(), cfg, resume=found, saver=again, evaluate=score)
        assert [row["epoch"] for row in history] == list(range(moment.epoch + 1, 4))
        assert furthest(state(resumed), state(whole)) == 0
        same = checkpoint.latest(tmp_path / "again" / str(moment.global_step) / "15")
        assert same is not None
        assert furthest(same.weights(), final.weights()) == 0
        for row, other in zip(history, undisturbed[moment.epoch :], strict=True):
            assert (row["train_loss"], row["order_hash"]) == (other["train_loss"], other["order_hash"])
            assert row["val_loss"] == other["val_loss"]


def test_a_checkpoint_is_a_copy_that_later_steps_do_not_change(tmp_path):
    """It is written in a thread while training goes on."""
    model = network()
    nn.init.constant_(model[0].bias, 1)
    saver = Saver(tmp_path)
    saver.save(checkpoint.Moment(1, 0, 0.0, 5, 5), checkpoint.State(model, make_optimizer(model, CFG, 0.1)))
    nn.init.constant_(model[0].bias, 2)
    saver.wait()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.weights()["0.bias"] == 1).all()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoints of epochs 3 and 4, of 4 that were saved."""
    model = network()
    for epoch in range(1, 5):
        nn.init.constant_(model[0].bias, epoch)
        save_now(tmp_path, checkpoint.Moment(epoch, 0, 0.0, 5 * epoch, 5), model)
    return tmp_path


def test_the_last_two_checkpoints_are_kept_and_nothing_else(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["step-000000015", "step-000000020"]
    found = checkpoint.latest(saved)
    assert found is not None
    assert found.moment.epoch == 4
    assert (found.weights()["0.bias"] == 4).all()


def test_the_best_checkpoint_is_kept_too(tmp_path):
    for step, score in enumerate([0.5, 0.9, 0.7, None, 0.8], 1):
        save_now(tmp_path, checkpoint.Moment(step, 0, 0.0, step, 5, score), network(), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002", "step-000000005"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("name", "harm", "word"),
    [
        ("tensors.safetensors", flip, "checksum"),
        ("tensors.safetensors", cut, "checksum"),
        ("tensors.safetensors", Path.unlink, "files []"),
        ("state.json", cut, "not valid JSON"),
        ("state.json", Path.unlink, "no such file"),
    ],
)
def test_a_harmed_checkpoint_is_passed_over_with_a_word(saved, name, harm, word):
    harm(saved / "step-000000020" / name)
    said: list[str] = []
    found = checkpoint.latest(saved, said.append)
    assert found is not None
    assert found.moment.epoch == 3
    assert (found.weights()["0.bias"] == 3).all()
    assert len(said) == 1
    assert said[0].startswith("step-000000020 is torn or changed")
    assert word in said[0]


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": 3, "moment": {"epoch": "x"}}', "null", '{"format": 1}'])
def test_a_state_that_is_none_is_passed_over(saved, text):
    (saved / "step-000000020" / "state.json").write_text(text)
    found = checkpoint.latest(saved)
    assert found is not None
    assert found.moment.epoch == 3


def test_what_comes_after_a_torn_checkpoint_is_kept(saved):
    """Training goes on from epoch 3; its next checkpoints sort below the torn one and must not be dropped for it."""
    flip(saved / "step-000000020" / "tensors.safetensors")
    (saved / ".step-000000025.part").mkdir()
    checkpoint.clean(saved)
    save_now(saved, checkpoint.Moment(3, 2, 0.0, 17, 5), network())
    assert sorted(path.name for path in saved.iterdir()) == ["step-000000015", "step-000000017"]
    found = checkpoint.latest(saved)
    assert found is not None
    assert (found.moment.epoch, found.moment.step) == (3, 2)


def test_a_checkpoint_of_another_number_of_steps_is_refused(saved, pixels):
    with pytest.raises(TrainError, match=r"of 5 steps an epoch, this one has 10: the data or train"):
        fit(network(), CROSS_ENTROPY, batches(pixels, batch_size=32), CFG, resume=checkpoint.latest(saved))


def test_a_checkpoint_of_another_network_is_refused(saved, pixels):
    with pytest.raises(TrainError, match=r"of another network or training, it has no model\.1\."):
        fit(noisy_network(), CROSS_ENTROPY, batches(pixels), CFG, resume=checkpoint.latest(saved))


def test_another_optimizer_does_not_go_on(saved, pixels):
    cfg = CFG.model_copy(update={"optimizer": "adamw"})
    with pytest.raises(TrainError, match=r"trained with SGD, now AdamW: train.optimizer can't change"):
        fit(network(), CROSS_ENTROPY, batches(pixels), cfg, resume=checkpoint.latest(saved))


def test_settings_of_the_optimizer_are_the_jobs(saved):
    model = network()
    optimizer = make_optimizer(model, CFG.model_copy(update={"weight_decay": 0.25}), 0.1)
    found = checkpoint.latest(saved)
    assert found is not None
    checkpoint.restore(found, checkpoint.State(model, optimizer))
    assert optimizer.param_groups[0]["weight_decay"] == 0.25


def test_a_worker_told_to_leave_at_an_epochs_last_step_leaves_its_checkpoint(tmp_path, pixels):
    asked = iter([Wish()] * 4)
    control, keeper = Control(wishes=lambda: next(asked, Wish(leave=True))), Keeper(tmp_path)
    with pytest.raises(SystemExit):
        fit(network(), CROSS_ENTROPY, batches(pixels), CFG, epochs=2, saver=keeper, control=control)
    assert [moment.global_step for moment in keeper.moments] == [5]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "no") is None


def test_a_checkpoint_that_cannot_be_written_stops_the_training_and_spares_the_last(saved, pixels, monkeypatch):
    def full(*_: Any) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saver_module, "save_tensors", full)
    with pytest.raises(TrainError, match=r"no space left on the device; the last one, of step 20, is whole. Free"):
        fit(network(), CROSS_ENTROPY, batches(pixels), CFG, saver=Saver(saved))
    assert sorted(path.name for path in saved.iterdir()) == ["step-000000015", "step-000000020"]


def test_checkpoints_in_a_bucket_are_found_on_another_node(on, bucket):
    model, folder = network(), mirror.place(bucket) / "run" / "checkpoints"
    for epoch, score in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3)):
        nn.init.constant_(model[0].bias, epoch)
        save_now(folder, checkpoint.Moment(epoch, 0, 0.0, 5 * epoch, 5, score), model)
    on("b")
    folder = mirror.place(bucket) / "run" / "checkpoints"
    assert sorted({name.split("/")[0] for name in mirror.names(folder)}) == [
        "step-000000005", "step-000000015", "step-000000020",  # the best, and the newest two
    ]  # fmt: skip
    found = checkpoint.latest(folder)
    assert found is not None
    assert (found.moment.epoch, found.path) == (4, folder / "step-000000020")
    assert (found.weights()["0.bias"] == 4).all()
    (folder / "step-000000020" / "tensors.safetensors").write_bytes(b"torn")  # here it is mended
    assert checkpoint.latest(folder).moment.epoch == 4  # type: ignore[union-attr]
    mirror.push(write(folder / "step-000000020" / "tensors.safetensors", b"torn"))  # there it is not
    notes: list[str] = []
    found = checkpoint.latest(folder, notes.append)
    assert found is not None
    assert found.moment.epoch == 3
    assert notes[0].startswith("step-000000020 is torn or changed")
    nn.init.constant_(model[0].bias, 5)
    time.sleep(1.1)  # the time of an object has no more than seconds
    assert save_now(folder, checkpoint.Moment(4, 0, 0.0, 20, 5, 0.4), model).error is None
    on("a")  # whose own copy is another
    found = checkpoint.latest(mirror.place(bucket) / "run" / "checkpoints")
    assert found is not None
    assert (found.weights()["0.bias"] == 5).all()
    mirror.forget(found.path / "state.json")  # as of a push that was cut off
    assert checkpoint.latest(found.path.parent).moment.epoch == 3  # type: ignore[union-attr]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_a_bucket_that_is_gone_stops_the_training_with_one_error(on, bucket, pixels, monkeypatch):
    folder = mirror.place(bucket) / "run" / "checkpoints"
    save_now(folder, checkpoint.Moment(0, 3, 0.0, 3, 5), network())

    def gone(*_: Any) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr(remote, "put", gone)
    with pytest.raises(TrainError, match=r"the checkpoint can't be written: storage s3://.*NETWORK") as caught:
        fit(network(), CROSS_ENTROPY, batches(pixels), CFG, saver=Saver(folder))
    assert "the last one, of step 3, is whole" in str(caught.value)
    assert str(caught.value).endswith(f"go on with --resume {bucket}/run")
    monkeypatch.setattr(remote, "listing", gone)
    with pytest.raises(TrainError, match=rf"NETWORK.*--resume {bucket}/run$"):
        fit(network(), CROSS_ENTROPY, batches(pixels), CFG, saver=Saver(folder))


@pytest.mark.parametrize("wish", [Wish(save=True), Wish(leave=True)])
def test_a_checkpoint_on_demand_comes_at_the_next_step(tmp_path, pixels, wish):
    asked = iter([Wish(), Wish(), wish])
    control, keeper = Control(wishes=lambda: next(asked, Wish())), Keeper(tmp_path)
    if wish.leave:
        with pytest.raises(SystemExit):
            fit(network(), CROSS_ENTROPY, batches(pixels), CFG, epochs=1, saver=keeper, control=control)
        assert [moment.global_step for moment in keeper.moments] == [3]
    else:
        fit(network(), CROSS_ENTROPY, batches(pixels), CFG, epochs=1, saver=keeper, control=control)
        assert [moment.global_step for moment in keeper.moments] == [3, 5]


def test_checkpoints_come_by_the_clock(tmp_path, pixels):
    keeper = Keeper(tmp_path)
    cfg = CFG.model_copy(update={"checkpoint_seconds": 1e-9})
    fit(network(), CROSS_ENTROPY, batches(pixels), cfg, epochs=1, saver=keeper)
    assert [moment.global_step for moment in keeper.moments] == [1, 2, 3, 4, 5]


# evaluation


@pytest.mark.parametrize("size", [1, 50, 512])
def test_an_evaluation_is_that_of_all_rows_at_once(digits, size):
    model, rows = network(), len(digits.val.labels)
    images = torch.from_numpy(digits.val.images.transpose(0, 3, 1, 2) / np.float32(255)).sub(0.3).div(0.4)
    labels = torch.from_numpy(digits.val.labels.copy())
    with torch.no_grad():
        logits = model(images)
    score = evaluate(model, eval_batches(digits.val, [0.3], [0.4], size), rows)
    assert score.rows == rows
    assert score.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert score.loss == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)


def test_an_evaluation_can_average_a_picture_and_its_mirror_image(digits):
    model = network()
    fit(model, CROSS_ENTROPY, batches(digits.train), CFG, epochs=1)
    parts = list(eval_batches(digits.val, [0.3], [0.4], 100))
    images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
    model.eval()
    with torch.no_grad():
        logits = (model(images) + model(images.flip(3))) / 2
    score = evaluate(model, parts, len(labels), flip=True)
    assert score.loss == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-5)
    assert score != evaluate(model, parts, len(labels))


def test_rows_left_out_of_an_evaluation_are_noticed(digits):
    part = list(eval_batches(digits.val, [0.3], [0.4], 64))[1:]
    rows = len(digits.val.labels)
    with pytest.raises(AssertionError, match=f"evaluated {rows - 64} rows of {rows}"):
        evaluate(network(), part, rows)


def test_an_evaluation_switches_dropout_off_and_back_on(digits):
    model = noisy_network()
    before = state(model)
    scores = [evaluate(model, eval_batches(digits.val, [0.3], [0.4], 64), len(digits.val.labels)) for _ in range(2)]
    assert scores[0] == scores[1]
    assert model.training
    assert furthest(state(model), before) == 0


def test_the_object_stores_read_only_pictures_are_evaluated_without_a_warning(digits):
    assert not digits.val.images.flags.writeable
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(list(eval_batches(digits.val, [0.3], [0.4], 64))) == 3
    finally:
        torch.set_warn_always(False)


def test_a_confusion_matrix_has_true_classes_as_rows():
    assert confusion(np.array([0, 0, 2, 1]), np.array([0, 1, 2, 1]), 3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


# two workers


def train_five_steps(model: nn.Module, pixels: Pixels, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    def score(strategy: parallel.Strategy) -> Score:
        part = eval_batches(pixels, [0.3], [0.4], 50, rank, world)
        return evaluate(strategy, part, len(pixels.labels))

    source = batches(pixels, Augment(rotation=10), rank=rank, world=world, accumulate=world)
    return fit(model, CROSS_ENTROPY, source, CFG, epochs=1, evaluate=score)


def worker(rank: int, folder: Path, pixels: Pixels) -> None:
    """One of two processes, joined by gloo over the loopback interface; leaves what it got in `folder`."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, noisy, error = network(), noisy_network(), ""
    history = train_five_steps(model, pixels, rank, 2)
    train_five_steps(noisy, pixels, rank, 2)
    try:
        bad = poisoned(after=6 if rank == 1 else 99)  # two calls a step: NaN from step 4 on, on one worker only
        fit(network(), bad, batches(pixels, rank=rank, world=2, accumulate=2), CFG)
    except TrainError as err:
        error = str(err)
    torch.save({"model": state(model), "noisy": state(noisy), "row": history[0], "error": error}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_train_what_one_does(tmp_path, pixels):
    multiprocessing.spawn(worker, (tmp_path, pixels), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = network()
    row = train_five_steps(alone, pixels)[0]
    assert furthest(first["model"], state(alone)) < 1e-5
    assert furthest(first["model"], second["model"]) == 0
    for found in (first["row"], second["row"]):
        assert found["train_loss"] == pytest.approx(row["train_loss"], abs=1e-6)
        assert found["val_loss"] == pytest.approx(row["val_loss"], abs=1e-4)
        assert found["val_rows"] == ROWS
        assert found["order_hash"] == row["order_hash"]
    assert furthest(first["noisy"], second["noisy"]) == 0  # BatchNorm's statistics are those of one worker
    assert "epoch 1, step 4:" in first["error"]
    assert first["error"] == second["error"]
