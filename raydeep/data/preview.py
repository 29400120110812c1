"""A sheet of what training sees: each picture beside its augmented versions of the first epochs."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from raydeep.data import order
from raydeep.data.augment import DRAWS, Augmenter

if TYPE_CHECKING:
    from collections.abc import Sequence

CELL = 160  # smaller pictures are enlarged to about this height
GAP, MARGIN, TEXT = 10, 20, 14  # pixels
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (120, 120, 120)


class Column(NamedTuple):
    """The pictures of an epoch, or as they came in."""

    head: str
    pictures: list[np.ndarray]  # uint8 [H, W, C]
    captions: list[str]  # one a picture; empty: its class is that of the first column


def versions(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], augmenter: Augmenter, seed: int, columns: int = 6
) -> list[Column]:
    """Pictures and their augmented versions, as a training with these rows as its first batch would see them.

    Args:
        images: uint8 of shape [N, H, W, C].
        labels: int64 of shape [N].
        classes: names.
        augmenter: of the job. mixup and cutmix mix rows 2i and 2i + 1.
        seed: of the job.
        columns: the original and columns - 1 epochs.
    """
    found = [Column("original", list(images), [classes[label] for label in labels])]
    for epoch in range(columns - 1):
        numbers = torch.from_numpy(augmenter.shape_draws(order.draws(seed, epoch, 0, len(images), DRAWS)))
        own = torch.from_numpy(np.array(labels, np.int64))
        x, other, weight = augmenter.mix(augmenter(torch.from_numpy(np.array(images)), numbers), own, numbers)
        pixels = list(_to_uint8(x, augmenter.mean, augmenter.std))
        found.append(Column(f"epoch {epoch}", pixels, _captions(own, other, weight, classes)))
    return found


def contact_sheet(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], augmenter: Augmenter, seed: int, columns: int = 6
) -> Image.Image:
    """Draw what `versions` gives, side by side: mode RGB."""
    return _sheet(versions(images, labels, classes, augmenter, seed, columns))


def _to_uint8(x: torch.Tensor, mean: list[float], std: list[float]) -> np.ndarray:
    """Normalised float32 NCHW → uint8 NHWC."""
    unit = x * x.new_tensor(std).view(-1, 1, 1) + x.new_tensor(mean).view(-1, 1, 1)
    return (unit.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _captions(
    own: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor | None, classes: Sequence[str]
) -> list[str]:
    if other is None or weight is None:
        return ["" for _ in own]  # the class stands under the original
    found = []
    for first, second, share in zip(own.tolist(), other.tolist(), weight.tolist(), strict=True):
        parts = [(classes[first], round(share, 1)), (classes[second], round(1 - round(share, 1), 1))]
        alone = first == second or max(part[1] for part in parts) == 1
        kept = [name for name, part in parts if part > 0][:1] if alone else [f"{name} {p:.1f}" for name, p in parts]
        found.append(" + ".join(kept))
    return found


def _sheet(columns: list[Column]) -> Image.Image:
    """Columns of pictures with a line of text under each; a line of heads above, a gap after the first."""
    font = ImageFont.load_default(TEXT)
    rows = columns[0].pictures
    height, width = rows[0].shape[:2] if rows else (1, 1)
    scale = max(1, round(CELL / max(height, width)))
    cell_w, cell_h = width * scale, height * scale
    longest = max((font.getlength(text) for column in columns for text in (column.head, *column.captions)), default=0)
    text_w = min(int(longest) + 1, 2 * cell_w)  # long names may widen the columns, within reason
    step_x, step_y = max(cell_w, text_w) + GAP, cell_h + TEXT + 2 * GAP + GAP // 2
    top = MARGIN + TEXT + GAP
    size = (
        2 * MARGIN + step_x * len(columns) - GAP + (GAP if len(columns) > 1 else 0),
        top + step_y * len(rows) - GAP + MARGIN,
    )
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, (head, pictures, captions) in enumerate(columns):
        left = MARGIN + column * step_x + (GAP if column else 0)
        pen.text((left, MARGIN), head, FAINT, font)
        for row, (pixels, caption) in enumerate(zip(pictures, captions, strict=True)):
            y = top + row * step_y
            image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).convert("RGB")
            sheet.paste(image.resize((cell_w, cell_h), Image.Resampling.NEAREST), (left, y))
            pen.text((left, y + cell_h + GAP // 2), _shorten(caption, font, step_x - GAP), INK, font)
    return sheet


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut with an ellipsis to a width in pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
