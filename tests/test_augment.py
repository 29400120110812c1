"""Augmentation against arithmetic done by hand. Numbers that a sample draws are set column by column."""

from __future__ import annotations

import math
from collections.abc import Callable

import kornia.color
import kornia.enhance as enhance
import kornia.geometry.transform as warp
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from raydeep.config import Augment
from raydeep.data import augment as door
from raydeep.data import geometry, mix, policies
from raydeep.data.augment import DRAWS, Augmenter, normalise, to_input, to_unit

COLUMNS = (
    "flip_x", "flip_y", "angle", "zoom", "area", "ratio", "box_x", "box_y", "shift_x", "brightness", "contrast",
    "saturation", "hue", "shift_y", "shear_x", "shear_y", "translate_x", "translate_y", "corner_0x", "corner_0y",
    "corner_1x", "corner_1y", "corner_2x", "corner_2y", "corner_3x", "corner_3y", "grayscale", "blur", "sigma",
    "erasing", "erased_area", "erased_ratio", "erased_y", "erased_x",
)  # fmt: skip
MOVES = Augment(
    horizontal_flip=0.5, vertical_flip=0.5, rotation=30, scale=(0.8, 1.2), crop=0.1, resized_crop=0.5, shear=10,
    translate=0.1, perspective=0.3,
)  # fmt: skip
ALL = MOVES.model_copy(
    update={"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.2, "grayscale": 0.2, "blur": 0.5,
            "erasing": 0.5}
)  # fmt: skip


def pictures(rows: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (rows, height, width, channels), np.uint8))


def draw(rows: int = 1, **columns: float) -> torch.Tensor:
    """Numbers in the middle of their ranges, where nothing moves, but for the columns named."""
    numbers = torch.full((rows, DRAWS), 0.5, dtype=torch.float64)
    for name, value in columns.items():
        numbers[:, COLUMNS.index(name)] = value
    return numbers


def random_draws(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, DRAWS, generator=torch.manual_seed(seed), dtype=torch.float64)


def smooth(height: int, width: int, channels: int = 3) -> torch.Tensor:
    """One picture of waves twice its size: interpolating it twice is much like interpolating it once."""
    y, x = np.mgrid[:height, :width] / [[[height]], [[width]]] * np.pi
    waves = [np.sin(x + k) * np.cos(y - k) for k in range(channels)]
    return torch.from_numpy((np.stack(waves, -1)[None] * 100 + 128).astype(np.uint8))


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
def test_hue_turns_the_chroma_plane_of_kornias_yuv(value, turns):
    images = pictures(2, 4, 5)
    y, u, v = kornia.color.rgb_to_yuv(unit(images)).unbind(1)
    cos, sin = math.cos(2 * math.pi * turns), math.sin(2 * math.pi * turns)
    wanted = kornia.color.yuv_to_rgb(torch.stack([y, cos * u - sin * v, sin * u + cos * v], 1)).clamp(0, 1)
    found = augment(Augment(hue=0.3), images, draw(2, hue=value))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_hue_turns_red_into_green_and_leaves_grey():
    images = torch.tensor([[[[200, 40, 40], [90, 90, 90]]]], dtype=torch.uint8)
    red, grey = augment(Augment(hue=0.5), images, draw(hue=0.5 + 1 / 3))[0].permute(1, 2, 0)[0]
    assert red.argmax() == 1
    assert torch.allclose(grey, torch.full((3,), 90 / 255), atol=1e-6)


def test_colours_together_are_kornias_one_after_another():
    """Nothing saturates in between: the pictures are pale and the changes small."""
    images = pictures(16, 9, 7) // 8 + 112
    u = random_draws(16)
    cfg = Augment(brightness=0.2, contrast=0.4, saturation=0.5, hue=0.1, grayscale=0.25)
    x = unit(images)

    def factor(name: str, amount: float) -> torch.Tensor:
        return (1 + amount * (2 * u[:, COLUMNS.index(name)] - 1)).float()

    x = enhance.adjust_brightness_accumulative(x, factor("brightness", 0.2))
    x = enhance.adjust_contrast_with_mean_subtraction(x, factor("contrast", 0.4))
    x = enhance.adjust_saturation_with_gray_subtraction(x, factor("saturation", 0.5))
    angle = (2 * math.pi * 0.1) * (2 * u[:, COLUMNS.index("hue")] - 1).float()
    luma, a, b = kornia.color.rgb_to_yuv(x).unbind(1)
    cos, sin = (f(angle)[:, None, None] for f in (torch.cos, torch.sin))
    x = kornia.color.yuv_to_rgb(torch.stack([luma, cos * a - sin * b, sin * a + cos * b], 1))
    lost = u[:, COLUMNS.index("grayscale")] < 0.25
    assert 0 < lost.sum() < 16
    x[lost] = kornia.color.rgb_to_grayscale(x[lost]).expand(-1, 3, -1, -1)
    assert 0 < x.min() < x.max() < 1
    assert torch.allclose(augment(cfg, images, u), x, atol=1e-5)


