"""TrivialAugment, RandAugment and AutoAugment, drawn a sample: names, strengths and what each operation does.

Operations, strengths and sub-policies are those of torchvision.transforms (the papers' tables, cited below). Two
things differ: where a picture has several operations, its moves come first, composed into the one resample of the
batch; and that resample is bilinear. Shapes: B rows, C, H, W; S slots: operations of a picture, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from raydeep.data import colour
from raydeep.data.geometry import stack3

if TYPE_CHECKING:
    from raydeep.config import Augment

FIRST, SLOTS, WIDTH = 34, 4, 3  # the columns of the draws: SLOTS times WIDTH of them from FIRST on
NAMES = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast",
    "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert",
)  # fmt: skip
OP = {name: index for index, name in enumerate(NAMES)}
MOVES = NAMES[1:6]
SIGNED = NAMES[1:10]  # the strength's sign is drawn
CHOICES = len(NAMES) - 1  # TrivialAugment and RandAugment choose among all but Invert
BINS, AUTO_BINS = 31, 10

# AutoAugment's policy for CIFAR-10 (arXiv 1805.09501, table 7): (operation, probability, bin) twice.
CIFAR10: tuple[tuple[tuple[str, float, int], tuple[str, float, int]], ...] = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)


class Picks(NamedTuple):
    """What each sample's slots do."""

    ops: torch.Tensor  # int64 [B, S] on the CPU: indices of NAMES
    strength: torch.Tensor  # float64 [B, S] on the CPU, the sign included


def strengths(bins: int, height: int, width: int, wide: bool) -> torch.Tensor:
    """Strength of each operation at each bin: float64 [len(NAMES), bins].

    Units: shear as the tangent, translation in whole pixels, rotation in degrees, brightness to sharpness as what is
    added to a factor of 1, posterize in bits that stay, solarize as the level in [0, 1] from which values turn over.

    Args:
        bins: 31, or 10 for AutoAugment.
        height: of the pictures, pixels.
        width: of the pictures, pixels.
        wide: TrivialAugment's ranges (arXiv 2103.10158, table 1: wide) instead of RandAugment's (1909.13719).
    """
    rise = torch.linspace(0, 1, bins, dtype=torch.float64)
    table = torch.zeros(len(NAMES), bins, dtype=torch.float64)
    reach_x, reach_y = (32.0, 32.0) if wide else (150 / 331 * width, 150 / 331 * height)
    table[OP["ShearX"]] = table[OP["ShearY"]] = rise * (0.99 if wide else 0.3)
    table[OP["TranslateX"]], table[OP["TranslateY"]] = (rise * reach_x).trunc(), (rise * reach_y).trunc()
    table[OP["Rotate"]] = rise * (135 if wide else 30)
    for name in ("Brightness", "Color", "Contrast", "Sharpness"):
        table[OP[name]] = rise * (0.99 if wide else 0.9)
    table[OP["Posterize"]] = 8 - (rise * (6 if wide else 4)).round()
    table[OP["Solarize"]] = 1 - rise
    return table


# Contract of POLICIES: (the augment section, draws float64 [B, SLOTS, WIDTH], height, width) → Picks without signs.
# A slot's draws: its operation (or sub-policy), its strength (or whether it is done), its sign.


def _trivial(cfg: Augment, u: torch.Tensor, height: int, width: int) -> Picks:
    """One operation at one strength, both uniform (arXiv 2103.10158)."""
    ops = (u[:, :1, 0] * CHOICES).long()
    return Picks(ops, strengths(BINS, height, width, wide=True)[ops, (u[:, :1, 1] * BINS).long()])


def _rand(cfg: Augment, u: torch.Tensor, height: int, width: int) -> Picks:
    """cfg.policy_ops operations, all of strength cfg.policy_magnitude (arXiv 1909.13719)."""
    ops = (u[:, : cfg.policy_ops, 0] * CHOICES).long()
    return Picks(ops, strengths(BINS, height, width, wide=False)[ops, cfg.policy_magnitude])


def _auto(cfg: Augment, u: torch.Tensor, height: int, width: int) -> Picks:
    """One of 25 learned pairs of operations, each done with its probability (arXiv 1805.09501)."""
    pairs = (u[:, 0, 0] * len(CIFAR10)).long()
    ops = torch.tensor([[OP[name] for name, _, _ in pair] for pair in CIFAR10])[pairs]
    chance = torch.tensor([[share for _, share, _ in pair] for pair in CIFAR10], dtype=torch.float64)[pairs]
    level = torch.tensor([[level for _, _, level in pair] for pair in CIFAR10])[pairs]
    ops = torch.where(u[:, :2, 1] < chance, ops, OP["Identity"])
    return Picks(ops, strengths(AUTO_BINS, height, width, wide=False)[ops, level])


