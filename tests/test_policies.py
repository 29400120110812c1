"""The policies against torchvision's: tables, every operation through the whole augmenter, and how they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2

from raydeep.config import Augment
from raydeep.data import policies
from raydeep.data.augment import DRAWS, Augmenter
from raydeep.data.policies import FIRST, NAMES, OP, WIDTH

TRIVIAL, RAND = Augment(policy="trivialaugment"), Augment(policy="randaugment", policy_magnitude=9)
AUTO = Augment(policy="autoaugment")
THEIRS = {"trivialaugment": v2.TrivialAugmentWide, "randaugment": v2.RandAugment, "autoaugment": v2.AutoAugment}
CIFAR10 = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)._policies
GEOMETRY = policies.MOVES


def pictures(rows: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(30, 220, (rows, height, width, channels), np.uint8))


def smooth(height: int, width: int) -> torch.Tensor:
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]] * np.pi
    waves = [np.sin(x + k) * np.cos(y - k) for k in range(3)]
    return torch.from_numpy((np.stack(waves, -1)[None] * 100 + 128).astype(np.uint8))


def draw(*slots: tuple[str, float, bool], rows: int = 1) -> torch.Tensor:
    """Numbers that choose operations: (name, second number of the slot, whether the strength is positive)."""
    u = torch.full((rows, DRAWS), 0.5, dtype=torch.float64)
    for k, (name, second, positive) in enumerate(slots):
        u[:, FIRST + k * WIDTH : FIRST + (k + 1) * WIDTH] = torch.tensor(
            [(OP[name] + 0.5) / policies.CHOICES, second, 0.9 if positive else 0.1], dtype=torch.float64
        )
    return u


def augment(cfg: Augment, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    channels = images.shape[-1]
    return Augmenter(cfg, [0.0] * channels, [1.0] * channels)(images, numbers)


def theirs(images: torch.Tensor, *ops: tuple[str, float]) -> torch.Tensor:
    """torchvision's operations, bilinear, black outside: float NCHW in [0, 1].

    On uint8 pictures, but for those that cut to whole levels what ours leave as it is.
    """
    policy = v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR)
    x = images.permute(0, 3, 1, 2)
    if ops[0][0] in ("Brightness", "Color", "Contrast", "Sharpness", "AutoContrast"):
        x = x / 255
    for name, strength in ops:
        x = policy._apply_image_or_video_transform(x, name, strength, policy.interpolation, policy._fill)
    return x if x.is_floating_point() else x / 255


def their_table(policy: str, bins: int, height: int, width: int) -> dict[str, tuple[torch.Tensor | None, bool]]:
    space = THEIRS[policy]._AUGMENTATION_SPACE
    return {name: (of(bins, height, width), signed) for name, (of, signed) in space.items()}


@pytest.mark.parametrize(
    ("policy", "bins", "wide"), [("trivialaugment", 31, True), ("randaugment", 31, False), ("autoaugment", 10, False)]
)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (96, 224)])
def test_strengths_are_those_of_torchvision(policy, bins, wide, height, width):
    ours = policies.strengths(bins, height, width, wide)
    table = their_table(policy, bins, height, width)
    assert set(table) | {"Identity", "Invert"} == set(NAMES)
    for name, (wanted, signed) in table.items():
        if wanted is not None:
            if name.startswith("Translate"):  # its operation cuts to whole pixels; float32 gives 15.999998 for 16
                wanted = (wanted + 1e-4).trunc()
            assert torch.allclose(ours[OP[name]], wanted.double(), atol=1e-6), name
        assert signed == (name in policies.SIGNED), name


def test_the_sub_policies_are_those_of_torchvision():
    ours = [tuple((name, chance, level) for name, chance, level in pair) for pair in policies.CIFAR10]
    assert ours == [tuple((name, chance, level or 0) for name, chance, level in pair) for pair in CIFAR10]


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("level", [0, 7, 19, 30])
@pytest.mark.parametrize("name", [name for name in NAMES[:14] if name not in GEOMETRY])
def test_every_change_of_colour_is_that_of_torchvision(name, level, positive):
    images = pictures(2, 12, 15)
    strength = policies.strengths(31, 12, 15, wide=True)[OP[name], level].item()
    signed = strength if positive or name not in policies.SIGNED else -strength
    found = augment(TRIVIAL, images, draw((name, (level + 0.5) / 31, positive), rows=2))
    # theirs has 0.2989 for the luma's 0.299
    assert torch.allclose(found, theirs(images, (name, signed)), atol=1e-4)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("level", [0, 7, 19, 30])
@pytest.mark.parametrize("name", GEOMETRY)
def test_every_move_is_that_of_torchvision(name, level, positive):
    images = smooth(40, 56)
    strength = policies.strengths(31, 40, 56, wide=True)[OP[name], level].item() * (1 if positive else -1)
    found = augment(TRIVIAL, images, draw((name, (level + 0.5) / 31, positive)))
    assert (found - theirs(images, (name, strength))).abs().max() < 0.6 / 255  # theirs is rounded to whole levels
    assert (found == 0).any() == (level > 0)


def test_invert_is_that_of_torchvision():
    images = pictures(2, 6, 5)
    found = policies.OPS["Invert"](images.permute(0, 3, 1, 2) / 255, torch.zeros(2))
    assert torch.allclose(found, theirs(images, ("Invert", 0.0)), atol=1e-6)


def test_autocontrast_leaves_a_channel_of_one_value():
    images = torch.full((1, 5, 5, 3), 77, dtype=torch.uint8)
    images[0, 0, 0, 0] = 50
    found = augment(TRIVIAL, images, draw(("AutoContrast", 0.5, True)))
    assert torch.allclose(found[0, 1:], torch.full((2, 5, 5), 77 / 255), atol=1e-6)
    assert (found[0, 0].min(), found[0, 0].max()) == (0, 1)


@pytest.mark.parametrize(
    ("first", "second"), [("Equalize", "Posterize"), ("Posterize", "Equalize"), ("Solarize", "Posterize")]
)
def test_randaugment_does_its_operations_in_order(first, second):
    images = pictures(1, 40, 40)
    table = policies.strengths(31, 40, 40, wide=False)[:, 9]
    found = augment(RAND, images, draw((first, 0.5, True), (second, 0.5, True)))
    wanted = theirs(images, (first, table[OP[first]].item()), (second, table[OP[second]].item()))
    assert torch.allclose(found, wanted, atol=1e-4)
    swapped = augment(RAND, images, draw((second, 0.5, True), (first, 0.5, True)))
    assert not torch.allclose(found, swapped, atol=1e-4)


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
def test_randaugment_does_as_many_operations_as_asked(slots):
    cfg = Augment(policy="randaugment", policy_ops=slots)
    picks = policies.draw(cfg, draw(*[("Brightness", 0.5, True)] * 4), 8, 8)
    assert picks.ops.tolist() == [[OP["Brightness"]] * slots]
    assert picks.strength.tolist() == [[pytest.approx(0.27)] * slots]


def test_moves_of_two_slots_compose_into_one_resample():
    images = smooth(48, 48)
    found = augment(RAND, images, draw(("Rotate", 0.5, True), ("ShearX", 0.5, False)))
    wanted = theirs(images, ("Rotate", 9.0), ("ShearX", -0.09))
    inside = theirs(torch.full_like(images, 255), ("Rotate", 9.0), ("ShearX", -0.09)) == 1
    assert (found - wanted).abs()[inside].max() < 2 / 255


def test_the_policy_follows_the_jobs_own_moves():
    images = smooth(40, 40)
    cfg = Augment(policy="trivialaugment", vertical_flip=1, padding="border")
    found = augment(cfg, images, draw(("TranslateY", 10.5 / 31, True)))
    down = int(policies.strengths(31, 40, 40, wide=True)[OP["TranslateY"], 10])
    assert torch.allclose(found[:, :, down:], (images.permute(0, 3, 1, 2) / 255).flip(2)[:, :, :-down], atol=1e-4)


@pytest.mark.parametrize("pair", range(25))
def test_autoaugment_does_each_half_of_a_pair_with_its_probability(pair):
    u = draw(rows=4)
    u[:, FIRST] = (pair + 0.5) / 25
    (one, p, level), (other, q, other_level) = policies.CIFAR10[pair]
    u[:, FIRST + 1] = torch.tensor([p - 1e-9, p, p - 1e-9, p], dtype=torch.float64).clamp(0)
    u[:, FIRST + WIDTH + 1] = torch.tensor([q - 1e-9, q - 1e-9, q, q], dtype=torch.float64).clamp(0)
    u[:, [FIRST + 2, FIRST + WIDTH + 2]] = 0.1  # negative
    picks = policies.draw(AUTO, u, 32, 32)
    done = [[True, True], [False, True], [True, False], [False, False]]
    wanted = [[OP[n] if d and c > 0 else 0 for n, d, c in zip((one, other), row, (p, q), strict=True)] for row in done]
    assert picks.ops.tolist() == wanted
    table = policies.strengths(10, 32, 32, wide=False)
    for k, (name, at) in enumerate(((one, level), (other, other_level))):
        if wanted[0][k]:
            strength = table[OP[name], at].item() * (-1 if name in policies.SIGNED else 1)
            assert picks.strength[0, k].item() == pytest.approx(strength)


@pytest.mark.parametrize("cfg", [TRIVIAL, RAND], ids=lambda cfg: cfg.policy)
def test_operations_strengths_and_signs_are_drawn_evenly_a_sample(cfg):
    u = torch.rand(14_000, DRAWS, generator=torch.manual_seed(0), dtype=torch.float64)
    picks = policies.draw(cfg, u, 32, 32)
    counts = torch.bincount(picks.ops[:, 0], minlength=15)
    assert counts[OP["Invert"]] == 0
    assert (counts[:14] - 1000).abs().max() < 150  # five standard deviations
    rotated = picks.strength[:, 0][picks.ops[:, 0] == OP["Rotate"]]
    levels = len(rotated.abs().unique())
    assert levels == (31 if cfg is TRIVIAL else 1)
    assert abs((rotated < 0).double().mean() - 0.5) < 0.08


@pytest.mark.parametrize("name", policies.OPS)
@pytest.mark.parametrize(("height", "width", "channels"), [(6, 9, 1), (2, 2, 3), (300, 5, 3)])
def test_every_operation_keeps_shape_and_range(name, height, width, channels):
    x = pictures(2, height, width, channels).permute(0, 3, 1, 2) / 255
    table = policies.strengths(31, height, width, wide=True)
    out = policies.OPS[name](x, table[OP[name], [30, 30]].float())
    assert out.shape == x.shape
    assert out.min() >= 0
    assert out.max() <= 1


def test_grey_pictures_have_no_color():
    images = pictures(2, 6, 6, channels=1)
    found = augment(TRIVIAL, images, draw(("Color", 0.9, True), rows=2))
    assert torch.allclose(found, images.permute(0, 3, 1, 2) / 255, atol=1e-4)