def test_contrast_is_about_the_mean_after_the_move():
    cfg = Augment(vertical_flip=1, crop=0.25, contrast=0.5)
    images, u = pictures(3, 8, 8), draw(3, contrast=0.0, shift_x=0.0)
    moved = augment(Augment(vertical_flip=1, crop=0.25), images, u)
    wanted = enhance.adjust_contrast_with_mean_subtraction(moved, torch.full((3,), 0.5))
    assert torch.allclose(augment(cfg, images, u), wanted, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_brightness_and_contrast_need_no_colour(channels):
    images = pictures(3, 5, 6, channels)
    x = augment(Augment(brightness=0.5, contrast=0.5), images, draw(3, brightness=0, contrast=0))
    half = unit(images) / 2
    grey = grey_of(half) if channels == 3 else half.mean(1, keepdim=True)
    assert torch.allclose(x, half / 2 + grey.mean((2, 3), keepdim=True) / 2, atol=1e-6)


def test_grey_pictures_have_no_saturation_or_hue():
    images = pictures(2, 8, 8, channels=1)
    assert torch.equal(augment(Augment(saturation=1, hue=0.5), images, draw(2, saturation=0, hue=0)), unit(images))


def test_brightness_of_grey_pictures_is_drawn_too():
    images = pictures(1, 8, 8, channels=1)
    assert torch.allclose(augment(Augment(brightness=0.5), images, draw(brightness=0)), unit(images) / 2, atol=1e-6)


# one resample for all moves


def test_the_affine_matrix_is_that_of_kornia():
    """get_affine_matrix2d: shear, zoom and turn about the centre, then shift."""
    height, width, u = 20, 30, random_draws(8)
    cfg = Augment(rotation=40, scale=(0.5, 1.5), shear=20, translate=0.2)
    signed = 2 * u - 1
    wanted = warp.get_affine_matrix2d(
        translations=signed[:, 16:18] * 0.2 * torch.tensor([width, height]),
        center=torch.tensor([[(width - 1) / 2, (height - 1) / 2]], dtype=torch.float64).expand(8, 2),
        scale=torch.exp(math.log(0.5) + math.log(3) * u[:, 3:4]).expand(8, 2),
        angle=signed[:, 2] * 40,
        sx=signed[:, 14] * math.radians(20),
        sy=signed[:, 15] * math.radians(20),
    )
    assert torch.allclose(geometry.affine(cfg, u, height, width), wanted, atol=1e-4)  # Kornia: degrees in float32


def test_perspective_moves_the_corners_inwards():
    height, width, u = 12, 20, random_draws(5)
    matrix = geometry.perspective(Augment(perspective=0.6), u, height, width)
    for corner, (x, y) in enumerate([(0, 0), (19, 0), (19, 11), (0, 11)]):
        moved = matrix @ torch.tensor([x, y, 1.0], dtype=torch.float64)
        inwards = u[:, 18 + 2 * corner : 20 + 2 * corner] * 0.3 * torch.tensor([width, height])
        wanted = torch.tensor([x, y]) + inwards * torch.tensor([1 if x == 0 else -1, 1 if y == 0 else -1])
        assert torch.allclose(moved[:, :2] / moved[:, 2:], wanted, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 80)])
def test_one_resample_is_near_kornias_moves_one_after_another(height, width):
    """Five resamples of a smooth picture differ from one by what they smear: at most 0.005, the mean below 0.001."""
    rows, u = 6, random_draws(6, seed=3)
    cfg = Augment(horizontal_flip=0.5, rotation=20, scale=(0.9, 1.1), shear=8, translate=0.05, perspective=0.2)
    images, signed = smooth(height, width).expand(rows, -1, -1, -1), (2 * u - 1).float()

    def one_by_one(x: torch.Tensor) -> torch.Tensor:
        flipped = u[:, 0] < 0.5
        x = torch.where(flipped[:, None, None, None], warp.hflip(x), x)
        centre = torch.tensor([[(width - 1) / 2, (height - 1) / 2]]).expand(rows, 2)
        shear = warp.get_shear_matrix2d(centre, signed[:, 14] * math.radians(8), signed[:, 15] * math.radians(8))
        x = warp.warp_affine(x, shear[:, :2], (height, width))
        zoom = torch.exp(math.log(0.9) + math.log(1.1 / 0.9) * u[:, 3]).float()
        x = warp.scale(x, zoom[:, None].expand(-1, 2), align_corners=True)
        x = warp.rotate(x, -signed[:, 2] * 20)
        x = warp.translate(x, signed[:, 16:18] * 0.05 * torch.tensor([width, height]))
        return warp.warp_perspective(x, geometry.perspective(cfg, u, height, width).float(), (height, width))

    found, wanted = augment(cfg, images, u), one_by_one(unit(images))
    inside = one_by_one(torch.ones(rows, 3, height, width)) > 0.9999
    assert inside.float().mean() > 0.5
    apart = (found - wanted).abs()[inside]
    assert apart.max() < 5e-3
    assert apart.mean() < 1e-3


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_whole_pixel_moves_are_those_of_the_resample(padding):
    images, u = pictures(8, 6, 9), random_draws(8)
    cfg = Augment(horizontal_flip=0.5, vertical_flip=0.5, crop=1.0, padding=padding)
    theta = geometry.normalised(geometry.affine(cfg, u, 6, 9), 6, 9)
    wanted = geometry.resample(images, theta, padding, projective=False) / 255
    assert torch.allclose(augment(cfg, images, u), wanted, atol=1e-4)


