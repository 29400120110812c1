"""Augmentation against arithmetic done by hand. Numbers that a sample draws are set column by column."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from raydeep.config import Augment
from raydeep.data.augment import DRAWS, Augmenter, to_input

COLUMNS = (
    "flip_x", "flip_y", "angle", "zoom", "area", "ratio", "box_x", "box_y", "shift_x", "brightness", "contrast",
    "saturation", "hue", "shift_y",
)  # fmt: skip
ALL = Augment(
    horizontal_flip=0.5, vertical_flip=0.5, rotation=30, scale=(0.8, 1.2), crop=0.1, resized_crop=0.5,
    brightness=0.3, contrast=0.3, saturation=0.3, hue=0.2,
)  # fmt: skip


def pictures(rows: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (rows, height, width, channels), np.uint8))


def draw(rows: int = 1, **columns: float) -> torch.Tensor:
    """Numbers in the middle of their ranges, where nothing moves, but for the columns named."""
    numbers = torch.full((rows, DRAWS), 0.5, dtype=torch.float64)
    for name, value in columns.items():
        numbers[:, COLUMNS.index(name)] = value
    return numbers


def augment(cfg: Augment, images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Augment without normalising: NCHW in [0, 1]."""
    channels = images.shape[-1]
    return Augmenter(cfg, [0.0] * channels, [1.0] * channels)(images, numbers)


def unit(images: torch.Tensor) -> torch.Tensor:
    return to_input(images, [0.0] * images.shape[-1], [1.0] * images.shape[-1])


def test_without_augmentation_pictures_are_only_normalised():
    images, mean, std = pictures(4, 5, 7), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    out = Augmenter(Augment(), mean, std)(images, torch.rand(4, DRAWS, dtype=torch.float64))
    assert torch.equal(out, to_input(images, mean, std))
    wanted = (images.numpy().transpose(0, 3, 1, 2) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert np.allclose(out.numpy(), wanted, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_output_is_float32_in_channels_first(channels):
    out = augment(ALL, pictures(4, 6, 10, channels), draw(4))
    assert (out.dtype, tuple(out.shape)) == (torch.float32, (4, channels, 6, 10))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 9), (97, 64)])
def test_flips_are_exact(height, width):
    images = pictures(2, height, width)
    assert torch.equal(augment(Augment(horizontal_flip=1), images, draw(2)), unit(images).flip(3))
    assert torch.equal(augment(Augment(vertical_flip=1), images, draw(2)), unit(images).flip(2))


def test_a_sample_is_flipped_if_its_draw_is_below_the_probability():
    images = pictures(4, 6, 6)
    numbers = draw(4)
    numbers[:, COLUMNS.index("flip_x")] = torch.tensor([0.0, 0.29, 0.31, 0.99])
    out = augment(Augment(horizontal_flip=0.3), images, numbers)
    assert torch.equal(out[:2], unit(images[:2]).flip(3))
    assert torch.equal(out[2:], unit(images[2:]))


@pytest.mark.parametrize(
    ("padding", "numpy_mode"), [("zeros", "constant"), ("border", "edge"), ("reflection", "reflect")]
)
@pytest.mark.parametrize(("x", "y"), [(0.0, 0.5), (0.99, 0.25), (0.7, 0.9)])
def test_a_crop_is_the_padded_picture_shifted_by_whole_pixels(padding, numpy_mode, x, y):
    images, height, width = pictures(2, 8, 16), 8, 16
    out = augment(Augment(crop=0.25, padding=padding), images, draw(2, shift_x=x, shift_y=y))
    right, down = round((2 * x - 1) * 0.25 * width), round((2 * y - 1) * 0.25 * height)
    padded = np.pad(unit(images).numpy(), ((0, 0), (0, 0), (2, 2), (4, 4)), mode=numpy_mode)
    wanted = padded[:, :, 2 - down : 2 - down + height, 4 - right : 4 - right + width]
    assert np.array_equal(out.numpy(), wanted)


def test_a_quarter_turn_is_exact_but_for_rounding():
    images = pictures(2, 8, 8)
    out = augment(Augment(rotation=180), images, draw(2, angle=0.75))  # +90 degrees: clockwise
    assert torch.allclose(out, unit(images).rot90(-1, (2, 3)), atol=1e-4)


