"""Colour in one product a sample: brightness, contrast, saturation, hue and loss of colour, composed.

Each of them is linear in the picture and, for contrast, in its mean colour, which each of them maps likewise. So all
of them together are `A x + K m`: x the colour of a pixel, m the mean colour of the picture, A and K of shape
[B, C, C]. Values are cut to [0, 1] once, at the end.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from raydeep.data.constants import constant

if TYPE_CHECKING:
    from raydeep.config import Augment

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in kornia.color.rgb_to_grayscale


class Linear(NamedTuple):
    """Colour x of a picture of mean m becomes `of_pixel @ x + of_mean @ m`."""

    of_pixel: torch.Tensor  # [B, C, C]
    of_mean: torch.Tensor  # [B, C, C]


def grey_weights(channels: int, like: torch.Tensor) -> torch.Tensor:
    """What each channel adds to the grey value: [C]."""
    return constant(LUMA if channels == 3 else (1 / channels,) * channels, like.dtype, like.device)


def identity(rows: int, channels: int, like: torch.Tensor) -> Linear:
    """Nothing changes."""
    eye = torch.eye(channels, dtype=like.dtype, device=like.device).expand(rows, -1, -1)
    return Linear(eye, torch.zeros_like(eye))


def brightness(old: Linear, factor: torch.Tensor) -> Linear:
    """x → f x (kornia.enhance.adjust_brightness_accumulative); factor: [B]."""
    f = factor[:, None, None]
    return Linear(old.of_pixel * f, old.of_mean * f)


def contrast(old: Linear, factor: torch.Tensor) -> Linear:
    """x → g + f (x - g), g the mean grey of the picture (adjust_contrast_with_mean_subtraction)."""
    f = factor[:, None, None]
    grey = grey_weights(old.of_pixel.shape[1], factor) @ (old.of_pixel + old.of_mean)  # [B, C]: g = grey · m
    return Linear(old.of_pixel * f, old.of_mean * f + (1 - f) * grey[:, None, :])


def saturation(old: Linear, factor: torch.Tensor) -> Linear:
    """x → y + f (x - y), y the grey of the pixel (adjust_saturation_with_gray_subtraction)."""
    f = factor[:, None, None]
    grey = grey_weights(3, factor).expand(3, 3)
    turned = f * torch.eye(3, dtype=f.dtype, device=f.device) + (1 - f) * grey
    return Linear(turned @ old.of_pixel, turned @ old.of_mean)


@cache
def _yuv(dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Kornia's RGB → YUV (ITU-R BT.470) and its inverse: [3, 3], made once a device."""
    from kornia.color import rgb_to_yuv, yuv_to_rgb

    basis = torch.eye(3, dtype=torch.float64).view(1, 3, 1, 3)  # a row of three pixels: the unit vectors
    there, back = (change(basis).view(3, 3).to(device, dtype) for change in (rgb_to_yuv, yuv_to_rgb))
    return there, back


def hue(old: Linear, angle: torch.Tensor) -> Linear:
    """Turn the chroma plane (U, V) by an angle in radians, [B]; red turns towards green; grey stays as it is."""
    there, back = _yuv(angle.dtype, angle.device)
    cos, sin, zero, one = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle), torch.ones_like(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    turned = back @ turn @ there
    return Linear(turned @ old.of_pixel, turned @ old.of_mean)


def changes(cfg: Augment, channels: int) -> bool:
    """Whether the section asks for a change of colour that pictures of so many channels can have."""
    return bool(cfg.brightness or cfg.contrast or (channels == 3 and (cfg.saturation or cfg.hue or cfg.grayscale)))


def draw(cfg: Augment, u: torch.Tensor, channels: int) -> Linear:
    """The change of each sample, in the order brightness, contrast, saturation, hue, grayscale.

    Args:
        cfg: the augment section.
        u: uniform numbers in [0, 1), float64 of shape [B, DRAWS].
        channels: C; what needs colour is left out unless it is 3.

    Returns:
        float32 matrices.
    """

    def factor(column: int, amount: float) -> torch.Tensor:
        return 1 + amount * (2 * u[:, column] - 1)

    out = identity(len(u), channels, u)
    if cfg.brightness:
        out = brightness(out, factor(9, cfg.brightness))
    if cfg.contrast:
        out = contrast(out, factor(10, cfg.contrast))
    if channels == 3 and cfg.saturation:
        out = saturation(out, factor(11, cfg.saturation))
    if channels == 3 and cfg.hue:
        out = hue(out, (2 * u[:, 12] - 1) * (cfg.hue * 2 * math.pi))
    if channels == 3 and cfg.grayscale:
        out = saturation(out, (u[:, 26] >= cfg.grayscale).to(u.dtype))
    return Linear(out.of_pixel.float(), out.of_mean.float())


def apply(x: torch.Tensor, change: Linear, top: float = 1.0) -> torch.Tensor:
    """Change the colours, then cut to [0, 1].

    Args:
        x: float32 of shape [B, C, H, W] in [0, top].
        change: float32, B rows.
        top: of the values that come in.

    Returns:
        float32 of shape [B, C, H, W] in [0, 1].
    """
    mean = x.mean((2, 3), keepdim=True).flatten(2)
    # not baddbmm: it would first write the shift to every pixel
    out = torch.bmm(change.of_pixel / top, x.flatten(2)).add_(change.of_mean @ mean / top)
    return out.clamp_(0, 1).view(x.shape)
