"""uint8 NHWC → float NCHW on the device, augmented: the door to geometry, colour, policies and mix.

Every parameter is a function of uniform numbers that the order of samples gives (order.draws), a row a sample. So what
becomes of a sample depends on its picture and its row only, not on the batch or the number of workers.

Shapes: B rows, H, W, C. Columns of the draws: 0 to 13 flips, rotation, scale, resized crop, crop and colour; 14, 15
shear; 16, 17 translation; 18 to 25 perspective; 26 grayscale; 27, 28 blur; 29 to 33 erasing; 34 to 45 the policy; 46 to
49 mixup and cutmix.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from raydeep.data import colour, geometry, mix, policies
from raydeep.data.constants import constant

if TYPE_CHECKING:
    import numpy as np

    from raydeep.config import Augment

DRAWS = 50  # uniform numbers a sample
CHUNK_VALUES = 2**18  # on a CPU, so many values go through all steps together and stay in its cache
BLUR_SIZE = 13  # of the kernel: three standard deviations of the widest blur to each side


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Uint8 NHWC → float32 NCHW in [0, 1]."""
    return _to_float(images).div_(255)


def normalise(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Float NCHW in [0, 1] → zero mean, unit variance a channel."""
    return _scale(images, mean, std, 1.0, torch.empty_like(images))


def to_input(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """Uint8 NHWC → normalised float32 NCHW, the input of every network."""
    x = _to_float(images)
    return _scale(x, mean, std, 255.0, x)


def _to_float(images: torch.Tensor) -> torch.Tensor:
    rows, height, width, channels = images.shape
    out = torch.empty(rows, channels, height, width, device=images.device)
    return out.copy_(images.permute(0, 3, 1, 2))


def _scale(x: torch.Tensor, mean: list[float], std: list[float], top: float, out: torch.Tensor) -> torch.Tensor:
    """Float NCHW in [0, top] → zero mean, unit variance a channel, into `out` (it may be x)."""
    factor = constant(tuple(1 / (top * s) for s in std), x.dtype, x.device).view(-1, 1, 1)
    shift = constant(tuple(-m / s for m, s in zip(mean, std, strict=True)), x.dtype, x.device)
    return torch.mul(x, factor, out=out).add_(shift.view(-1, 1, 1))


class Drawn(NamedTuple):
    """The parameters of a batch: each None if nothing in the section needs it, else of B rows."""

    shifts: geometry.Shifts | None
    theta: torch.Tensor | None  # float32 [B, 3, 3], see geometry.normalised
    some: torch.Tensor | None  # bool [B] on the CPU: who needs theta, the others need shifts only; None: all
    colours: colour.Linear | None
    picks: policies.Picks | None

    def part(self, rows: slice) -> Drawn:
        """The same of some samples."""

        def cut(value: Any) -> Any:
            return None if value is None else type(value)(*(tensor[rows] for tensor in value))

        theta = None if self.theta is None else self.theta[rows]
        some = None if self.some is None else self.some[rows]
        return Drawn(cut(self.shifts), theta, some, cut(self.colours), cut(self.picks))


class Augmenter:
    """Augments a batch; `cfg` is the job's augment section."""

    def __init__(self, cfg: Augment, mean: list[float], std: list[float]) -> None:
        self.cfg, self.mean, self.std = cfg, mean, std
        self.pairs = mix.is_on(cfg)  # whether `mix` does anything
        self.draws = 0 if cfg == type(cfg)(padding=cfg.padding) else DRAWS  # columns of uniform numbers that it needs

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor, host: torch.Tensor | None = None) -> torch.Tensor:
        """Augment and normalise.

        Args:
            images: uint8 of shape [B, H, W, C].
            numbers: uniform in [0, 1), float64 of shape [B, DRAWS], on the same device.
            host: the same numbers on the CPU: which samples a step concerns is then known without waiting for the
                device.

        Returns:
            float32 of shape [B, C, H, W].
        """
        if not self.draws:
            return to_input(images, self.mean, self.std)
        with torch.no_grad():
            rows, height, width, channels = images.shape
            host = numbers if host is None else host
            drawn = self._draw(numbers, host, height, width, channels)
            out = torch.empty(rows, channels, height, width, device=images.device)
            step = CHUNK_VALUES // max(1, height * width * channels) if images.device.type == "cpu" else rows
            for start in range(0, rows, max(1, step)):
                part = slice(start, start + max(1, step))
                self._pixels(images[part], drawn.part(part), out[part])
            _blur(self.cfg, out, numbers, host)
            _erase(self.cfg, out, numbers, host)
            return out

    def shape_draws(self, numbers: np.ndarray) -> np.ndarray:
        """What the caller does to uniform draws on the CPU, before they go to the device; see mix.shape_draws."""
        return mix.shape_draws(self.cfg, numbers) if self.pairs else numbers

    def mix(
        self, x: torch.Tensor, labels: torch.Tensor, numbers: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """mixup or cutmix of neighbours, rows 2i and 2i + 1.

        Args:
            x: float32 of shape [B, C, H, W], from a call.
            labels: int64 of shape [B].
            numbers: from `shape_draws`, float64 of shape [B, DRAWS], on the same device.

        Returns:
            Pictures, the partners' labels or None, and the share of `labels`, float32 [B], or None.
        """
        with torch.no_grad():
            return mix.mix(self.cfg, x, labels, numbers) if self.pairs and len(x) else (x, None, None)

    def _draw(self, u: torch.Tensor, host: torch.Tensor, height: int, width: int, channels: int) -> Drawn:
        cfg = self.cfg
        picks = policies.draw(cfg, host, height, width) if cfg.policy else None
        colours = colour.draw(cfg, u, channels) if colour.changes(cfg, channels) else None
        shifts = None if geometry.stays(cfg) else geometry.shifts(cfg, u, height, width)
        if picks is None and geometry.whole_pixels(cfg):
            return Drawn(shifts, None, None, colours, picks)
        matrix = geometry.affine(cfg, u, height, width)
        if cfg.perspective:
            matrix = geometry.perspective(cfg, u, height, width) @ matrix
        some = None
        if picks is not None:
            matrix = policies.moves(picks, height, width).to(matrix.device, non_blocking=True) @ matrix
            some = policies.moved(picks) if geometry.whole_pixels(cfg) else None
        return Drawn(shifts, geometry.normalised(matrix, height, width), some, colours, picks)

    def _pixels(self, images: torch.Tensor, drawn: Drawn, out: torch.Tensor) -> None:
        """The steps that touch every pixel: move, change colours, normalise into `out`."""
        x, top = self._move(images, drawn), 255.0
        if drawn.colours is not None:
            x, top = colour.apply(x, drawn.colours, top), 1.0
        if drawn.picks is not None:
            x, top = x.div_(top).clamp_(0, 1), 1.0
            policies.apply(x, drawn.picks)
        _scale(x, self.mean, self.std, top, out)

    def _move(self, images: torch.Tensor, drawn: Drawn) -> torch.Tensor:
        """Uint8 NHWC → float32 NCHW in [0, 255], each sample interpolated only if it must be."""
        padding, projective = self.cfg.padding, bool(self.cfg.perspective)
        if drawn.theta is not None and drawn.some is None:
            return geometry.resample(images, drawn.theta, padding, projective)
        x = _to_float(images if drawn.shifts is None else geometry.gather(images, drawn.shifts, padding))
        if drawn.theta is not None and drawn.some is not None and drawn.some.any():
            rows = torch.nonzero(drawn.some).view(-1).to(x.device, non_blocking=True)
            x[rows] = geometry.resample(images[rows], drawn.theta[rows], padding, projective)
        return x


def _blur(cfg: Augment, x: torch.Tensor, u: torch.Tensor, host: torch.Tensor) -> None:
    """Gaussian blur of the samples drawn, in place; as its weights sum to 1, it may follow the normalisation."""
    rows = _rows(host[:, 27], cfg.blur, x.device)
    if len(rows):
        from kornia.filters import gaussian_blur2d

        height, width = (min(BLUR_SIZE, 2 * side - 1) for side in x.shape[-2:])  # as far as a reflection goes
        sigma = (0.1 + 1.9 * u[rows, 28, None]).to(x.dtype).expand(-1, 2)
        x[rows] = gaussian_blur2d(x[rows], (height, width), sigma, "reflect")


def _erase(cfg: Augment, x: torch.Tensor, u: torch.Tensor, host: torch.Tensor) -> None:
    """Random erasing (arXiv 1708.04896) of the samples drawn, in place: a box takes the data's mean colour."""
    rows = _rows(host[:, 29], cfg.erasing, x.device)
    if len(rows):
        height, width = x.shape[-2:]
        area = (0.02 + 0.31 * u[rows, 30]) * height * width
        ratio = torch.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * u[rows, 31])
        y = _span((area * ratio).sqrt(), u[rows, 32], height)
        x_ = _span((area / ratio).sqrt(), u[rows, 33], width)
        x[rows] = x[rows].masked_fill((y[:, :, None] & x_[:, None, :])[:, None], 0.0)


def _rows(drawn: torch.Tensor, probability: float, device: torch.device) -> torch.Tensor:
    """Indices of the samples whose draw is below a probability: int64, on the device."""
    if not probability:  # no look at the draws
        return torch.zeros(0, dtype=torch.int64)
    return torch.nonzero(drawn < probability).view(-1).to(device, non_blocking=True)


def _span(side: torch.Tensor, at: torch.Tensor, pixels: int) -> torch.Tensor:
    """Which pixels of an axis lie in the box: bool [n, pixels]; side: float [n]; at: uniform [n]."""
    side = side.round().clamp(1, pixels)
    first = (at * (pixels - side + 1)).floor()
    places = torch.arange(pixels, device=side.device)
    return (places >= first[:, None]) & (places < (first + side)[:, None])