C, SIDE = 7.5, 16  # centre and side of the ramps below
COS, SIN = math.cos(math.radians(30)), math.sin(math.radians(30))
Where = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@pytest.mark.parametrize(
    ("cfg", "numbers", "where"),
    [
        (Augment(rotation=60), {"angle": 0.75}, lambda x, y: (COS * x + SIN * y, -SIN * x + COS * y)),
        (Augment(rotation=60), {"angle": 0.25}, lambda x, y: (COS * x - SIN * y, SIN * x + COS * y)),
        (Augment(scale=(0.5, 2)), {"zoom": 1.0}, lambda x, y: (x / 2, y / 2)),
        (Augment(scale=(0.5, 2)), {"zoom": 0.0}, lambda x, y: (x * 2, y * 2)),
        (Augment(scale=(0.5, 2)), {"zoom": 0.5}, lambda x, y: (x, y)),
        (Augment(resized_crop=0.25), {"area": 0.0}, lambda x, y: (x / 2, y / 2)),
        (Augment(resized_crop=0.25), {"area": 0.0, "box_x": 0.0}, lambda x, y: (x / 2 - 4, y / 2)),
        (Augment(resized_crop=0.25), {"area": 0.0, "box_y": 1.0}, lambda x, y: (x / 2, y / 2 + 4)),
        (
            Augment(resized_crop=0.25),
            {"area": 0.0, "ratio": 1.0},
            lambda x, y: (x / 2 * math.sqrt(4 / 3), y / 2 * math.sqrt(3 / 4)),
        ),
        (
            Augment(rotation=60, crop=0.25, horizontal_flip=1),
            {"angle": 0.75, "shift_x": 0.0},
            lambda x, y: (-(COS * (x + 4) + SIN * y), -SIN * (x + 4) + COS * y),
        ),
    ],
    ids=[
        "clockwise", "counter-clockwise", "zoom in", "zoom out", "no zoom", "middle", "left", "bottom", "wide box",
        "flip, turn, then shift",
    ],
)  # fmt: skip
def test_each_pixel_comes_from_where_the_geometry_says(cfg: Augment, numbers: dict[str, float], where: Where):
    """On ramps a bilinear value is the position it was read at; `where` maps positions about the centre."""
    y, x = np.mgrid[:SIDE, :SIDE]
    ramps = torch.from_numpy(np.stack([x, y], -1)[None].astype(np.uint8) * 10)
    read = augment(cfg, ramps, draw(**numbers))[0].numpy() * 25.5 - C
    wanted = np.stack(where(x - C, y - C))
    inside = (np.abs(wanted) <= C).all(0)
    assert inside.mean() > 0.2
    assert np.abs(read - wanted)[:, inside].max() < 1e-3


def test_what_lies_outside_a_zoomed_out_picture_is_black():
    out = augment(Augment(scale=(0.5, 0.5)), torch.full((1, 8, 8, 3), 255, dtype=torch.uint8), draw())
    assert (out[0, :, 3:5, 3:5] == 1).all()
    assert (out[0, :, 0] == 0).all()


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_a_sample_does_not_depend_on_its_batch(rows):
    images, numbers = pictures(6, 9, 7), torch.rand(6, DRAWS, generator=torch.manual_seed(0), dtype=torch.float64)
    whole = augment(ALL, images, numbers)
    parts = [augment(ALL, images[i : i + rows], numbers[i : i + rows]) for i in range(0, 6, rows)]
    assert torch.allclose(torch.cat(parts), whole, atol=1e-6)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colours_differ_a_sample_and_stay_in_range(name):
    images = pictures(1, 8, 8).expand(16, -1, -1, -1)
    numbers = torch.rand(16, DRAWS, generator=torch.manual_seed(0), dtype=torch.float64)
    out = augment(Augment(**{name: 0.5}), images, numbers)
    assert out.min() >= 0
    assert out.max() <= 1
    assert len({sample.numpy().tobytes() for sample in out}) == 16
    assert torch.allclose(augment(Augment(**{name: 0.5}), images, draw(16)), unit(images), atol=1e-5)


def grey_of(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_brightness_contrast_and_saturation_are_blends(value):
    images = pictures(3, 8, 8)
    x, factor = unit(images), 1 + 0.4 * (2 * value - 1)
    mean = grey_of(x).mean((1, 2, 3), keepdim=True)
    wanted = {
        "brightness": x * factor,
        "contrast": mean + (x - mean) * factor,
        "saturation": grey_of(x) + (x - grey_of(x)) * factor,
    }
    for name, blend in wanted.items():
        out = augment(Augment(**{name: 0.4}), images, draw(3, **{name: value}))
        assert torch.allclose(out, blend.clamp(0, 1), atol=1e-5), name


@pytest.mark.parametrize(("value", "turns"), [(0.0, -0.3), (0.75, 0.15), (0.9, 0.24)])
def test_hue_turns_the_colour_circle(value, turns):
    images = pictures(1, 4, 4)
    out = augment(Augment(hue=0.3), images, draw(hue=value))[0].permute(1, 2, 0).reshape(-1, 3)
    for pixel, found in zip(images.reshape(-1, 3).tolist(), out.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in pixel))
        assert found == pytest.approx(colorsys.hsv_to_rgb((h + turns) % 1, s, v), abs=1e-4)


def test_grey_pictures_have_no_saturation_or_hue():
    images = pictures(2, 8, 8, channels=1)
    assert torch.equal(augment(Augment(saturation=1, hue=0.5), images, draw(2, saturation=0, hue=0)), unit(images))


def test_brightness_of_grey_pictures_is_drawn_too():
    images = pictures(1, 8, 8, channels=1)
    assert torch.allclose(augment(Augment(brightness=0.5), images, draw(brightness=0)), unit(images) / 2, atol=1e-6)


def test_an_empty_batch_passes():
    assert augment(ALL, pictures(0, 6, 6), draw(0)).shape == (0, 3, 6, 6)
