"""mixup and cutmix: whatever is mixed, the weights say how much of whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from raydeep.config import Augment
from raydeep.data import mix
from raydeep.data.augment import DRAWS, Augmenter

MIXUP, CUTMIX, BOTH = Augment(mixup=0.4), Augment(cutmix=1.0), Augment(mixup=0.4, cutmix=1.0)


def augmenter(cfg: Augment) -> Augmenter:
    return Augmenter(cfg, [0.0], [1.0])


def random_draws(rows: int) -> np.ndarray:
    return np.random.default_rng(0).random((rows, DRAWS))


def mixed(cfg: Augment, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws, and what comes of pictures whose labels are their rows."""
    numbers = torch.from_numpy(augmenter(cfg).shape_draws(random_draws(len(x))))
    out, other, weight = augmenter(cfg).mix(x, torch.arange(len(x)), numbers)
    assert other is not None
    assert weight is not None
    return numbers, out, other, weight


@pytest.mark.parametrize("cfg", [MIXUP, CUTMIX, BOTH], ids=["mixup", "cutmix", "both"])
@pytest.mark.parametrize("rows", [1, 2, 64, 65])
def test_weights_are_the_shares_of_the_pixels_mixed(cfg, rows):
    """Row i is a picture of the value i everywhere: the mean of what comes out tells the shares."""
    x = torch.arange(rows, dtype=torch.float32).view(-1, 1, 1, 1).expand(-1, 3, 12, 20)
    _, out, other, weight = mixed(cfg, x)
    assert other.tolist() == [i ^ 1 if i ^ 1 < rows else i for i in range(rows)]
    assert (out.dtype, weight.dtype, out.shape) == (torch.float32, torch.float32, x.shape)
    assert weight.min() >= 0
    assert weight.max() <= 1
    own = torch.arange(rows)
    assert torch.allclose(out.mean((1, 2, 3)), weight * own + (1 - weight) * other, atol=1e-4)
    if rows % 2:
        assert weight[-1] == 1
        assert torch.equal(out[-1], x[-1])


def test_mixup_blends_every_pixel():
    x = torch.rand(6, 3, 5, 7)
    numbers, out, _, weight = mixed(MIXUP, x)
    assert torch.allclose(weight, numbers[:, mix.SHARE].float())
    w = weight.view(-1, 1, 1, 1)
    assert torch.allclose(out, w * x + (1 - w) * x[[1, 0, 3, 2, 5, 4]], atol=1e-6)


def test_cutmix_takes_one_box_of_the_partner():
    x = torch.rand(32, 3, 24, 16)
    numbers, out, other, weight = mixed(CUTMIX, x)
    assert ((out == x) | (out == x[other])).all()
    for row in range(32):
        taken = (out[row] != x[row]).all(0)
        ys, xs = taken.any(1).nonzero().view(-1), taken.any(0).nonzero().view(-1)
        assert taken.sum() == len(ys) * len(xs)
        assert weight[row].item() == pytest.approx(1 - taken.double().mean().item())
        if len(ys):
            side = np.sqrt(1 - numbers[row, mix.SHARE].item())
            assert len(ys) <= side * 24 + 1
            assert len(xs) <= side * 16 + 1
            assert ys[0] <= int(numbers[row, mix.BOX_Y] * 24) <= ys[-1] + 1
            assert xs[0] <= int(numbers[row, mix.BOX_X] * 16) <= xs[-1] + 1


def test_the_box_is_that_of_the_paper():
    numbers = torch.zeros(2, DRAWS, dtype=torch.float64)
    numbers[:, mix.SHARE], numbers[:, mix.BOX_X], numbers[:, mix.BOX_Y] = 0.75, 0.5, 0.9
    out, _, weight = augmenter(CUTMIX).mix(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 20, 20),
                                           torch.tensor([0, 1]), numbers)  # fmt: skip
    wanted = torch.zeros(20, 20)
    wanted[13:20, 5:15] = 1  # half of each side about (10, 18), cut at the bottom
    assert torch.equal(out[0, 0], wanted)
    assert weight is not None
    assert weight[0].item() == pytest.approx(1 - 70 / 400)


def test_with_both_on_each_sample_is_either_blended_or_cut():
    x = torch.rand(400, 1, 8, 8)
    numbers, out, other, weight = mixed(BOTH, x)
    cuts = numbers[:, mix.KIND] < 0.5
    assert 150 < cuts.sum() < 250
    assert ((out == x) | (out == x[other])).all((1, 2, 3))[cuts].all()
    w = weight.view(-1, 1, 1, 1)
    assert torch.allclose(out[~cuts], (w * x + (1 - w) * x[other])[~cuts], atol=1e-6)


@pytest.mark.parametrize(("cfg", "alpha"), [(MIXUP, 0.4), (CUTMIX, 1.0), (Augment(mixup=2.5), 2.5)])
def test_shares_follow_the_beta_distribution(cfg, alpha):
    numbers = random_draws(2000)
    shaped = augmenter(cfg).shape_draws(numbers)
    assert stats.kstest(shaped[:, mix.SHARE], stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert np.allclose(stats.beta(alpha, alpha).cdf(shaped[:, mix.SHARE]), numbers[:, mix.SHARE])
    others = [column for column in range(DRAWS) if column != mix.SHARE]
    assert np.array_equal(shaped[:, others], numbers[:, others])


def test_with_both_on_each_sample_has_the_alpha_of_its_kind():
    numbers = random_draws(50)
    shaped = augmenter(BOTH).shape_draws(numbers)
    alpha = np.where(numbers[:, mix.KIND] < 0.5, 1.0, 0.4)
    assert np.allclose(stats.beta(alpha, alpha).cdf(shaped[:, mix.SHARE]), numbers[:, mix.SHARE])


def test_the_draws_that_come_in_are_not_changed():
    numbers = random_draws(8)
    before = numbers.copy()
    numbers.flags.writeable = False
    augmenter(BOTH).shape_draws(numbers)
    assert np.array_equal(numbers, before)


def test_without_mixing_nothing_changes():
    one, numbers = augmenter(Augment(horizontal_flip=0.5)), random_draws(4)
    assert not one.pairs
    assert one.shape_draws(numbers) is numbers
    x, labels = torch.rand(4, 3, 6, 6), torch.arange(4)
    assert one.mix(x, labels, torch.from_numpy(numbers)) == (x, None, None)


@pytest.mark.parametrize("cfg", [MIXUP, CUTMIX, BOTH], ids=["mixup", "cutmix", "both"])
def test_pairs_do_not_depend_on_what_is_mixed_together(cfg):
    x, labels = torch.rand(8, 3, 6, 6), torch.arange(8)
    assert augmenter(cfg).pairs
    numbers, out, other, weight = mixed(cfg, x)
    for start, stop in ((0, 2), (2, 8)):
        part = augmenter(cfg).mix(x[start:stop], labels[start:stop], numbers[start:stop])
        for found, whole in zip(part, (out, other, weight), strict=True):
            assert found is not None
            assert torch.equal(found, whole[start:stop])


def test_an_empty_batch_is_not_mixed():
    numbers = torch.zeros(0, DRAWS, dtype=torch.float64)
    x, other, weight = augmenter(BOTH).mix(torch.zeros(0, 3, 4, 4), torch.zeros(0, dtype=torch.int64), numbers)
    assert (len(x), other, weight) == (0, None, None)
