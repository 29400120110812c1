"""Where each pixel comes from: one matrix a sample for all of its moves, and one resample of the batch.

Shapes: B rows, H, W, C. Positions are (x, y) of pixel centres, (0, 0) the middle of the first pixel. Matrices are
float64 of shape [B, 3, 3] and map homogeneous source positions to destination positions, up to scale.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from raydeep.data.constants import constant

if TYPE_CHECKING:
    from raydeep.config import Augment

FAR = 1e4  # a normalised position well outside any picture, small enough for float32


class Shifts(NamedTuple):
    """Moves by whole pixels."""

    flip_x: torch.Tensor  # bool [B]
    flip_y: torch.Tensor  # bool [B]
    right: torch.Tensor  # int64 [B], after the flip
    down: torch.Tensor  # int64 [B]


def shifts(cfg: Augment, u: torch.Tensor, height: int, width: int) -> Shifts:
    """The flips and the crop of each sample; u: uniform numbers in [0, 1), float64 of shape [B, DRAWS]."""
    return Shifts(
        u[:, 0] < cfg.horizontal_flip,
        u[:, 1] < cfg.vertical_flip,
        torch.round((2 * u[:, 8] - 1) * cfg.crop * width).long(),
        torch.round((2 * u[:, 13] - 1) * cfg.crop * height).long(),
    )


def whole_pixels(cfg: Augment) -> bool:
    """Whether pictures move by flips and whole pixels only (the policy's moves apart)."""
    return not (
        cfg.rotation or cfg.shear or cfg.translate or cfg.perspective or cfg.scale != (1.0, 1.0) or cfg.resized_crop < 1
    )


def stays(cfg: Augment) -> bool:
    """Whether pictures do not move at all (the policy's moves apart)."""
    return whole_pixels(cfg) and not (cfg.horizontal_flip or cfg.vertical_flip or cfg.crop)


def stack3(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    """Nine float64 [B] → [B, 3, 3]."""
    return torch.stack([entry for row in rows for entry in row], 1).view(-1, 3, 3)


def affine(cfg: Augment, u: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Flip and crop to a box, shear, zoom, rotate, then shift: in that order, about the centre.

    The shear is Kornia's (get_shear_matrix2d): along x, then along y, its determinant 1 at any angle. The random
    resized crop is that of arXiv 1409.4842, without another draw for boxes that do not fit: they are cut to fit.

    Args:
        cfg: the augment section.
        u: uniform numbers in [0, 1), float64 of shape [B, DRAWS].
        height: of the pictures, pixels.
        width: of the pictures, pixels.

    Returns:
        float64 of shape [B, 3, 3].
    """
    one = torch.ones_like(u[:, 0])
    zero = torch.zeros_like(one)
    move = shifts(cfg, u, height, width)
    angle = (2 * u[:, 2] - 1) * math.radians(cfg.rotation)
    low, high = (math.log(v) for v in cfg.scale)
    zoom = torch.exp(low + (high - low) * u[:, 3])
    area = cfg.resized_crop + (1 - cfg.resized_crop) * u[:, 4]
    ratio = torch.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u[:, 5])
    ratio = ratio if cfg.resized_crop < 1 else one
    box_w, box_h = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    off_x, off_y = (1 - box_w) * (u[:, 6] - 0.5) * width, (1 - box_h) * (u[:, 7] - 0.5) * height
    sx = torch.where(move.flip_x, -one, one) / box_w
    sy = torch.where(move.flip_y, -one, one) / box_h
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    a, b, c, d = cos, -sin, sin, cos
    if cfg.shear:
        tan_x, tan_y = (torch.tan((2 * u[:, column] - 1) * math.radians(cfg.shear)) for column in (14, 15))
        both = 1 + tan_x * tan_y
        a, b, c, d = a - b * tan_y, b * both - a * tan_x, c - d * tan_y, d * both - c * tan_x
    a, b, c, d = a * sx, b * sy, c * sx, d * sy
    cx, cy = (width - 1) / 2, (height - 1) / 2
    px, py = cx + off_x, cy + off_y
    to_x = cx + move.right + (2 * u[:, 16] - 1) * cfg.translate * width
    to_y = cy + move.down + (2 * u[:, 17] - 1) * cfg.translate * height
    return stack3([[a, b, to_x - (a * px + b * py)], [c, d, to_y - (c * px + d * py)], [zero, zero, one]])


def perspective(cfg: Augment, u: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Each corner moves inwards by up to half of cfg.perspective of the side: [B, 3, 3]."""
    from kornia.geometry.transform import get_perspective_transform

    right, bottom = width - 1.0, height - 1.0
    corners = constant(((0, 0), (right, 0), (right, bottom), (0, bottom)), u.dtype, u.device)
    inwards = constant(((1, 1), (-1, 1), (-1, -1), (1, -1)), u.dtype, u.device)
    side = constant((width, height), u.dtype, u.device)
    moved = corners + inwards * u[:, 18:26].reshape(-1, 4, 2) * (cfg.perspective / 2) * side
    return get_perspective_transform(corners.expand_as(moved), moved)


def normalised(matrix: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Source → destination in pixels, to destination → source in [-1, 1] (align_corners): float32 [B, 3, 3]."""
    sx, sy = max(width - 1, 1) / 2, max(height - 1, 1) / 2
    cx, cy = (width - 1) / 2, (height - 1) / 2
    to_pixels = constant(((sx, 0, cx), (0, sy, cy), (0, 0, 1)), matrix.dtype, matrix.device)
    to_unit = constant(((1 / sx, 0, -cx / sx), (0, 1 / sy, -cy / sy), (0, 0, 1)), torch.float32, matrix.device)
    found = to_unit.to(matrix.dtype) @ torch.linalg.inv_ex(matrix)[0] @ to_pixels
    return (found / found[:, 2:, 2:]).float()


def resample(images: torch.Tensor, theta: torch.Tensor, padding: str, projective: bool) -> torch.Tensor:
    """Read every pixel of the destination from the source, bilinear.

    Args:
        images: uint8 of shape [B, H, W, C].
        theta: from `normalised`: float32 [B, 3, 3].
        padding: zeros, border or reflection, as grid_sample's padding_mode.
        projective: False if every last row is (0, 0, 1).

    Returns:
        float32 of shape [B, C, H, W] in [0, 255].
    """
    height, width = images.shape[1:3]
    x = torch.linspace(-1, 1, width, device=theta.device) if width > 1 else theta.new_zeros(1)
    y = torch.linspace(-1, 1, height, device=theta.device) if height > 1 else theta.new_zeros(1)
    count = 3 if projective else 2
    # a sum of a row and a column, planes apart: several times as fast as affine_grid's product with the whole grid
    across = theta[:, :count, 0, None] * x
    along = theta[:, :count, 1, None] * y + theta[:, :count, 2, None]
    grid = across[:, :, None, :] + along[:, :, :, None]
    if projective:
        w = grid[:, 2:]
        # behind the eye there is nothing: such positions lie far outside
        grid = torch.where(w > 1e-6, grid[:, :2] / w.clamp(min=1e-6), FAR).clamp_(-FAR, FAR)
    source = images.float().permute(0, 3, 1, 2)  # grid_sample reads any strides: no transposed copy
    return F.grid_sample(source, grid.permute(0, 2, 3, 1), "bilinear", padding, align_corners=True)


def _positions(side: int, flip: torch.Tensor, shift: torch.Tensor, padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the pixels of one axis come from, int64 [B, side] inside the picture, and whether they did lie inside."""
    at = torch.arange(side, device=shift.device) - shift[:, None]
    inside = (at >= 0) & (at < side)
    if padding == "reflection" and side > 1:
        at = at.remainder(2 * (side - 1))
        at = torch.minimum(at, 2 * (side - 1) - at)
    else:
        at = at.clamp(0, side - 1)
    return torch.where(flip[:, None], side - 1 - at, at), inside


def gather(images: torch.Tensor, moves: Shifts, padding: str) -> torch.Tensor:
    """Flip and shift by whole pixels: uint8 [B, H, W, C] → the same, exact, without interpolation."""
    rows, height, width, channels = images.shape
    y, inside_y = _positions(height, moves.flip_y, moves.down, padding)
    x, inside_x = _positions(width, moves.flip_x, moves.right, padding)
    first = torch.arange(rows, device=images.device)[:, None] * height
    out = images.reshape(rows * height, -1).index_select(0, (first + y).view(-1)).view(rows, height, -1)
    x = (x[:, :, None] * channels + torch.arange(channels, device=x.device)).view(rows, 1, -1)
    out = out.gather(2, x.expand(-1, height, -1))
    if padding == "zeros":
        out.mul_(inside_y[:, :, None]).mul_(inside_x.repeat_interleave(channels, 1)[:, None, :])
    return out.view(rows, height, width, channels)