POLICIES: dict[str, Callable[[Augment, torch.Tensor, int, int], Picks]] = {
    "trivialaugment": _trivial,
    "randaugment": _rand,
    "autoaugment": _auto,
}


def draw(cfg: Augment, u: torch.Tensor, height: int, width: int) -> Picks:
    """What the section's policy does to each sample.

    Args:
        cfg: the augment section; its policy is not None.
        u: uniform numbers in [0, 1), float64 of shape [B, DRAWS], on any device.
        height: of the pictures, pixels.
        width: of the pictures, pixels.
    """
    assert cfg.policy is not None
    u = u[:, FIRST : FIRST + SLOTS * WIDTH].cpu().view(-1, SLOTS, WIDTH)
    ops, strength = POLICIES[cfg.policy](cfg, u, height, width)
    signed = torch.tensor([name in SIGNED for name in NAMES])[ops]
    return Picks(ops, torch.where(signed & (u[:, : ops.shape[1], 2] < 0.5), -strength, strength))


def moved(picks: Picks) -> torch.Tensor:
    """Which samples have a move among their operations: bool [B] on the CPU."""
    return ((picks.ops >= OP[MOVES[0]]) & (picks.ops <= OP[MOVES[-1]])).any(1)


def moves(picks: Picks, height: int, width: int) -> torch.Tensor:
    """The moves among the operations of each sample, composed: float64 [B, 3, 3], source → destination, CPU.

    Shear is about the top left corner, rotation counter-clockwise about the centre, as in torchvision.
    """
    out = torch.eye(3, dtype=torch.float64).expand(len(picks.ops), 3, 3)
    for ops, strength in zip(picks.ops.T, picks.strength.T, strict=True):

        def only(name: str, ops: torch.Tensor = ops, strength: torch.Tensor = strength) -> torch.Tensor:
            return torch.where(ops == OP[name], strength, 0.0)

        angle, shear_x, shear_y = only("Rotate") * (math.pi / 180), only("ShearX"), only("ShearY")
        cos, sin = torch.cos(angle), torch.sin(angle)
        cx, cy = (width - 1) / 2, (height - 1) / 2
        to_x = cx - cos * cx - sin * cy - shear_x / 2 + only("TranslateX")
        to_y = cy + sin * cx - cos * cy - shear_y / 2 + only("TranslateY")
        zero, one = torch.zeros_like(cos), torch.ones_like(cos)
        out = stack3([[cos, sin - shear_x, to_x], [-sin - shear_y, cos, to_y], [zero, zero, one]]) @ out
    return out


# Contract of OPS: (x float32 [n, C, H, W] in [0, 1], strength float32 [n]) → the same shape and range.
Op = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _levels(x: torch.Tensor) -> torch.Tensor:
    """The nearest of 256 levels: what a resample has moved by a hair must not fall to the level below."""
    return (x * 255).round().div_(255)


def _linear(change: Callable[[colour.Linear, torch.Tensor], colour.Linear]) -> Op:
    def op(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
        return colour.apply(x, change(colour.identity(len(x), x.shape[1], x), 1 + strength))

    return op


def _color(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return _linear(colour.saturation)(x, strength) if x.shape[1] == 3 else x


def _sharpness(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import sharpness

    return sharpness(x, 1 + strength) if min(x.shape[-2:]) > 2 else x  # smaller pictures are all border


def _posterize(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import posterize

    return posterize(_levels(x), strength.int())


def _solarize(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import solarize

    return solarize(_levels(x), strength)


def _autocontrast(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """Stretch each channel to [0, 1]; one of a single value stays."""
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def _equalize(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    from kornia.enhance import equalize

    return equalize(_levels(x))


def _invert(x: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    return 1 - x


OPS: dict[str, Op] = {
    "Brightness": _linear(colour.brightness),
    "Color": _color,
    "Contrast": _linear(colour.contrast),
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
}


def apply(x: torch.Tensor, picks: Picks) -> None:
    """Do the operations that are no moves, each on the samples that have it, slot after slot, in place.

    Args:
        x: float32 of shape [B, C, H, W] in [0, 1].
        picks: B rows.
    """
    for ops, strength in zip(picks.ops.T, picks.strength.T, strict=True):
        for name, op in OPS.items():
            rows = torch.nonzero(ops == OP[name]).view(-1)
            if len(rows):
                there = rows.to(x.device, non_blocking=True)
                x[there] = op(x[there], strength[rows].to(x.dtype).to(x.device, non_blocking=True))