def test_what_lies_behind_the_eye_is_outside():
    """Corners drawn together make the horizon cross the picture; no pixel beyond it may show anything, or NaN."""
    u = draw(corner_0x=0.999, corner_0y=0.999, corner_1x=0.9, corner_3y=0.99, corner_2x=0.999, corner_2y=0.999)
    out = augment(Augment(perspective=1.0), torch.full((1, 32, 32, 3), 255, dtype=torch.uint8), u)
    assert torch.isfinite(out).all()
    assert (out == 0).float().mean() > 0.5


# blur, erasing


def test_blur_is_that_of_torchvision_for_the_samples_drawn():
    images, u = pictures(4, 20, 31), random_draws(4)
    u[:, COLUMNS.index("blur")] = torch.tensor([0.0, 0.29, 0.31, 0.99])
    found = augment(Augment(blur=0.3), images, u)
    for row in range(4):
        sigma = 0.1 + 1.9 * u[row, COLUMNS.index("sigma")].item()
        x = unit(images[row : row + 1])
        wanted = tv.gaussian_blur(x, [13, 13], [sigma, sigma]) if row < 2 else x
        assert torch.allclose(found[row : row + 1], wanted, atol=1e-5)


def test_small_pictures_are_blurred_too():
    out = augment(Augment(blur=1), pictures(2, 4, 5), random_draws(2))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("area", "ratio", "y", "x", "box"),
    [
        (0.0, 0.5, 0.0, 0.0, (slice(0, 6), slice(0, 6))),  # 2% of 40 × 40: 5.7 square
        (1.0, 0.5, 0.999, 0.5, (slice(17, 40), slice(9, 32))),  # 33%: 23
        (0.0, 1.0, 0.0, 0.999, (slice(0, 10), slice(37, 40))),  # height/width 1 / 0.3
    ],
)
def test_erasing_puts_the_mean_colour_in_a_box(area, ratio, y, x, box):
    images = pictures(2, 40, 40)
    u = draw(2, erasing=0.0, erased_area=area, erased_ratio=ratio, erased_y=y, erased_x=x)
    u[1, COLUMNS.index("erasing")] = 0.9
    found = Augmenter(Augment(erasing=0.5), [0.4] * 3, [0.2] * 3)(images, u)
    wanted = to_input(images, [0.4] * 3, [0.2] * 3)
    wanted[0, :, box[0], box[1]] = 0
    assert torch.equal(found, wanted)


# every kind of batch


@pytest.mark.parametrize("policy", [None, "trivialaugment", "randaugment", "autoaugment"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_does_not_depend_on_what_is_done_together(policy, channels, monkeypatch):
    cfg = ALL.model_copy(update={"policy": policy})
    images, u = pictures(24, 9, 13, channels), random_draws(24)
    whole = augment(cfg, images, u)
    assert torch.equal(whole, augment(cfg, images, u))
    monkeypatch.setattr(door, "CHUNK_VALUES", 9 * 13 * channels * 5)  # five at a time: 24 is no multiple
    assert torch.allclose(augment(cfg, images, u), whole, atol=1e-5)
    backwards = augment(cfg, images.flip(0), u.flip(0)).flip(0)
    assert torch.allclose(backwards, whole, atol=1e-5)


@pytest.mark.parametrize("policy", [None, "trivialaugment", "randaugment", "autoaugment"])
@pytest.mark.parametrize(("rows", "height", "width", "channels"), [(3, 4, 4, 1), (2, 17, 9, 3), (0, 8, 8, 3)])
def test_shapes_and_types(policy, rows, height, width, channels):
    images, u = pictures(rows, height, width, channels), random_draws(rows)
    before = images.clone(), u.clone()
    out = augment(ALL.model_copy(update={"policy": policy}), images, u)
    assert (out.dtype, tuple(out.shape), out.is_contiguous()) == (torch.float32, (rows, channels, height, width), True)
    assert torch.isfinite(out).all()
    assert torch.equal(images, before[0])
    assert torch.equal(u, before[1])


def test_no_two_parameters_share_a_column():
    columns = [*range(len(COLUMNS)), *range(policies.FIRST, policies.FIRST + policies.SLOTS * policies.WIDTH)]
    columns += [mix.SHARE, mix.KIND, mix.BOX_X, mix.BOX_Y]
    assert columns == list(range(DRAWS))


def test_the_input_of_a_network_is_the_normalised_unit_picture():
    images, mean, std = pictures(3, 6, 4), [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    assert torch.equal(to_unit(images), images.permute(0, 3, 1, 2) / 255)
    x = to_unit(images)
    assert torch.allclose(normalise(x, mean, std), to_input(images, mean, std), atol=1e-5)
    assert torch.equal(x, to_unit(images))  # not in place
