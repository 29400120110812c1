"""uint8 NHWC → float NCHW on the device: Kornia transforms with parameters drawn a sample.

The parameters are functions of uniform numbers that the order of samples gives (order.draws), so the result
does not depend on the number of workers. Shapes: B rows, H, W, C.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from raydeep.config import Augment

DRAWS = 14  # uniform numbers a sample


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Uint8 NHWC → float32 NCHW in [0, 1]."""
    return images.permute(0, 3, 1, 2).contiguous().float().div_(255)


def normalise(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Float NCHW in [0, 1] → zero mean, unit variance a channel."""
    m = torch.tensor(mean, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    s = torch.tensor(std, dtype=images.dtype, device=images.device).view(1, -1, 1, 1)
    return (images - m) / s


def to_input(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Uint8 NHWC → normalised float32 NCHW, the input of every network."""
    return normalise(to_unit(images), mean, std)


class Augmenter:
    """Augments a batch; `cfg` is the job's augment section."""

    def __init__(self, cfg: Augment, mean: list[float], std: list[float]) -> None:
        self.cfg, self.mean, self.std = cfg, mean, std
        self.moves = bool(
            cfg.horizontal_flip
            or cfg.vertical_flip
            or cfg.rotation
            or cfg.crop
            or cfg.resized_crop < 1
            or cfg.scale != (1.0, 1.0)
        )
        self.exact = not cfg.rotation and cfg.scale == (1.0, 1.0) and cfg.resized_crop == 1

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Augment and normalise.

        Args:
            images: uint8 of shape [B, H, W, C].
            numbers: uniform in [0, 1), shape [B, DRAWS], on the same device.

        Returns:
            float32 of shape [B, C, H, W].
        """
        with torch.no_grad():
            x = to_unit(images)
            if self.moves and len(x):
                x = self._move(x, numbers)
            return normalise(self._colour(x, numbers), self.mean, self.std)

    def _move(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        from kornia.geometry.transform import warp_affine

        height, width = x.shape[-2:]
        matrix = affine(self.cfg, u, height, width).to(x.dtype)
        mode = "nearest" if self.exact else "bilinear"  # whole-pixel moves need no interpolation
        return warp_affine(x, matrix, (height, width), mode=mode, padding_mode=self.cfg.padding, align_corners=True)

    def _colour(self, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        import kornia.enhance as enhance

        cfg = self.cfg

        def factor(column: int, amount: float) -> torch.Tensor:
            return (1 + amount * (2 * u[:, column] - 1)).to(x.dtype)

        if cfg.brightness:
            x = enhance.adjust_brightness_accumulative(x, factor(9, cfg.brightness))
        if cfg.contrast:
            x = enhance.adjust_contrast_with_mean_subtraction(x, factor(10, cfg.contrast))
        if x.shape[1] == 3 and cfg.saturation:
            x = enhance.adjust_saturation_with_gray_subtraction(x, factor(11, cfg.saturation))
        if x.shape[1] == 3 and cfg.hue:
            x = enhance.adjust_hue(x, ((2 * u[:, 12] - 1) * (cfg.hue * 2 * math.pi)).to(x.dtype))
        return x.clamp(0, 1)


def affine(cfg: Augment, u: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """One matrix a sample that flips, rotates, scales and crops: source pixel → destination pixel.

    Args:
        cfg: the augment section.
        u: uniform numbers in [0, 1), float64 of shape [B, DRAWS].
        height: of the pictures, pixels.
        width: of the pictures, pixels.

    Returns:
        float64 of shape [B, 2, 3].
    """
    one = torch.ones_like(u[:, 0])
    flip_x = torch.where(u[:, 0] < cfg.horizontal_flip, -one, one)
    flip_y = torch.where(u[:, 1] < cfg.vertical_flip, -one, one)
    angle = (2 * u[:, 2] - 1) * math.radians(cfg.rotation)
    low, high = (math.log(v) for v in cfg.scale)
    zoom = torch.exp(low + (high - low) * u[:, 3])
    # random resized crop: a box of area share a and aspect r, blown up to the whole picture
    area = cfg.resized_crop + (1 - cfg.resized_crop) * u[:, 4]
    ratio = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[:, 5])
    ratio = ratio if cfg.resized_crop < 1 else one
    box_w, box_h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    off_x, off_y = (1 - box_w) * (u[:, 6] - 0.5) * width, (1 - box_h) * (u[:, 7] - 0.5) * height
    shift_x = torch.round((2 * u[:, 8] - 1) * cfg.crop * width)
    shift_y = torch.round((2 * u[:, 13] - 1) * cfg.crop * height)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    sx, sy = flip_x / box_w, flip_y / box_h
    a, b, c, d = cos * sx, -sin * sy, sin * sx, cos * sy
    cx, cy = (width - 1) / 2, (height - 1) / 2
    px, py = cx + off_x, cy + off_y
    tx = cx + shift_x - (a * px + b * py)
    ty = cy + shift_y - (c * px + d * py)
    return torch.stack([torch.stack([a, b, tx], 1), torch.stack([c, d, ty], 1)], 1)
