"""mixup and cutmix: each picture is blended with its neighbour in the batch, or gets a box of it.

Shapes: B rows, C, H, W. The partner of row i is row i ^ 1; a last odd row stays alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from raydeep.config import Augment

SHARE, KIND, BOX_X, BOX_Y = 46, 47, 48, 49  # columns of the draws


def is_on(cfg: Augment) -> bool:
    """Whether the section mixes at all."""
    return bool(cfg.mixup or cfg.cutmix)


def _cuts(cfg: Augment, kind: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Which samples get a box, given their draw of the kind; the others are blended."""
    chance = 0.5 if cfg.mixup and cfg.cutmix else float(bool(cfg.cutmix))
    return kind < chance


def shape_draws(cfg: Augment, numbers: np.ndarray) -> np.ndarray:
    """Uniform draws → draws whose column SHARE is from Beta(alpha, alpha), by its inverse distribution function.

    Args:
        cfg: the augment section: alpha is cfg.mixup (arXiv 1710.09412) or cfg.cutmix (arXiv 1905.04899).
        numbers: uniform in [0, 1), float64 of shape [B, DRAWS].

    Returns:
        A copy, float64 of shape [B, DRAWS].
    """
    from scipy.special import betaincinv

    out = numbers.copy()
    alpha = np.where(_cuts(cfg, numbers[:, KIND]), cfg.cutmix, cfg.mixup)
    out[:, SHARE] = betaincinv(alpha, alpha, numbers[:, SHARE])
    return out


def mix(
    cfg: Augment, x: torch.Tensor, labels: torch.Tensor, numbers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix neighbours.

    The box of cutmix is that of its paper: its centre uniform, its sides those of a share 1 - lambda of the picture,
    cut at the borders; the weight is the share that is left.

    Args:
        cfg: the augment section.
        x: float32 of shape [B, C, H, W].
        labels: int64 of shape [B].
        numbers: from `shape_draws`, float64 of shape [B, DRAWS], on the device of x.

    Returns:
        Pictures, the partners' labels, and float32 [B], the share of `labels`: 1 - share is the partners'.
    """
    rows, _, height, width = x.shape
    own = torch.arange(rows, device=x.device)
    partner = own ^ 1
    if rows % 2:
        partner[-1] = rows - 1
    share = numbers[:, SHARE]
    side = (1 - share).clamp(min=0).sqrt()
    left, right = _edges(numbers[:, BOX_X], side, width)
    top, bottom = _edges(numbers[:, BOX_Y], side, height)
    cuts = _cuts(cfg, numbers[:, KIND])
    assert isinstance(cuts, torch.Tensor)
    weight = torch.where(cuts, 1 - (right - left) * (bottom - top) / (height * width), share)
    weight = torch.where(partner == own, 1.0, weight).float()
    if not cfg.cutmix:
        map_of_shares = weight[:, None, None]
    else:
        ys, xs = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        in_y = (ys >= top[:, None]) & (ys < bottom[:, None])
        in_x = (xs >= left[:, None]) & (xs < right[:, None])
        outside = ~(in_y[:, :, None] & in_x[:, None, :])
        map_of_shares = torch.where(cuts[:, None, None], outside.float(), weight[:, None, None])
    return torch.lerp(x[partner], x, map_of_shares[:, None].to(x.dtype)), labels[partner], weight


def _edges(centre: torch.Tensor, side: torch.Tensor, pixels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """First pixel of a box and the one after its last, along one axis: int64 [B]."""
    middle, half = (centre * pixels).floor(), (side * pixels).floor() / 2
    return (middle - half).floor().clamp(0, pixels).long(), (middle + half).floor().clamp(0, pixels).long()
